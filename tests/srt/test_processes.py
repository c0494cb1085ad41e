"""What engines whose process was killed have left among temporary files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchllm.host import own_folder
from batchllm.srt.entrypoints import processes

DEAD = 4194305  # above the largest pid there can be


def _folder(place: Path, name: str, *, is_marked: bool = True) -> Path:
    folder = place / name
    folder.mkdir()
    (folder / "socket").touch()
    if is_marked:
        own_folder.mark(folder)
    return folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(own_folder, "SHORT_PARENT", str(tmp_path))
    return tmp_path


def test_what_the_dead_left_is_removed_and_nothing_stands_in_the_way(temporary: Path) -> None:
    """Links are not followed: what they point to is somebody's own."""
    precious = _folder(temporary, "precious")
    _folder(temporary, f"batchllm-{DEAD}-abc_0123")
    link = temporary / f"batchllm-{DEAD}-abc_0124"
    link.symlink_to(precious)
    broken = temporary / f"batchllm-{DEAD}-abc_0125"
    broken.symlink_to(temporary / "nothing")
    living = _folder(temporary, f"batchllm-{os.getpid()}-abc_0123")
    processes._remove_files_of_the_dead()
    assert set(temporary.iterdir()) == {precious, link, broken, living}
    assert (precious / "socket").exists()


@pytest.mark.parametrize("name", [f"batchllm-{DEAD}-results", f"batchllm-{DEAD}-answers_", "batchllm-2024-x"])
def test_a_folder_of_the_users_own_is_left_alone_whatever_its_name(temporary: Path, name: str) -> None:
    mine = _folder(temporary, name, is_marked=False)
    processes._remove_files_of_the_dead()
    assert (mine / "socket").exists()


def test_a_folder_of_another_container_is_left_alone(temporary: Path) -> None:
    """Its process lives there, and has no such number here."""
    other = _folder(temporary, f"batchllm-{DEAD}-abc_0123")
    (other / own_folder.MARK).write_text("pid:[1]")
    processes._remove_files_of_the_dead()
    assert (other / "socket").exists()


def test_what_is_made_is_known_when_its_process_has_ended(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: DEAD)
    made = own_folder.make()
    assert made.parent == temporary
    processes._remove_files_of_the_dead()
    assert not made.exists()


def test_a_folder_that_cannot_be_removed_does_not_keep_an_engine_from_starting(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    _folder(temporary, f"batchllm-{DEAD}-abc_0123")
    processes._remove_files_of_the_dead()
