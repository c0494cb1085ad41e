"""Claims about times that live requests wait: percentiles, the window, and a bounded size."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.trace.latency import WINDOW_S, LatencySummary, LatencyWindow
from batchllm.trace.step_history import MAX_STEPS, StepHistory
from batchllm.trace.steps import STEP_DTYPE
from tests.sizes import sized


@given(times=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=300))
@settings(max_examples=sized(50, 2000), deadline=None)
def test_percentiles_are_near_those_of_the_times(times: list[float]) -> None:
    """Within 5 % of the time that is at that place."""
    window = LatencyWindow()
    for seconds in times:
        window.add(seconds, now_s=10.0)
    found = window.summary(10.0)
    assert found.count == len(times)
    ordered = sorted(times)
    for percent, value in ((50, found.p50_s), (99, found.p99_s)):
        exact = ordered[-(-percent * len(times) // 100) - 1]
        assert abs(value / exact - 1) < 0.0501


def test_a_time_counts_as_often_as_it_is_told() -> None:
    window = LatencyWindow()
    window.add(0.01, now_s=0.0, count=99)
    window.add(1.0, now_s=0.0, count=101)
    found = window.summary(0.0)
    assert found.count == 200 and found.p50_s > 0.9


def test_times_leave_the_window() -> None:
    """None is older than the window, and most of it is there."""
    window = LatencyWindow()
    for second in range(1000):
        window.add(1.0, now_s=float(second))
    assert 0.9 * WINDOW_S <= window.summary(999.0).count <= WINDOW_S
    assert window.summary(999.0 + 2 * WINDOW_S) == LatencySummary(0, 0.0, 0.0)


def test_times_outside_of_the_range_go_to_its_ends() -> None:
    window = LatencyWindow()
    window.add(0.0, now_s=0.0)
    assert 0 < window.summary(0.0).p99_s < 2e-4
    window.add(1e9, now_s=0.0)
    assert 900 < window.summary(0.0).p99_s < 1100


def test_a_history_keeps_the_last_steps() -> None:
    history = StepHistory()
    assert len(history.recent()) == 0
    for first in range(0, 40_000, 100):
        steps = np.zeros(100, STEP_DTYPE)
        steps["num_running"] = np.arange(first, first + 100)
        history.add(steps)
    assert history.recent()["num_running"].tolist() == list(range(40_000 - MAX_STEPS, 40_000))
