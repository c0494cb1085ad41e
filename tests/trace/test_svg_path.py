"""Coordinates: axes map where they should, ticks are round and in place, paths are the step functions given."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.trace.svg_path import (
    BOX_HEIGHT,
    BOX_WIDTH,
    Axis,
    count_ticks,
    decade_ticks,
    duration_text,
    linear_axis,
    log_axis,
    step_band,
    step_line,
    time_ticks,
)


def test_low_is_at_the_left_and_at_the_bottom() -> None:
    axis = Axis(10.0, 20.0)
    values = np.array([10.0, 15.0, 20.0])
    assert axis.x(values).tolist() == [0, BOX_WIDTH // 2, BOX_WIDTH]
    assert axis.y(values).tolist() == [BOX_HEIGHT, BOX_HEIGHT // 2, 0]


def test_a_logarithmic_axis_gives_each_decade_the_same_length() -> None:
    axis = log_axis([np.array([0.0, 0.002]), np.array([0.5])])
    assert (axis.low, axis.high) == (1e-3, 1.0)
    assert axis.parts(np.array([1e-3, 1e-2, 1e-1, 1.0])) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [(round(tick.part, 6), tick.text) for tick in decade_ticks(axis)] == [
        (0.0, "1 ms"),
        (0.333333, "10 ms"),
        (0.666667, "100 ms"),
        (1.0, "1 s"),
    ]


def test_what_lies_outside_an_axis_goes_to_its_nearer_end() -> None:
    assert Axis(1.0, 2.0).parts(np.array([0.0, 3.0])).tolist() == [0.0, 1.0]
    assert Axis(1.0, 10.0, is_log=True).parts(np.array([0.0, 1e300])).tolist() == [0.0, 1.0]


def test_a_logarithmic_axis_has_at_most_six_decades_and_at_least_one() -> None:
    assert log_axis([np.array([1e-300, 2.0])]) == Axis(1e-5, 10.0, is_log=True)
    assert log_axis([np.array([1.0])]) == Axis(0.1, 1.0, is_log=True)
    assert log_axis([np.array([5e-324])]) == Axis(1e-12, 1e-6, is_log=True)
    assert log_axis([np.zeros(3), np.zeros(0)]) == Axis(1e-3, 1e-2, is_log=True)


@pytest.mark.parametrize(
    ("high", "texts"),
    [
        (1.0, ["0", "1"]),
        (8.0, ["0", "2", "4", "6", "8"]),
        (1_500.0, ["0", "500", "1,000", "1,500"]),
        (4_200.0, ["0", "1k", "2k", "3k", "4k"]),
        (2_600_000.0, ["0", "0.5M", "1.0M", "1.5M", "2.0M", "2.5M"]),
    ],
)
def test_counts_have_round_ticks(high: float, texts: list[str]) -> None:
    assert [tick.text for tick in count_ticks(Axis(0.0, high))] == texts


@pytest.mark.parametrize(
    ("low", "high", "first", "last"),
    [
        (0.0, 5e-6, "0.0 µs", "5.0 µs"),
        (1.5, 1.51, "1,500 ms", "1,510 ms"),
        (0.0, 90.0, "0 s", "90 s"),
        (100.0, 1_000.0, "2 min", "16 min"),
        (0.0, 36_000.0, "0 h", "10 h"),
    ],
)
def test_times_have_round_ticks_in_one_unit(low: float, high: float, first: str, last: str) -> None:
    ticks = time_ticks(Axis(low, high))
    assert (ticks[0].text, ticks[-1].text) == (first, last)
    assert 3 < len(ticks) <= 11


def test_short_times_have_their_unit() -> None:
    assert [duration_text(value) for value in (12.0, 0.0125, 1e-3, 1e-5, 2e-9)] == [
        "12 s",
        "12.5 ms",
        "1 ms",
        "10 µs",
        "2 ns",
    ]


@given(high=st.floats(min_value=0.0, max_value=1e20))
def test_ticks_of_any_counts_are_few_distinct_and_on_the_axis(high: float) -> None:
    ticks = count_ticks(linear_axis(high))
    assert 1 <= len(ticks) <= 7
    assert len({tick.text for tick in ticks}) == len(ticks)
    assert all(0 <= tick.part <= 1 for tick in ticks)


@given(low=st.floats(min_value=0.0, max_value=1e9), span=st.floats(min_value=1e-6, max_value=1e9))
def test_ticks_of_any_times_are_few_and_on_the_axis(low: float, span: float) -> None:
    ticks = time_ticks(Axis(low, low + span))
    assert len(ticks) <= 12
    assert all(0 <= tick.part <= 1 for tick in ticks)


def _corners(path: str) -> list[tuple[int, int]]:
    """The points a path goes through."""
    x = y = 0
    corners = []
    for command, numbers in re.findall(r"([MLHVZ])([\d ]*)", path):
        values = [int(number) for number in numbers.split()]
        if command in "ML":
            x, y = values
        elif command == "H":
            (x,) = values
        elif command == "V":
            (y,) = values
        corners.append((x, y))
    return corners


def test_a_line_holds_each_value_to_the_next_edge() -> None:
    path = step_line(np.array([0, 10, 20, 30]), np.array([5, 7, 7]))
    assert _corners(path) == [(0, 5), (10, 5), (10, 7), (30, 7)]


def test_a_band_goes_along_the_top_and_back_along_the_bottom() -> None:
    path = step_band(np.array([0, 10, 20]), np.array([9, 8]), np.array([5, 4]))
    assert path.endswith("Z")
    assert _corners(path)[:-1] == [(0, 5), (10, 5), (10, 4), (20, 4), (20, 8), (10, 8), (10, 9), (0, 9)]


def test_nothing_is_an_empty_path() -> None:
    edges, none = np.array([0]), np.zeros(0, dtype=np.int64)
    assert step_line(edges, none) == step_band(edges, none, none) == ""
