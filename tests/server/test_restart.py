"""A server that is killed or stopped goes on where it was: nothing that was recorded is lost or run again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import openai
import pytest

from batchllm.errors import EngineDiedError, EngineError
from batchllm.offline import recovery
from batchllm.offline.event_loop import LoopThread, iterate_on
from batchllm.offline.fake_runtime import FakeJob
from batchllm.offline.jobs import Jobs
from batchllm.offline.runtime import Runtime
from batchllm.server import BatchOptions
from tests.cli.instant_engine import InstantRuntime, Settings
from tests.cli.jobs import SubmissionLog, recorded_rows
from tests.server.api_rows import (
    DEADLINE_S,
    begin,
    check_each_row_once,
    counts_of,
    lines_of,
    row,
    rows_of,
    until,
    upload,
    wait_for,
    wait_for_rows,
)
from tests.server.conftest import Serve
from tests.server.instant_server import KILLER, Api, SharedRuntime
from tests.server.server_process import ServerProcesses

T = TypeVar("T")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[ServerProcesses]:
    with ServerProcesses(tmp_path) as found:
        yield found


def test_a_server_that_is_killed_again_and_again_asks_for_no_recorded_row_twice(processes: ServerProcesses) -> None:
    log = SubmissionLog(processes.base / "log.txt")
    engine: dict[str, Any] = {"batch": 10, "delay_s": 0.05, "log": str(log.path)}
    server = processes.start(**engine)
    batch_id = begin(server.client, rows_of(600)).id
    folder = processes.base / "storage" / "jobs" / batch_id
    for least in (50, 250):
        wait_for_rows(server.client, batch_id, least)
        server.kill()
        recorded = recorded_rows(folder)
        assert least <= len(recorded) < 600
        log.take()
        server = processes.start(**engine)
        wait_for_rows(server.client, batch_id, len(recorded) + 1)
        asked = log.take()
        asked.pop("start")
        assert asked == {str(i): 1 for i in range(600) if i not in recorded}
    batch = wait_for(server.client, batch_id)
    assert batch.status == "completed"
    check_each_row_once(server.client, batch, 600)
    assert batch.usage is not None
    assert batch.usage.total_tokens == 600 * 4
    until(lambda: not folder.exists(), "the journal is still there")


def test_a_row_that_kills_the_server_costs_its_batch_and_no_other(processes: ServerProcesses) -> None:
    """The other one may be suspected at first; the two are not run together again."""
    server = processes.start(batch=1, delay_s=0.05)
    good = begin(server.client, rows_of(20)).id
    file_id = upload(server.client, [*rows_of(9), row(9, prompt=[KILLER])])
    bad = server.client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h").id
    num_deaths = 0
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline
        try:
            found = [server.client.batches.retrieve(batch_id) for batch_id in (good, bad)]
        except openai.APIConnectionError:
            assert server.process.wait(DEADLINE_S) == -signal.SIGKILL
            num_deaths += 1
            server = processes.start(batch=1, delay_s=0.0)
            continue
        if {batch.status for batch in found} <= {"completed", "failed"}:
            break
        time.sleep(0.02)
    assert num_deaths == 3
    assert [batch.status for batch in found] == ["completed", "failed"]
    check_each_row_once(server.client, found[0], 20)
    assert found[1].errors is not None
    assert found[1].errors.data is not None
    assert [error.code for error in found[1].errors.data] == ["crash_loop"]
    codes = {line["error"]["code"] for line in lines_of(server.client, found[1].error_file_id)}
    assert (codes, counts_of(found[1])) == ({"batch_failed"}, (10, 0, 10))


def test_a_batch_that_was_acknowledged_survives_at_any_point(processes: ServerProcesses) -> None:
    """Killed right after each answer."""
    server = processes.start()
    file_id = upload(server.client, rows_of(5))
    begun = server.client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")
    server.kill()
    server = processes.start(batch=1, stuck_after=1)
    wait_for_rows(server.client, begun.id, 1)
    server.client.batches.cancel(begun.id)
    server.kill()
    server = processes.start()
    batch = wait_for(server.client, begun.id)
    assert batch.status == "cancelled"
    check_each_row_once(server.client, batch, 5)


def test_a_server_that_is_stopped_in_good_order_again_and_again_blames_nobody(serve: Serve) -> None:
    api = serve(engine={"delay_s": 3600})
    batch_id = begin(api.client, rows_of(5)).id
    for _ in range(5):
        wait_for(api.client, batch_id, "in_progress")
        until((api.storage / "jobs" / batch_id / "journal.db").exists, "it is not begun")
        api.stop()
        api = serve(engine={"delay_s": 3600})
    api.stop()
    api = serve()
    batch = wait_for(api.client, batch_id)
    assert (batch.status, counts_of(batch)) == ("completed", (5, 5, 0))


class _DeadRuntime(SharedRuntime):
    """An engine that dies whatever it is asked."""

    async def before_answers(self, job: FakeJob) -> None:
        raise EngineDiedError("it is dead")


def test_a_server_that_is_stopped_while_its_engine_is_down_blames_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it wait for an engine that does not come up any more."""
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.2)
    batch_id = ""
    for _ in range(4):
        api = serve(is_started=False)
        engines, is_asked, is_ending = iter([_DeadRuntime(Settings())]), threading.Event(), threading.Event()

        def start_engine(
            engines: Iterator[Runtime] = engines, is_asked: Any = is_asked, is_ending: Any = is_ending
        ) -> Runtime:
            for engine in engines:
                return engine
            is_asked.set()
            is_ending.wait()
            raise EngineError("it does not come up again")

        api.service.start(start_engine)
        batch_id = batch_id or begin(api.client, rows_of(5)).id
        assert is_asked.wait(DEADLINE_S)
        is_ending.set()
        api.stop()
    api = serve()
    batch = wait_for(api.client, batch_id)
    assert (batch.status, counts_of(batch)) == ("completed", (5, 5, 0))


