"""A bounded window of the plan is on its way at any time, in plan order, and everything gets its turn."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.scheduler.feed_window import FeedWindow
from tests.sizes import sized


def _window(prompt_lens: list[int], capacity: int, **options: int) -> FeedWindow:
    """Of prompts that share nothing, whose outputs may end at once: each costs its length and a token."""
    return FeedWindow(np.array(prompt_lens, np.int64) + 1, capacity, **options)


def test_the_first_run_fills_two_pools() -> None:
    window = _window([4] * 20, 20)  # 5 slots each
    assert window.take_next() == (0, 8)
    assert window.take_next() is None


def test_a_run_goes_out_only_when_a_quarter_of_the_window_is_free() -> None:
    window = _window([4] * 20, 20)
    window.take_next()
    window.finish([3])
    assert window.take_next() is None
    window.finish([0])
    assert window.take_next() == (8, 10)


def test_a_small_plan_goes_out_whole() -> None:
    window = _window([4] * 3, 1000)
    assert window.take_next() == (0, 3)
    assert window.take_next() is None


def test_a_request_larger_than_the_window_goes_out_alone() -> None:
    window = _window([50, 3, 3], 10)
    assert window.take_next() == (0, 1)
    assert window.take_next() is None
    window.finish([0])
    assert window.take_next() == (1, 3)


def test_a_request_that_exceeds_what_is_left_of_the_window_waits() -> None:
    window = _window([9, 4, 9], 10)  # 10, 5 and 10 slots; the window is 20
    assert window.take_next() == (0, 2)
    assert window.take_next() is None
    window.finish([1])
    assert window.take_next() == (2, 3)


def test_it_is_done_when_everything_has_finished_and_not_before() -> None:
    window = _window([4] * 3, 1000)
    assert not window.is_done
    window.take_next()
    window.finish([2, 0])
    assert not window.is_done
    window.finish([1])
    assert window.is_done


def test_an_empty_plan_is_done_at_once() -> None:
    window = _window([], 10)
    assert window.is_done
    assert window.take_next() is None


def test_nothing_finished_changes_nothing() -> None:
    window = _window([4] * 20, 20)
    window.take_next()
    window.finish([])
    assert window.take_next() is None


def test_the_number_of_requests_on_their_way_is_bounded_too() -> None:
    window = _window([1] * 20, 1000, max_in_flight=8)
    assert window.take_next() == (0, 8)
    window.finish([0])
    assert window.take_next() is None
    window.finish([5])
    assert window.take_next() == (8, 10)


_WORKLOADS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(_WORKLOADS, st.integers(1, 60), st.integers(0, 2**20))
@settings(deadline=None, max_examples=sized(60, 150), database=None)
def test_everything_goes_out_once_in_plan_order_whatever_finishes_first(
    prompt_lens: list[int], capacity: int, seed: int
) -> None:
    shuffle = random.Random(seed)
    window = _window(prompt_lens, capacity)
    submitted: list[int] = []
    outstanding: list[int] = []
    while not window.is_done:
        while (bounds := window.take_next()) is not None:
            assert bounds[0] < bounds[1]
            submitted += range(*bounds)
            outstanding += range(*bounds)
        assert outstanding, "nothing runs and nothing is sent"
        shuffle.shuffle(outstanding)
        num_finished = shuffle.randint(1, len(outstanding))
        window.finish(outstanding[:num_finished])
        del outstanding[:num_finished]
    assert submitted == list(range(len(prompt_lens)))
    assert outstanding == []


@given(_WORKLOADS, st.integers(1, 60), st.integers(0, 2**20))
@settings(deadline=None, max_examples=sized(60, 150), database=None)
def test_no_more_than_the_window_is_on_its_way_but_for_a_request_that_is_larger_itself(
    prompt_lens: list[int], capacity: int, seed: int
) -> None:
    shuffle = random.Random(seed)
    window = _window(prompt_lens, capacity)
    outstanding: list[int] = []
    while not window.is_done:
        while (bounds := window.take_next()) is not None:
            outstanding += range(*bounds)
            if len(outstanding) > 1:
                assert sum(prompt_lens[position] + 1 for position in outstanding) <= 2 * capacity
        done = outstanding.pop(shuffle.randrange(len(outstanding)))
        window.finish([done])
