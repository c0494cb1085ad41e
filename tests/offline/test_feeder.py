"""A bounded window of the plan is on its way at any time, in plan order, and everything gets its turn."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.offline.feeder import Feeder
from batchllm.planner import plan_batch
from batchllm.planner.run import PlannedRun, RunCutter
from batchllm.tokens import TokenTable
from tests.sizes import sized


def _cutter(prompt_lens: list[int], max_new_len: int = 1) -> RunCutter:
    """Prompts that share nothing: each costs its length and ``max_new_len``."""
    table = TokenTable.from_lists([[i] * length for i, length in enumerate(prompt_lens)])
    return RunCutter(plan_batch(table), table, np.full(len(prompt_lens), max_new_len, np.int64))


def _positions(run: PlannedRun | None) -> list[int]:
    assert run is not None
    return list(range(run.first_position, run.first_position + len(run)))


def test_the_first_run_fills_two_pools() -> None:
    feeder = Feeder(_cutter([4] * 20), kv_capacity_tokens=20)  # 5 slots each
    assert _positions(feeder.take_run()) == list(range(8))
    assert feeder.take_run() is None


def test_a_run_goes_out_only_when_a_quarter_of_the_window_is_free() -> None:
    feeder = Feeder(_cutter([4] * 20), kv_capacity_tokens=20)
    feeder.take_run()
    feeder.finish([3])
    assert feeder.take_run() is None
    feeder.finish([0])
    assert _positions(feeder.take_run()) == [8, 9]


def test_a_small_plan_goes_out_whole() -> None:
    feeder = Feeder(_cutter([4] * 3), kv_capacity_tokens=1000)
    assert _positions(feeder.take_run()) == [0, 1, 2]
    assert feeder.take_run() is None


def test_a_request_larger_than_the_window_goes_out_alone() -> None:
    feeder = Feeder(_cutter([50, 3, 3]), kv_capacity_tokens=10)
    assert _positions(feeder.take_run()) == [0]
    assert feeder.take_run() is None
    feeder.finish([0])
    assert _positions(feeder.take_run()) == [1, 2]


def test_a_request_that_exceeds_what_is_left_of_the_window_waits() -> None:
    feeder = Feeder(_cutter([9, 4, 9]), kv_capacity_tokens=10)  # 10, 5 and 10 slots; the window is 20
    assert _positions(feeder.take_run()) == [0, 1]
    assert feeder.take_run() is None
    feeder.finish([1])
    assert _positions(feeder.take_run()) == [2]


def test_it_is_done_when_everything_has_finished_and_not_before() -> None:
    feeder = Feeder(_cutter([4] * 3), kv_capacity_tokens=1000)
    assert not feeder.is_done
    feeder.take_run()
    feeder.finish([2, 0])
    assert not feeder.is_done
    feeder.finish([1])
    assert feeder.is_done


def test_an_empty_plan_is_done_at_once() -> None:
    feeder = Feeder(_cutter([]), kv_capacity_tokens=10)
    assert feeder.is_done
    assert feeder.take_run() is None


def test_nothing_finished_changes_nothing() -> None:
    feeder = Feeder(_cutter([4] * 20), kv_capacity_tokens=20)
    feeder.take_run()
    feeder.finish([])
    assert feeder.take_run() is None


def test_the_number_of_requests_on_their_way_is_bounded_too() -> None:
    feeder = Feeder(_cutter([1] * 20), kv_capacity_tokens=1000, max_in_flight=8)
    assert _positions(feeder.take_run()) == list(range(8))
    feeder.finish([0])
    assert feeder.take_run() is None
    feeder.finish([5])
    assert _positions(feeder.take_run()) == [8, 9]


_WORKLOADS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(_WORKLOADS, st.integers(1, 60), st.integers(0, 2**20))
@settings(deadline=None, max_examples=sized(60, 150), database=None)
def test_everything_goes_out_once_in_plan_order_whatever_finishes_first(
    prompt_lens: list[int], capacity: int, seed: int
) -> None:
    shuffle = random.Random(seed)
    cutter = _cutter(prompt_lens, max_new_len=3)
    feeder = Feeder(cutter, capacity)
    submitted: list[int] = []
    outstanding: list[int] = []
    while not feeder.is_done:
        while (run := feeder.take_run()) is not None:
            assert len(run) > 0
            submitted += _positions(run)
            outstanding += _positions(run)
        assert outstanding, "nothing runs and nothing is sent"
        shuffle.shuffle(outstanding)
        num_finished = shuffle.randint(1, len(outstanding))
        feeder.finish(outstanding[:num_finished])
        del outstanding[:num_finished]
    assert submitted == list(range(len(prompt_lens)))
    assert outstanding == []


@given(_WORKLOADS, st.integers(1, 60), st.integers(0, 2**20))
@settings(deadline=None, max_examples=sized(60, 150), database=None)
def test_no_more_than_the_window_is_on_its_way_but_for_a_request_that_is_larger_itself(
    prompt_lens: list[int], capacity: int, seed: int
) -> None:
    shuffle = random.Random(seed)
    cutter = _cutter(prompt_lens, max_new_len=3)
    feeder = Feeder(cutter, capacity)
    outstanding: list[int] = []
    while not feeder.is_done:
        while (run := feeder.take_run()) is not None:
            outstanding += _positions(run)
            if len(outstanding) > 1:
                assert cutter.kv_cost[outstanding].sum() <= 2 * capacity
        done = outstanding.pop(shuffle.randrange(len(outstanding)))
        feeder.finish([done])
