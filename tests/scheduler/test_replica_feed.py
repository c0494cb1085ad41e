"""Engines that take units of a plan: each once, no more than is fair, whoever comes and goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.scheduler.replica_feed import ReplicaFeed
from tests.sizes import sized

untimed = settings(deadline=None, max_examples=sized(100, 400))

units = st.lists(st.integers(1, 12), max_size=30)
"""Positions of each unit."""


def _feed(sizes: list[int], kv_limits: dict[int, int], max_in_flight: int = 1000, work: float = 1.0) -> ReplicaFeed:
    bounds = np.cumsum([0, *sizes]).astype(np.int64)
    num = int(bounds[-1])
    return ReplicaFeed(np.full(num, 10, np.int64), np.full(num, work), bounds, kv_limits, max_in_flight=max_in_flight)


def _unit_of(sizes: list[int]) -> list[int]:
    return np.repeat(np.arange(len(sizes)), sizes).tolist()


@untimed
@given(units, st.integers(1, 4), st.data())
def test_each_position_is_taken_once_in_order_and_a_unit_by_one_engine(
    sizes: list[int], num_engines: int, data: st.DataObject
) -> None:
    """Whatever finishes when: every engine is at the end without anything, and nothing is left."""
    feed = _feed(sizes, dict.fromkeys(range(num_engines), 100))
    taken: dict[int, list[int]] = {number: [] for number in range(num_engines)}
    in_flight: list[int] = []
    while not feed.is_done:
        if (bounds := feed.take_next()) is not None:
            positions = range(*bounds)
            taken[feed.engine] += positions
            in_flight += positions
            continue
        num = data.draw(st.integers(1, len(in_flight)))
        feed.finish(in_flight[:num])
        in_flight = in_flight[num:]
    assert not in_flight and not any(feed.has_work(number) for number in range(num_engines))
    assert sorted(position for positions in taken.values() for position in positions) == list(range(sum(sizes)))
    assert all(positions == sorted(positions) for positions in taken.values())
    unit_of = _unit_of(sizes)
    units_of = [{unit_of[position] for position in positions} for positions in taken.values()]
    assert sum(map(len, units_of)) == len(sizes)


@untimed
@given(units, st.integers(1, 3), st.integers(1, 5))
def test_an_engine_never_has_more_in_flight_than_it_may(sizes: list[int], num_engines: int, most: int) -> None:
    """That of one engine, not of all: rows that are suspected run so many at a time on each."""
    feed = _feed(sizes, dict.fromkeys(range(num_engines), 10_000), max_in_flight=most)
    in_flight: dict[int, list[int]] = {number: [] for number in range(num_engines)}
    while not feed.is_done:
        while (bounds := feed.take_next()) is not None:
            in_flight[feed.engine] += range(*bounds)
        assert all(len(positions) <= most for positions in in_flight.values())
        for number, positions in in_flight.items():
            feed.finish(positions[:1])
            in_flight[number] = positions[1:]


def test_a_window_is_two_pools_and_refilled_when_a_quarter_of_it_is_free() -> None:
    feed = _feed([1] * 100, {0: 100})
    assert feed.take(0) == (0, 20)
    feed.finish(range(4))
    assert feed.take(0) is None
    feed.finish([4])
    assert feed.take(0) == (20, 25)


def test_an_engine_takes_no_more_than_its_share_of_what_is_left() -> None:
    """Ten units of a row are left for two engines, each of which could hold them all: five and five."""
    feed = _feed([1] * 10, {0: 1000, 1: 1000})
    assert feed.take(0) == (0, 5)
    assert feed.take(1) == (5, 10)


def test_a_slow_engine_gets_less() -> None:
    """One finishes three times as many as the other: it gets about three times as many."""
    feed = _feed([1] * 400, {0: 50, 1: 50})
    in_flight: dict[int, list[int]] = {0: [], 1: []}
    num_taken = {0: 0, 1: 0}
    while not feed.is_done:
        for number, speed in ((0, 3), (1, 1)):
            if (bounds := feed.take(number)) is not None:
                in_flight[number] += range(*bounds)
                num_taken[number] += bounds[1] - bounds[0]
            feed.finish(in_flight[number][:speed])
            in_flight[number] = in_flight[number][speed:]
    assert 2.7 < num_taken[0] / num_taken[1] < 3.3


def test_an_engine_that_comes_late_gets_its_share() -> None:
    kv_limits = {0: 50}
    feed = _feed([1] * 100, kv_limits)
    assert feed.take_next() == (0, 10) and feed.engine == 0
    assert feed.take_next() is None
    kv_limits[7] = 50
    assert feed.take_next() == (10, 20) and feed.engine == 7


def test_what_a_lost_engine_had_begun_is_for_nobody_else() -> None:
    """The rest of its unit is given back by position, its requests in flight are finished, and the others go on."""
    kv_limits = {0: 50, 1: 50}
    feed = _feed([30, 5, 5], kv_limits)
    assert feed.take(0) == (0, 10)
    del kv_limits[0]
    feed.finish(range(10))
    assert feed.lose(0) == (10, 30)
    assert feed.take_next() == (30, 40) and feed.engine == 1
    feed.finish(range(30, 40))
    assert feed.is_done


def test_an_engine_that_was_given_nothing_leaves_nothing() -> None:
    kv_limits = {0: 50, 1: 50}
    feed = _feed([2, 2], kv_limits)
    del kv_limits[1]
    assert feed.lose(1) == (0, 0)
    assert feed.take_next() == (0, 4)


@pytest.mark.parametrize("kv_limit", [1, 15])
def test_a_request_larger_than_the_window_runs_alone(kv_limit: int) -> None:
    feed = _feed([3], {0: kv_limit})
    num = 0
    while not feed.is_done:
        bounds = feed.take_next()
        assert bounds is not None and feed.take_next() is None
        feed.finish(range(*bounds))
        num += 1
    assert num == (3 if kv_limit == 1 else 1)
