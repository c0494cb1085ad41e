"""A server that ends, or whose memory, disk, folder or clock fails, in each phase of a batch: rows once, nothing lost
that was acknowledged, nothing left.

The engine is the instant one; what of the matrix is held where is in `tests/faults/matrix.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from batchllm.offline.journal import Journal
from batchllm.server import dispatcher
from batchllm.server.file_store import FileStore
from tests.cli.instant_engine import Settings
from tests.cli.jobs import SubmissionLog, recorded_rows
from tests.faults.matrix import HOLDERS, SERVER, phases_of
from tests.mounted_disk import run_with_mounts
from tests.server.api_rows import (
    begin,
    check_each_row_once,
    lines_of,
    rows_of,
    until,
    upload,
    wait_for,
)
from tests.server.conftest import Serve, serve
from tests.server.instant_server import Api
from tests.server.server_process import ServerProcesses
from tests.server.small_disk import SmallDisk
from tests.shared_memory import left_behind, ownerless

__all__ = ["serve"]
NUM_ROWS = 300
HOUR_S = 3600
MOMENTS: dict[str, dict[str, Any]] = {
    "prefill": {"at": 0},
    "decode": {"at": 100},
    "finalising": {"moment": "end"},
}
_END = SERVER + "test_a_server_that_ends_goes_on_with_what_it_had"
_MEMORY = SERVER + "test_a_batch_for_which_there_is_no_memory_is_tried_again"
_FOLDER = SERVER + "test_a_batch_whose_folder_goes_says_so_and_others_run"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[ServerProcesses]:
    with ServerProcesses(tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def tries_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_RETRY_AFTER_S", 0.2)


def check_nothing_left(storage: Path, client: openai.OpenAI) -> None:
    """Every file has its record, and a batch that has ended no folder."""
    until(lambda: not os.listdir(storage / "jobs"), "a journal is still there")
    assert os.listdir(storage / "incoming") == []
    assert sorted(os.listdir(storage / "files")) == sorted(file.id for file in client.files.list())
    assert not (storage / "unknown").exists()


@pytest.mark.parametrize(("fault", "phase"), [(cell.fault, cell.phase) for cell in HOLDERS[_END]], ids=str)
def test_a_server_that_ends_goes_on_with_what_it_had(processes: ServerProcesses, fault: str, phase: str) -> None:
    """Batches that were done stay so, and what was not asked yet is asked once."""
    shared_memory, log = ownerless(), SubmissionLog(processes.base / "log.txt")
    number = signal.Signals[fault]
    end = {} if phase == "idle" else {"do": f"kill -{number:d} $PPID; sleep 0.2"} | MOMENTS[phase]
    server = processes.start(batch=10, **end)
    if phase == "idle":
        batch_id = begin(server.client, rows_of(NUM_ROWS)).id
        wait_for(server.client, batch_id)
        server.process.send_signal(number)
    else:
        batch_id = begin(server.client, rows_of(NUM_ROWS)).id
    assert server.process.wait(30) == (-number if fault == "SIGKILL" else 0)
    folder = processes.base / "storage" / "jobs" / batch_id
    all_rows = set(range(NUM_ROWS))
    recorded = recorded_rows(folder) if Journal.exists(folder) else set() if phase == "prefill" else all_rows
    server = processes.start(log=str(log.path))
    batch = wait_for(server.client, batch_id)
    assert batch.status == "completed"
    check_each_row_once(server.client, batch, NUM_ROWS)
    asked = log.take()
    del asked["start"]
    assert asked == {str(row): 1 for row in all_rows - recorded}
    assert (recorded == all_rows) == (phase != "prefill")
    check_nothing_left(processes.base / "storage", server.client)
    assert not left_behind(shared_memory)


def test_an_upload_for_which_there_is_no_memory_leaves_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hears of it, and the next one is served."""
    api = serve()
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "place", _no_memory)
        with pytest.raises(openai.InternalServerError) as refused:
            upload(api.client, rows_of(5))
        assert (refused.value.status_code, refused.value.code) == (503, "out_of_memory")
    assert api.client.files.list().data == []
    batch = wait_for(api.client, begin(api.client, rows_of(5)).id)
    check_each_row_once(api.client, batch, 5)
    check_nothing_left(api.storage, api.client)


def _no_memory(*_: Any) -> str:
    raise MemoryError


@pytest.mark.parametrize("phase", phases_of(_MEMORY))
def test_a_batch_for_which_there_is_no_memory_is_tried_again(serve: Serve, phase: str) -> None:
    api = serve(engine={"batch": 10, "fault": "memory", **MOMENTS[phase]})
    batch = wait_for(api.client, begin(api.client, rows_of(NUM_ROWS)).id)
    assert batch.status == "completed"
    check_each_row_once(api.client, batch, NUM_ROWS)
    check_nothing_left(api.storage, api.client)


