"""Batches of a server on several engines in Ray actors: planned together, spread over all, whoever dies. The engines
answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch

from batchllm.cli.serve_replicas import ServedReplicas
from batchllm.distributed.cluster import Resources
from batchllm.offline.jobs import Jobs
from batchllm.server import BatchOptions
from tests.distributed.conftest import HeldCluster
from tests.distributed.ray_engines import Deeds, asked_for, num_of, start
from tests.server.api_rows import begin, check_each_row_once, counts_of, row, wait_for, wait_for_rows
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
        api = Api(options, runtime, make_job=Jobs(runtime).make_job)
        running.append((api, runtime))
        return api

    yield start_server
    for api, runtime in running:
        api.stop()
        runtime.end()


def _begin(api: Api, first: int, num_rows: int) -> Batch:
    return begin(api.client, [row(number, max_tokens=1000) for number in range(first, first + num_rows)])


def _check(api: Api, batch: Batch, first: int, num_rows: int) -> None:
    """The batch ends with an answer of its own to each row, once."""
    check_each_row_once(api.client, wait_for(api.client, batch.id, "completed"), num_rows, first=first)


def test_a_small_batch_does_not_wait_for_the_end_of_a_large_one(serve: Serve) -> None:
    api = serve(delay_s=0.02)
    large = _begin(api, 0, 600)
    wait_for_rows(api.client, large.id, 20)
    _check(api, _begin(api, 1000, 60), 1000, 60)
    assert counts_of(api.client.batches.retrieve(large.id))[1] < 600


def test_batches_at_once_share_all_engines(serve: Serve, tmp_path: Path) -> None:
    api = serve(delay_s=0.01)
    first, second = _begin(api, 0, 500), _begin(api, 1000, 500)
    _check(api, first, 0, 500)
    _check(api, second, 1000, 500)
    asked = asked_for(tmp_path / "engines")
    assert len(asked) == 2 and all(rows.total() > 250 for rows in asked)


def test_engines_that_die_under_batches_at_once_cost_neither_a_row(serve: Serve, tmp_path: Path) -> None:
    """What was planned for them, of both, runs on the others and on those that take their places."""
    api = serve(delay_s=0.01, dies_after=100, num_deaths=2)
    first, second = _begin(api, 0, 400), _begin(api, 1000, 400)
    _check(api, first, 0, 400)
    _check(api, second, 1000, 400)
    assert num_of(tmp_path / "engines", "killed") == 2