def test_a_batch_that_runs_whenever_the_engine_dies_is_given_up(serve: Serve) -> None:
    """As one that runs whenever the process is killed."""
    batch_id = ""
    for num_attempts in (1, 2, 3):
        api = serve(engine={"delay_s": 3600})
        batch_id = batch_id or begin(api.client, rows_of(5)).id
        query = f"SELECT 1 FROM batch WHERE num_attempts = {num_attempts}"
        with closing(sqlite3.connect(api.storage / "batches.db")) as db:
            until(lambda db=db, query=query: db.execute(query).fetchone() is not None, "it is not begun")
        api.service.stop(is_crash=True)
        api.stop()
    api = serve()
    batch = wait_for(api.client, batch_id)
    assert (batch.status, counts_of(batch)) == ("failed", (5, 0, 5))


class _MortalRuntime(SharedRuntime):
    """An engine that dies under rows that end with `KILLER`, with all that run beside them, and is there again at once.

    Attributes:
        num_deaths: How often it has.
    """

    def __init__(self) -> None:
        super().__init__(Settings(batch=3, delay_s=0.01))
        self.loop_thread = LoopThread("jobs")
        self.num_deaths = 0
        self._generation: dict[int, int] = {}

    def open_job(self) -> int:
        job_id = super().open_job()
        self._generation[id(self.jobs[job_id])] = self.num_deaths
        return job_id

    async def before_answers(self, job: FakeJob) -> None:
        begun_at = self._generation[id(job)]
        is_killer = any(request.prompt[-1] == KILLER for request in job.outstanding.values())
        if begun_at == self.num_deaths and is_killer:
            await asyncio.sleep(0.02)  # others are answered meanwhile
            self.num_deaths += 1
        if begun_at < self.num_deaths:
            raise EngineDiedError("it is dead")
        await InstantRuntime.before_answers(self, job)

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        return iterate_on(self.loop_thread.loop, stream)


