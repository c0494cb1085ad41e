"""The timeline: no step is lost, means and peaks are those of the steps, parts add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.trace import STEP_DTYPE, StepTrace
from batchllm.trace.timeline import MAX_BUCKETS, Timeline, downsample
from tests.sizes import sized

_PER_STEP = ("num_prefill_tokens", "num_decode_tokens", "duration_s", "host_s")
_KV = ("kv_pinned_tokens", "kv_private_tokens", "kv_free_tokens")


def _check(timeline: Timeline, trace: StepTrace) -> None:
    """Each bucket against the steps it says it has, one by one."""
    steps, begin = trace.steps, 0
    for bucket, num_steps in enumerate(timeline.num_steps.tolist()):
        inside = steps[begin : begin + num_steps]
        begin += num_steps
        assert timeline.edges_s[bucket] == inside["start_s"][0]
        weights = inside["duration_s"] if inside["duration_s"].sum() > 0 else np.ones(num_steps)
        for name in STEP_DTYPE.names or ():
            values = inside[name].astype(np.float64)
            mean = values.mean() if name in _PER_STEP else np.average(values, weights=weights)
            assert timeline.mean[name][bucket] == pytest.approx(mean, rel=1e-9)
            assert timeline.peak[name][bucket] == values.max()
    assert begin == len(steps)


def test_a_short_run_is_drawn_step_by_step(small: StepTrace) -> None:
    timeline = downsample(small.steps)
    assert timeline.is_exact
    assert timeline.edges_s.tolist() == [1.0, 1.5, 2.5, 3.5, 4.0]
    assert timeline.mean["kv_used_tokens"].tolist() == [50, 90, 100, 10]
    _check(timeline, small)


def test_a_long_run_is_drawn_in_stretches_of_about_equal_time(long: StepTrace) -> None:
    timeline = downsample(long.steps)
    assert not timeline.is_exact
    assert 0.9 * MAX_BUCKETS < timeline.num_buckets <= MAX_BUCKETS
    widest = np.diff(timeline.edges_s).max()
    assert widest < long.elapsed_s / MAX_BUCKETS + long.steps["duration_s"].max()
    _check(timeline, long)


def test_the_peak_of_a_sum_is_not_the_sum_of_peaks(small: StepTrace) -> None:
    steps = small.steps.copy()
    steps["num_prefill_tokens"], steps["num_decode_tokens"] = [9, 0, 0, 0], [0, 0, 5, 0]
    assert downsample(steps, max_buckets=1).peak["num_step_tokens"].tolist() == [9]


def test_pinned_private_and_free_add_up_to_the_capacity_in_each_bucket(long: StepTrace) -> None:
    timeline = downsample(long.steps)
    stack = sum(timeline.mean[name] for name in _KV)
    np.testing.assert_allclose(stack, long.kv_capacity_tokens, rtol=1e-12)


@settings(deadline=None, max_examples=sized(40, 100))
@given(data=st.data(), max_buckets=st.integers(1, 15))
def test_no_step_of_any_trace_is_lost(
    data: st.DataObject, any_trace: st.SearchStrategy[StepTrace], max_buckets: int
) -> None:
    trace = data.draw(any_trace)
    timeline = downsample(trace.steps, max_buckets)
    assert timeline.num_buckets <= max_buckets
    assert (timeline.num_steps > 0).all()
    assert len(timeline.edges_s) == timeline.num_buckets + 1
    assert (np.diff(timeline.edges_s) >= 0).all()
    assert timeline.num_steps.sum() == trace.num_steps
    for name in STEP_DTYPE.names or ():
        assert (timeline.mean[name] <= timeline.peak[name] * (1 + 1e-9)).all()
        assert timeline.peak[name].max(initial=0) == trace.steps[name].astype(np.float64).max(initial=0)


def test_steps_at_one_moment_are_one_bucket(small: StepTrace) -> None:
    steps = small.steps.copy()
    steps["start_s"], steps["duration_s"] = 7.0, 0.0
    timeline = downsample(steps, max_buckets=2)
    assert timeline.num_steps.tolist() == [4]
    assert timeline.mean["kv_pinned_tokens"].tolist() == [25]
    _check(timeline, replace(small, steps=steps))
