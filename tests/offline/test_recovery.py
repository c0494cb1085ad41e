"""Whatever rows kill an engine, everything else gets its result, and nothing innocent is blamed for long."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import EngineDiedError
from batchllm.offline.recovery import (
    MAX_DEATHS_ALONE,
    MAX_FRUITLESS_DEATHS,
    NUM_NARROW,
    RestartLimit,
    Work,
    WorkQueue,
)
from tests.sizes import sized


class Engine:
    """Runs rows a window at a time; dies when a poisonous one runs, and now and then without a reason."""

    def __init__(self, poison: set[int], chance: float, seed: int) -> None:
        self.poison = poison
        self.chance = chance
        self.random = random.Random(seed)
        self.num_deaths = 0

    def run(self, rows: list[int], window: int) -> tuple[list[int], list[int] | None]:
        """The rows that finished, and those in flight at its death, if it died."""
        finished: list[int] = []
        waiting = list(rows)
        flying: list[int] = []
        while waiting or flying:
            while waiting and len(flying) < window:
                flying.append(waiting.pop(0))
            row = self.random.choice(flying[: 1 + len(flying) // 4])
            if row in self.poison or self.random.random() < self.chance:
                self.num_deaths += 1
                return finished, flying
            flying.remove(row)
            finished.append(row)
        return finished, None


def _run_all(num_rows: int, engine: Engine) -> tuple[set[int], set[int]]:
    """Rows that finished and rows that were given up, each once."""
    queue = WorkQueue([Work(rows=None)])
    finished: set[int] = set()
    failed: set[int] = set()
    while (work := queue.take()) is not None:
        rows = list(range(num_rows)) if work.rows is None else work.rows.tolist()
        assert not finished & set(rows) and not failed & set(rows), "a row with a result runs again"
        done, flying = engine.run(rows, work.max_in_flight or 1000)
        finished.update(done)
        if flying is None:
            assert set(done) == set(rows)
            continue
        unfinished = np.array([row for row in rows if row not in finished])
        given_up = queue.split_after_death(work, unfinished, np.array(flying))
        assert work.max_in_flight == 1 or not given_up
        failed.update(given_up)
    return finished, failed


@settings(max_examples=sized(80, 200), deadline=None)
@given(
    num_rows=st.integers(1, 400),
    poison=st.sets(st.integers(0, 399), max_size=5),
    seed=st.integers(0, 1000),
)
def test_exactly_the_rows_that_kill_are_given_up(num_rows: int, poison: set[int], seed: int) -> None:
    """Each costs at most four engines: one unsuspecting, one among few, two alone."""
    poison = {row for row in poison if row < num_rows}
    engine = Engine(poison, 0.0, seed)
    finished, failed = _run_all(num_rows, engine)
    assert failed == poison
    assert finished == set(range(num_rows)) - poison
    assert engine.num_deaths <= (2 + MAX_DEATHS_ALONE) * len(poison)


@settings(max_examples=sized(50, 100), deadline=None)
@given(num_rows=st.integers(1, 300), seed=st.integers(0, 1000))
def test_deaths_without_a_reason_lose_no_row(num_rows: int, seed: int) -> None:
    """Every row has a result in the end, whatever dies; only rows that were alone at two deaths can be blamed."""
    engine = Engine(set(), 0.02, seed)
    finished, failed = _run_all(num_rows, engine)
    assert finished | failed == set(range(num_rows))
    assert not finished & failed
    assert len(failed) <= engine.num_deaths // MAX_DEATHS_ALONE


def test_the_suspects_run_few_at_a_time_and_last_alone() -> None:
    queue = WorkQueue([Work(rows=None)])
    work = queue.take()
    assert work is not None and work.max_in_flight is None
    assert queue.split_after_death(work, np.arange(10, 1000), np.arange(5, 200)) == []
    narrow = queue.take()
    assert narrow is not None and narrow.rows is not None
    assert (narrow.rows.tolist(), narrow.max_in_flight) == (list(range(10, 200)), NUM_NARROW)
    assert queue.split_after_death(narrow, np.arange(50, 200), np.array([60, 61])) == []
    others = queue.take()
    assert others is not None and others.rows is not None and others.max_in_flight == NUM_NARROW
    assert 60 not in others.rows and 199 in others.rows
    rest = queue.take()
    assert rest is not None and rest.max_in_flight is None
    alone = queue.take()
    assert alone is not None and alone.rows is not None
    assert (alone.rows.tolist(), alone.max_in_flight) == ([60, 61], 1)
    assert queue.take() is None


def test_pauses_grow_until_a_row_finishes_and_then_begin_anew() -> None:
    limit = RestartLimit()
    death = EngineDiedError("gone")
    assert [limit.next_pause_s(death) for _ in range(3)] == [1.0, 2.0, 4.0]
    limit.answered()
    assert limit.next_pause_s(death) == 1.0
    assert limit.num_deaths == 4


def test_an_engine_that_dies_again_and_again_without_a_result_ends_the_job() -> None:
    limit = RestartLimit()
    for _ in range(MAX_FRUITLESS_DEATHS - 1):
        limit.next_pause_s(EngineDiedError("gone"))
        limit.condemned()  # of engines that never answered anything, no row is to blame
    with pytest.raises(EngineDiedError, match=rf"{MAX_FRUITLESS_DEATHS} times in a row.*gone"):
        limit.next_pause_s(EngineDiedError("gone"))


def test_rows_found_to_kill_engines_do_not_end_a_job_whose_engines_answer() -> None:
    limit = RestartLimit()
    limit.answered()
    for _ in range(10 * MAX_FRUITLESS_DEATHS):
        for _ in range(MAX_DEATHS_ALONE):
            limit.next_pause_s(EngineDiedError("gone"))
        limit.condemned()
