"""Claims about functions that numba compiles."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from tests.mounted_disk import mount, run_with_mounts

_MODULE = """
from batchllm.compiled import njit

@njit(nogil=True)
def double(number):
    return 2 * number
"""


def test_they_are_kept_for_the_next_process(tmp_path: Path) -> None:
    assert _doubled(tmp_path) == 42
    assert list((tmp_path / "__pycache__").glob("*.nbi"))


def test_where_nothing_can_be_written_they_are_compiled_all_the_same(tmp_path: Path) -> None:
    """As in a container whose file system is read-only: neither beside the file nor below the user's home."""
    run_with_mounts(use_without_a_place, tmp_path)


def use_without_a_place(base: Path) -> None:
    os.environ |= {"HOME": str(base / "home"), "XDG_CACHE_HOME": str(base / "home")}
    (base / "module.py").write_text(_MODULE)
    mount(base, "--bind", str(base))
    mount(base, "-o", "remount,ro,bind")
    assert _doubled(base) == 42
    assert [path.name for path in base.iterdir()] == ["module.py"]


def _doubled(folder: Path) -> int:
    if not (folder / "module.py").exists():
        (folder / "module.py").write_text(_MODULE)
    sys.path.insert(0, str(folder))
    try:
        number: int = importlib.import_module("module").double(21)
        return number
    finally:
        sys.path.remove(str(folder))
        del sys.modules["module"]
