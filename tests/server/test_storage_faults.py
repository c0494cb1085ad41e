"""A storage that is full: clients are told, nothing is damaged, and the server goes on when there is room."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import openai
import pytest

from tests.cli.instant_engine import Settings
from tests.mounted_disk import run_with_mounts
from tests.server.api_rows import begin, check_each_row_once, rows_of, until, upload, wait_for, wait_for_rows
from tests.server.small_disk import SmallDisk


def test_an_upload_that_does_not_fit_is_refused_and_leaves_its_room(tmp_path: Path) -> None:
    run_with_mounts(upload_too_much, tmp_path, size="3m")


def upload_too_much(base: Path) -> None:
    disk = SmallDisk(base)
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


def test_a_file_can_be_deleted_from_a_full_disk(tmp_path: Path) -> None:
    run_with_mounts(delete_from_full_disk, tmp_path, size="3m")


def delete_from_full_disk(base: Path) -> None:
    """Its bytes make the room that the news of its end needs."""
    disk = SmallDisk(base)
    api = disk.serve(Settings())
    try:
        kept, deleted = (upload(api.client, b"x" * 100_000) for _ in range(2))
        disk.fill()
        assert api.client.files.delete(deleted).deleted
        assert [file.id for file in api.client.files.list()] == [kept]
        upload(api.client, b"x" * 10_000)
    finally:
        api.stop()
    disk.check_whole()


def test_a_batch_whose_disk_runs_full_says_so_or_goes_on_later_and_others_run(tmp_path: Path) -> None:
    run_with_mounts(fill_under_batch, tmp_path, size="3m")


def fill_under_batch(base: Path) -> None:
    """What it has answered stays answered."""
    disk = SmallDisk(base)
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
