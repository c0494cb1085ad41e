"""Functions of tests in a process that may mount file systems, which nobody else sees or keeps."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests import forked

_TIMEOUT_S = 300


def run_with_mounts(scenario: Callable[[Path], None], base: Path, *, size: str | None = None) -> None:
    """Calls a function of a module with a folder, in such a process.

    Args:
        scenario: The function.
        base: The folder.
        size: Of a disk at ``disk`` in the folder, as tmpfs has it, e.g. "2m"; None for no disk.
    """
    arguments = [scenario.__module__, scenario.__name__, str(base)]
    arguments += [] if size is None else [size]
    done = forked.run("tests.mounted_disk:call", arguments, timeout=_TIMEOUT_S, needs_mounts=True)
    assert done.returncode == 0, done.stderr


def mount(folder: Path, *arguments: str) -> None:
    """Mounts at a folder, or changes what is mounted there."""
    subprocess.run(["mount", *arguments, str(folder)], check=True)


def call(arguments: list[str]) -> None:
    """What `run_with_mounts` does in the process."""
    module, function, base, *sizes = arguments
    for size in sizes:
        (Path(base) / "disk").mkdir()
        mount(Path(base) / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    getattr(importlib.import_module(module), function)(Path(base))
