"""Functions of tests in a process that may mount file systems, which nobody else sees or keeps.

python -m tests.mounted_disk MODULE FUNCTION FOLDER [SIZE]
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_with_mounts(scenario: Callable[[Path], None], base: Path, *, size: str | None = None) -> None:
    """Calls a function of a module with a folder, in such a process.

    Args:
        scenario: The function.
        base: The folder.
        size: Of a disk at ``disk`` in the folder, as tmpfs has it, e.g. "2m"; None for no disk.
    """
    command = [sys.executable, "-m", "tests.mounted_disk", scenario.__module__, scenario.__name__, str(base)]
    command += [] if size is None else [size]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0:
        command = ["unshare", "-rm", *command]
    elif os.geteuid() == 0:
        command = ["unshare", "-m", *command]
    else:
        pytest.fail("this machine lets nobody but root mount file systems (`unshare -rm` is refused): run this as root")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def mount(folder: Path, *arguments: str) -> None:
    """Mounts at a folder, or changes what is mounted there."""
    subprocess.run(["mount", *arguments, str(folder)], check=True)


def main(module: str, function: str, base: str, size: str = "") -> None:
    folder = Path(base)
    if size:
        (folder / "disk").mkdir()
        mount(folder / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    getattr(importlib.import_module(module), function)(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