def test_rows_that_kill_the_engine_are_found_and_all_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stays, and so do rows of batches that happened to run beside them."""
    monkeypatch.setattr("batchllm.offline.recovery._FIRST_PAUSE_S", 0.01)
    runtime = _MortalRuntime()
    api = Api(BatchOptions(storage=tmp_path / "storage"), runtime, is_started=False)
    jobs = Jobs(runtime)
    api.service.start(lambda: runtime, jobs.make_job)
    try:
        file_id = upload(api.client, [*rows_of(40), row(40, prompt=[KILLER]), row(41, prompt=[5, KILLER])])
        bad = api.client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h").id
        good = [begin(api.client, rows_of(30)).id for _ in range(2)]
        for batch_id in good:
            batch = wait_for(api.client, batch_id)
            assert (batch.status, counts_of(batch)) == ("completed", (30, 30, 0))
        batch = wait_for(api.client, bad)
        assert (batch.status, counts_of(batch)) == ("completed", (42, 40, 2))
        failed = lines_of(api.client, batch.error_file_id)
        assert {line["custom_id"] for line in failed} == {"r40", "r41"}
        assert {line["response"]["body"]["error"]["code"] for line in failed} == {"engine_died"}
        assert runtime.num_deaths >= 4  # each of the two alone, twice
    finally:
        api.stop()
        runtime.loop_thread.close()


def test_rows_that_were_done_when_the_server_stopped_are_not_asked_again(serve: Serve, tmp_path: Path) -> None:
    log = SubmissionLog(tmp_path / "log.txt")
    api = serve(engine={"batch": 10, "stuck_after": 30, "log": str(log.path)})
    batch_id = begin(api.client, rows_of(50)).id
    wait_for_rows(api.client, batch_id, 30)
    api.stop()
    log.take()
    api = serve(engine={"log": str(log.path)})
    check_each_row_once(api.client, wait_for(api.client, batch_id), 50)
    asked = log.take()
    asked.pop("start")
    assert sum(asked.values()) == len(asked) == 20


def test_a_batch_that_another_model_has_begun_waits_for_it(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """No batch has answers of two models; it is not lost either, and can be cancelled."""
    api = serve(engine={"batch": 10, "stuck_after": 30})
    batch_ids = [begin(api.client, rows_of(50)).id for _ in range(2)]
    wait_for_rows(api.client, batch_ids[0], 10)
    wait_for_rows(api.client, batch_ids[1], 10)
    api.stop()
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE batch SET model = 'another'")
    api = serve()
    until(lambda: f"{batch_ids[0]}: another has answered a part of it" in caplog.text, "nobody is told")
    api.client.batches.cancel(batch_ids[1])
    assert wait_for(api.client, batch_ids[1]).status == "cancelled"
    begun = api.client.batches.retrieve(batch_ids[0])
    assert (begun.status, counts_of(begun)[1] < 50) == ("in_progress", True)
    api.stop()
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE batch SET model = 'instant'")
    api = serve()
    check_each_row_once(api.client, wait_for(api.client, batch_ids[0]), 50)


def test_a_batch_cut_off_between_its_files_and_its_status_is_finished_again(serve: Serve, tmp_path: Path) -> None:
    """Neither lost nor doubled: the files that had no record go, and the same lines come."""
    log = SubmissionLog(tmp_path / "log.txt")
    api = serve(is_started=False)
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE OF status ON batch WHEN OLD.status = 'finalizing' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    api.stop()
    api = serve()
    batch_id = begin(api.client, rows_of(20)).id
    assert wait_for(api.client, batch_id, "finalizing").output_file_id is None
    assert [file.purpose for file in api.client.files.list()] == ["batch"]
    api.stop()
    assert len(os.listdir(api.storage / "files")) == 1
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("DROP TRIGGER refuse")
    api = serve(engine={"log": str(log.path)})
    batch = wait_for(api.client, batch_id)
    assert batch.status == "completed"
    check_each_row_once(api.client, batch, 20)
    assert sum(file.purpose == "batch_output" for file in api.client.files.list()) == 1
    assert set(log.take()) == {"start"}, "rows were run again"


def test_results_that_are_damaged_on_disk_are_made_again(serve: Serve) -> None:
    """A journal whose lines are not what was recorded costs those rows another run, and nothing else."""
    api = serve(engine={"batch": 10, "stuck_after": 30})
    batch_id = begin(api.client, rows_of(50)).id
    wait_for_rows(api.client, batch_id, 30)
    api.stop()
    with closing(sqlite3.connect(api.storage / "jobs" / batch_id / "journal.db")) as db, db:
        db.execute("UPDATE result SET line = ? WHERE idx = 3", (json.dumps({"custom_id": "r3"}).encode(),))
    api = serve()
    batch = wait_for(api.client, batch_id)
    assert batch.status == "completed"
    check_each_row_once(api.client, batch, 50)
