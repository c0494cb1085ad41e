"""`BatchStage` on tables in memory, on an engine that answers at once: what goes in, what comes out, what may fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import orjson
import pyarrow as pa
import pytest

from batchllm.dataset import ColumnMap
from batchllm.errors import ConfigError, EngineDiedError
from batchllm.offline.fake_runtime import FakeJob, FakeRequest
from batchllm.offline.runtime import RunRequests
from batchllm.ray import BatchStage
from tests.cli.instant_engine import ABORTED, InstantRuntime, Settings

POISON = 998
Stage = Callable[..., BatchStage]


class _Engine(InstantRuntime):
    """Dies of `POISON`, and once after some answers where that is asked for."""

    num_started = 0
    dies_after = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        type(self).num_started += 1
        self._is_up = True
        super().__init__(Settings(batch=2))

    def open_job(self) -> int:
        if not self._is_up:
            raise EngineDiedError("it has been shut down")
        return super().open_job()

    def shutdown(self) -> None:
        self._is_up = False

    def submit(self, job_id: int, requests: RunRequests) -> None:
        super().submit(job_id, requests)
        if POISON in [request.prompt[-1] for request in self.jobs[job_id].outstanding.values()]:
            raise EngineDiedError("it was poison")

    def choose(self, job: FakeJob) -> list[FakeRequest]:
        if self.dies_after and self.num_answered >= self.dies_after:
            type(self).dies_after = 0
            raise EngineDiedError("it is dead")
        return super().choose(job)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    _Engine.num_started = _Engine.dies_after = 0
    monkeypatch.setattr(BatchStage, "start_engine", staticmethod(_Engine))
    monkeypatch.setattr("batchllm.offline.recovery._FIRST_PAUSE_S", 0.0)
    return BatchStage


def _table(*last_ids: Any, **columns: Any) -> pa.Table:
    ids = [None if last is None else [7, last] for last in last_ids]
    return pa.table({"id": [f"r{i}" for i in range(len(ids))], "input_ids": ids, **columns})


def test_rows_come_out_in_their_places_as_lines_of_run(stage: Stage) -> None:
    made = stage()(_table(20, 10, 30))
    assert made["id"].to_pylist() == ["r0", "r1", "r2"]
    assert made["text"].to_pylist() == ["after 20", "after 10", "after 30"]
    assert made["prompt_tokens"].to_pylist() == [2, 2, 2]
    lines = [orjson.loads(line) for line in made["record"].to_pylist()]
    assert [line["text"] for line in lines] == ["after 20", "after 10", "after 30"]


def test_a_bad_row_fails_alone_with_its_code(stage: Stage) -> None:
    made = stage()(_table(20, None, 10_000, ABORTED, 30))
    assert made["error_code"].to_pylist() == [None, "missing_prompt", "token_id_out_of_range", "aborted", None]
    assert made["text"].to_pylist() == ["after 20", None, None, None, "after 30"]
    assert made["id"].to_pylist() == [f"r{i}" for i in range(5)]


def test_a_row_without_an_id_fails_and_the_others_go_on(stage: Stage) -> None:
    made = stage()(pa.table({"id": ["a", None], "input_ids": [[1], [2]]}))
    assert made["error_code"].to_pylist() == [None, "missing_id"]
    assert made["text"].to_pylist() == ["after 1", None]


def test_carried_columns_keep_their_types_and_a_taken_name_is_told_apart(stage: Stage) -> None:
    table = _table(20, 30, score=pa.array([1.5, None], pa.float32()), text=["x", "y"], tags=[["a"], []])
    made = stage(columns=ColumnMap(carry=("score", "text", "tags")))(table)
    assert made.schema.field("score").type == pa.float32() and made["score"].to_pylist() == [1.5, None]
    assert made["carried.text"].to_pylist() == ["x", "y"] and made["text"].to_pylist() == ["after 20", "after 30"]
    assert made["tags"].to_pylist() == [["a"], []]
    assert orjson.loads(made["record"][0].as_py())["carried"] == {"score": 1.5, "text": "x", "tags": ["a"]}


def test_the_types_of_a_batch_do_not_depend_on_its_rows(stage: Stage) -> None:
    run = stage()
    good, bad, none = run(_table(20)), run(_table(None)), run(_table(20).slice(0, 0))
    assert good.schema == bad.schema == none.schema
    assert none.num_rows == 0


def test_the_engine_stays_from_batch_to_batch(stage: Stage) -> None:
    run = stage()
    for _ in range(3):
        run(_table(20, None))
    run(_table(None))
    assert _Engine.num_started == 1


def test_an_engine_that_dies_is_replaced_and_each_row_is_answered(stage: Stage) -> None:
    run = stage()
    _Engine.dies_after = 4
    assert run(_table(*range(10, 30)))["text"].to_pylist() == [f"after {i}" for i in range(10, 30)]
    assert run(_table(20))["text"].to_pylist() == ["after 20"]
    assert _Engine.num_started == 2
    assert run.last_report is not None and run.last_report.num_engine_restarts == 0


def test_a_row_that_kills_engines_fails_by_name(stage: Stage) -> None:
    made = stage()(_table(20, POISON, 30))
    assert made["error_code"].to_pylist() == [None, "engine_died", None]


def test_what_is_drawn_depends_on_the_id_and_not_on_the_place(stage: Stage) -> None:
    """Ray Data may run a unit again, and another plan may have other units."""
    run = stage()
    table = _table(20, 30)
    reversed_rows = table.take([1, 0])
    seeds = [{row.given_id: row.request.sampling.seed for row in run._rows(some)} for some in (table, reversed_rows)]
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 2
    other = {row.given_id: row.request.sampling.seed for row in stage(random_seed=1)._rows(table)}
    assert set(other.values()).isdisjoint(seeds[0].values())


def test_what_is_no_table_and_a_table_without_prompts_are_refused_with_a_remedy(stage: Stage) -> None:
    with pytest.raises(ConfigError, match='batch_format="pyarrow"'):
        stage()({"id": ["a"]})
    with pytest.raises(ConfigError, match="has no column prompt"):
        stage()(pa.table({"id": ["a"], "x": [1]}))
    with pytest.raises(ConfigError, match="sampling: "):
        stage(sampling={"temperature": -1})


def test_nothing_is_left_on_disk(stage: Stage, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stage()(_table(20, 30))
    assert os.listdir(tmp_path) == []
