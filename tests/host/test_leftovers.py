"""What engines whose process was killed have left among temporary files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchllm.host import leftovers

DEAD = 4194305  # above the largest pid there can be


def test_what_the_dead_left_is_removed_and_nothing_stands_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links are not followed: what they point to is somebody's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(leftovers, "_SHORT_FOLDER", str(tmp_path))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    folder = tmp_path / f"batchllm-{DEAD}-folder"
    folder.mkdir()
    (folder / "socket").touch()
    (tmp_path / f"batchllm-{DEAD}-file").touch()
    (tmp_path / f"batchllm-{DEAD}-link").symlink_to(precious)
    (tmp_path / f"batchllm-{DEAD}-broken").symlink_to(tmp_path / "nothing")
    living = tmp_path / f"batchllm-{os.getpid()}-folder"
    living.mkdir()
    others = tmp_path / "batchllm-notes-2026"
    others.touch()
    leftovers.remove_files_of_the_dead()
    assert (precious / "thesis.txt").read_text() == "mine"
    assert set(tmp_path.iterdir()) == {precious, living, others}


def test_a_folder_that_cannot_be_removed_does_not_keep_an_engine_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(leftovers, "_SHORT_FOLDER", str(tmp_path))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    (tmp_path / f"batchllm-{DEAD}-folder").mkdir()
    leftovers.remove_files_of_the_dead()
