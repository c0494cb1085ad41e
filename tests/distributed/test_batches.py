"""Batches of a server on several engines in Ray actors: planned together, spread over all, whoever dies. The engines
answer at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from batchllm.cli.serve_replicas import ServedReplicas
from batchllm.distributed.cluster import Resources
from batchllm.offline.jobs import Jobs
from batchllm.server import BatchOptions
from tests.distributed.conftest import HeldCluster
from tests.distributed.ray_engines import Deeds, asked_for, num_of, start
from tests.server.instant_server import Api

Serve = Callable[..., Api]


@pytest.fixture
def serve(cluster: HeldCluster, tmp_path: Path) -> Iterator[Serve]:
    """A server with two engines, which do what the keywords say (`Deeds`) and note it in ``engines``."""
    running: list[tuple[Api, ServedReplicas]] = []
    (tmp_path / "engines").mkdir()

    def start_server(**deeds: Any) -> Api:
        runtime = ServedReplicas(
            partial(start, Deeds(folder=str(tmp_path / "engines"), **deeds), None),
            cluster=cluster,
            resources=Resources(num_cpus=0, num_gpus=0),
            num_engines=2,
        )
        options = BatchOptions(storage=tmp_path / "storage", grace_s=0.2)
        api = Api(options, runtime, make_job=Jobs(runtime).make_job)  # type: ignore[arg-type]
        running.append((api, runtime))
        return api

    yield start_server
    for api, runtime in running:
        api.stop()
        runtime.end()


def _create(api: Api, first: int, num_rows: int) -> openai.types.Batch:
    """Rows in groups of ten; the last token of each is its number."""
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": [1, number // 10, 7, 8, number], "max_tokens": 1000},
        }
        for number in range(first, first + num_rows)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = api.client.files.create(file=("rows.jsonl", content), purpose="batch")
    return api.client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def _wait(api: Api, batch: openai.types.Batch) -> openai.types.Batch:
    deadline = time.monotonic() + 120
    while (found := api.client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def _check(api: Api, batch: openai.types.Batch, first: int, num_rows: int) -> None:
    """Every row of the batch has its own answer, once."""
    assert batch.status == "completed" and batch.output_file_id is not None
    records = [json.loads(line) for line in api.client.files.content(batch.output_file_id).text.splitlines()]
    texts = {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in records}
    assert texts == {str(number): f"after {number}" for number in range(first, first + num_rows)}
    assert len(records) == num_rows


def _is_begun(api: Api, batch: openai.types.Batch, num_rows: int) -> None:
    while (counts := api.client.batches.retrieve(batch.id).request_counts) is None or counts.completed < num_rows:
        time.sleep(0.02)


def test_a_small_batch_does_not_wait_for_the_end_of_a_large_one(serve: Serve) -> None:
    api = serve(delay_s=0.02)
    large = _create(api, 0, 600)
    _is_begun(api, large, 20)
    small = _create(api, 1000, 60)
    _check(api, _wait(api, small), 1000, 60)
    counts = api.client.batches.retrieve(large.id).request_counts
    assert counts is not None and counts.completed < 600


def test_batches_at_once_share_all_engines(serve: Serve, tmp_path: Path) -> None:
    api = serve(delay_s=0.01)
    first, second = _create(api, 0, 500), _create(api, 1000, 500)
    _check(api, _wait(api, first), 0, 500)
    _check(api, _wait(api, second), 1000, 500)
    asked = asked_for(tmp_path / "engines")
    assert len(asked) == 2 and all(rows.total() > 250 for rows in asked)


def test_engines_that_die_under_batches_at_once_cost_neither_a_row(serve: Serve, tmp_path: Path) -> None:
    """What was planned for them, of both, runs on the others and on those that take their places."""
    api = serve(delay_s=0.01, dies_after=100, num_deaths=2)
    first, second = _create(api, 0, 400), _create(api, 1000, 400)
    _check(api, _wait(api, first), 0, 400)
    _check(api, _wait(api, second), 1000, 400)
    assert num_of(tmp_path / "engines", "killed") == 2
