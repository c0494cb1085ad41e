"""A storage that is full: clients are told, nothing is damaged, and the server goes on when there is room."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import openai
import pytest

from batchllm.server import BatchOptions, dispatcher
from tests.cli.instant_engine import Settings
from tests.server.api_rows import begin, check_each_row_once, rows_of, until, upload, wait_for, wait_for_rows
from tests.server.instant_server import Api, SharedRuntime

ROOT = Path(__file__).parents[2]


class Disk:
    """A small disk with a storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filler = folder / "filler"

    def serve(self, settings: Settings) -> Api:
        return Api(BatchOptions(storage=self.folder / "storage"), SharedRuntime(settings))

    def fill(self) -> None:
        """Leaves no byte on it."""
        with self.filler.open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def check_whole(self) -> None:
        with closing(sqlite3.connect(self.folder / "storage" / "batches.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def run_with_disk(scenario: Callable[[Disk], None], base: Path, size: str = "3m") -> None:
    """Runs a function of this file in a process that has mounted a small disk, which nobody else sees or keeps."""
    command = [sys.executable, "-m", "tests.server.test_storage_faults", scenario.__name__, str(base), size]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0:
        command = ["unshare", "-rm", *command]
    elif os.geteuid() == 0:
        command = ["unshare", "-m", *command]
    else:
        pytest.fail("this machine lets nobody but root mount file systems (`unshare -rm` is refused): run this as root")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_upload_that_does_not_fit_is_refused_and_leaves_its_room(tmp_path: Path) -> None:
    run_with_disk(upload_too_much, tmp_path)


def upload_too_much(disk: Disk) -> None:
    api = disk.serve(Settings())
    try:
        kept = upload(api.client, b"x" * 100_000)
        for _ in range(3):
            with pytest.raises(openai.InternalServerError) as caught:
                upload(api.client, b"x" * 4_000_000)
            assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
            assert os.listdir(disk.folder / "storage" / "incoming") == []
        assert [file.id for file in api.client.files.list()] == [kept]
        upload(api.client, b"x" * 1_000_000)
        disk.fill()
        with pytest.raises(openai.InternalServerError) as caught:
            upload(api.client, b"x")
        assert caught.value.status_code == 507
        assert api.client.files.content(kept).content == b"x" * 100_000
        disk.filler.unlink()
        assert wait_for(api.client, begin(api.client, rows_of(5)).id).status == "completed"
    finally:
        api.stop()
    disk.check_whole()


def test_a_batch_whose_disk_runs_full_says_so_or_goes_on_later_and_others_run(tmp_path: Path) -> None:
    run_with_disk(fill_under_batch, tmp_path)


def fill_under_batch(disk: Disk) -> None:
    """What it has answered stays answered."""
    api = disk.serve(Settings(batch=10, delay_s=0.02))
    try:
        begun = begin(api.client, rows_of(400))
        wait_for_rows(api.client, begun.id, 50)
        disk.fill()
        until(lambda: begun.id not in [thread.name for thread in threading.enumerate()], "it still runs")
        disk.filler.unlink()
        other = wait_for(api.client, begin(api.client, rows_of(20)).id)
        assert other.status == "completed"
        check_each_row_once(api.client, other, 20)
        batch = wait_for(api.client, begun.id)
        assert batch.status == "completed"
        check_each_row_once(api.client, batch, 400)
    finally:
        api.stop()
    disk.check_whole()


def main(scenario: str, base: str, size: str) -> None:
    folder = Path(base) / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    dispatcher._RETRY_AFTER_S = 0.2
    globals()[scenario](Disk(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