def test_a_disk_that_is_full_at_either_end_of_a_batch_makes_it_wait(tmp_path: Path) -> None:
    run_with_mounts(fill_at_both_ends, tmp_path, size="3m")


def fill_at_both_ends(base: Path) -> None:
    """Before its first row has a result, and when all have and their files are to be written."""
    disk = SmallDisk(base)
    for moment in (MOMENTS["prefill"], MOMENTS["finalising"]):
        fill = f"cat /dev/zero > {disk.filler} 2> /dev/null"
        api = disk.serve(Settings(batch=10, do=fill, **moment))
        try:
            begun = begin(api.client, rows_of(NUM_ROWS))
            until(disk.filler.exists, "it does not begin")
            wait_for_trouble(api, begun.id)
            assert api.client.batches.retrieve(begun.id).status in ("in_progress", "finalizing")
            disk.filler.unlink()
            api.stop()
            api = disk.serve(Settings(batch=10))
            batch = wait_for(api.client, begun.id)
            assert batch.status == "completed"
            check_each_row_once(api.client, batch, NUM_ROWS)
            check_nothing_left(disk.folder / "storage", api.client)
        finally:
            api.stop()
        disk.check_whole()


def wait_for_trouble(api: Api, batch_id: str) -> None:
    dispatching = api.service._dispatcher
    assert dispatching is not None
    until(lambda: batch_id in dispatching._not_before, "it has no trouble")


def test_a_storage_that_goes_takes_nothing_more(serve: Serve, tmp_path: Path) -> None:
    """Nothing is acknowledged that the next start would not find; what was is there when the storage is put back."""
    api = serve()
    batch = wait_for(api.client, begin(api.client, rows_of(NUM_ROWS)).id)
    api.storage.rename(tmp_path / "away")
    with pytest.raises(openai.InternalServerError) as refused:
        upload(api.client, rows_of(5))
    assert refused.value.status_code == 503
    with pytest.raises(openai.InternalServerError) as refused:
        begin_of = {"endpoint": "/v1/completions", "completion_window": "24h"}
        api.client.batches.create(input_file_id=batch.input_file_id, **begin_of)
    assert refused.value.status_code == 503
    api.stop()
    shutil.rmtree(api.storage, ignore_errors=True)
    (tmp_path / "away").rename(api.storage)
    api = serve()
    assert [one.id for one in api.client.batches.list()] == [batch.id]
    check_each_row_once(api.client, api.client.batches.retrieve(batch.id), NUM_ROWS)
    check_nothing_left(api.storage, api.client)


@pytest.mark.parametrize("phase", phases_of(_FOLDER))
def test_a_batch_whose_folder_goes_says_so_and_others_run(serve: Serve, tmp_path: Path, phase: str) -> None:
    """Its results were in there, and are given up unless all of them have been recorded."""
    once = f"mkdir {tmp_path}/gone 2> /dev/null && rm -r {tmp_path}/storage/jobs/batch_*"
    api = serve(engine={"batch": 10, "do": once, **MOMENTS[phase]})
    batch = wait_for(api.client, begin(api.client, rows_of(NUM_ROWS)).id)
    if phase == "finalising":  # the journal is open, and has them
        assert batch.status == "completed"
        check_each_row_once(api.client, batch, NUM_ROWS)
    else:
        assert batch.status == "failed"
        assert batch.errors is not None and batch.errors.data is not None
        assert [error.code for error in batch.errors.data] == ["storage_unavailable"]
        assert lines_of(api.client, batch.output_file_id) == []
    other = wait_for(api.client, begin(api.client, rows_of(20)).id)
    assert other.status == "completed"
    check_each_row_once(api.client, other, 20)
    check_nothing_left(api.storage, api.client)


@pytest.mark.parametrize("by_s", [-30 * HOUR_S, 30 * HOUR_S], ids=["back", "on"])
@pytest.mark.parametrize("phase", ["idle", *MOMENTS])
def test_a_clock_that_is_set_ends_no_batch_and_no_file(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, phase: str, by_s: int
) -> None:
    """By more than the time that both have; and no later status has an earlier time."""
    monkeypatch.setattr(time, "time", time.time)  # put back when the test ends
    fault = {} if phase == "idle" else {"fault": f"clock{by_s}"} | MOMENTS[phase]
    api = serve(engine={"batch": 10, **fault})
    kept = upload(api.client, b"x", expires_after={"anchor": "created_at", "seconds": 24 * HOUR_S})
    if phase == "idle":
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + by_s)
    batch = wait_for(api.client, begin(api.client, rows_of(NUM_ROWS)).id)
    assert batch.status == "completed"
    check_each_row_once(api.client, batch, NUM_ROWS)
    api.service._files.delete_expired()
    assert kept in [file.id for file in api.client.files.list()]
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)
    assert batch.expires_at == batch.created_at + 24 * HOUR_S
    check_nothing_left(api.storage, api.client)
