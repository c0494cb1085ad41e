"""The room as others see it: light to import, counted, and patient with an engine that has died."""

from __future__ import annotations

import subprocess
import sys

import prometheus_client
import pytest

from batchllm.errors import EngineDiedError
from batchllm.offline import recovery
from batchllm.offline.fake_runtime import FakeJob
from batchllm.server import BatchMetrics, dispatcher
from tests.cli.instant_engine import Settings
from tests.server.api_rows import begin, check_each_row_once, counts_of, row, rows_of, until, wait_for
from tests.server.conftest import Serve
from tests.server.instant_server import SharedRuntime


class MortalRuntime(SharedRuntime):
    """Dies when asked for answers, as often as told."""

    def __init__(self, num_deaths: int) -> None:
        super().__init__(Settings())
        self.num_deaths = num_deaths

    async def before_answers(self, job: FakeJob) -> None:
        if self.num_deaths:
            self.num_deaths -= 1
            raise EngineDiedError("the scheduler is gone")
        await super().before_answers(job)


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import batchllm.server, sys\n"
        "print(*(name for name in ('torch', 'sglang', 'transformers', 'prometheus_client') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_batches_rows_and_uploads_are_counted(serve: Serve) -> None:
    registry = prometheus_client.CollectorRegistry()
    api = serve(metrics=BatchMetrics(registry), engine={"batch": 10, "stuck_after": 10})
    done = wait_for(api.client, begin(api.client, [row(0), row(1, n=-1)]).id)
    assert done.status == "completed"
    waiting = begin(api.client, rows_of(25))
    num_bytes = sum(api.client.files.retrieve(batch.input_file_id).bytes for batch in (done, waiting))
    expected = {
        'batchllm_batch_rows_total{outcome="answered"}': 11.0,
        'batchllm_batch_rows_total{outcome="failed"}': 1.0,
        'batchllm_batches{status="completed"}': 1.0,
        'batchllm_batches{status="in_progress"}': 1.0,
        'batchllm_batches{status="failed"}': 0.0,
        "batchllm_batch_backlog_rows": 15.0,
        "batchllm_batch_upload_bytes_total": float(num_bytes),
    }
    until(lambda: expected.items() <= _numbers(registry).items(), "the numbers are others")


def _numbers(registry: prometheus_client.CollectorRegistry) -> dict[str, float]:
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_an_engine_that_dies_and_comes_back_costs_no_row(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.001)
    api = serve(runtime=MortalRuntime(2))
    batch = wait_for(api.client, begin(api.client, rows_of(5)).id)
    assert (batch.status, counts_of(batch)) == ("completed", (5, 5, 0))
    check_each_row_once(api.client, batch, 5)


def test_an_engine_that_dies_whatever_runs_fails_every_row_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has died alone, twice, or its batch was given up; the batches after it are tried all the same."""
    monkeypatch.setattr(dispatcher, "_RETRY_AFTER_S", 0.0)
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.001)
    runtime = MortalRuntime(1_000_000)
    api = serve(runtime=runtime)
    batch = wait_for(api.client, begin(api.client, rows_of(5)).id)
    assert counts_of(batch) == (5, 0, 5)
    check_each_row_once(api.client, batch, 5)
    runtime.num_deaths = 0
    assert wait_for(api.client, begin(api.client, rows_of(5)).id).status == "completed"
