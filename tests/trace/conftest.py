"""Traces to test with: one small enough to know by heart, one as long as a run, and any at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from batchllm.trace import STEP_DTYPE, StepTrace

_SMALL = [
    # start, duration, host, prefill, decode, running, waiting, pinned, private, free, open, retracted, sampled, ...
    (1.0, 0.5, 0.1, 100, 0, 1, 5, 20, 30, 50, 1, 0, 1, 0, 0, 9, 8, 7),
    (1.5, 1.0, 0.2, 50, 3, 4, 4, 40, 50, 10, 2, 0, 1, 0, 0, 9, 8, 7),
    (2.5, 1.0, 0.3, 0, 4, 4, 2, 40, 60, 0, 2, 1, 1, 0, 0, 9, 8, 7),
    (3.5, 0.5, 0.1, 0, 2, 2, 0, 0, 10, 90, 0, 0, 1, 0, 0, 9, 8, 7),
]


@pytest.fixture(scope="session")
def small() -> StepTrace:
    """Four steps of a pool of 100 slots, 80 of which may be used."""
    return StepTrace(
        label="run rows.jsonl",
        kv_capacity_tokens=100,
        kv_limit_tokens=80,
        steps=np.array(_SMALL, dtype=STEP_DTYPE),
    )


@pytest.fixture(scope="session")
def long() -> StepTrace:
    """20,000 steps, the slots of whose pool are always pinned, private or free."""
    random = np.random.Generator(np.random.PCG64(0))
    steps = np.zeros(20_000, dtype=STEP_DTYPE)
    steps["duration_s"] = random.exponential(0.02, len(steps))
    steps["host_s"] = steps["duration_s"] / 10
    steps["start_s"] = np.cumsum(steps["duration_s"]) - steps["duration_s"]
    steps["num_prefill_tokens"] = random.integers(0, 4096, len(steps))
    steps["num_decode_tokens"] = random.integers(0, 256, len(steps))
    steps["num_running"] = random.integers(0, 300, len(steps))
    steps["num_waiting"] = random.integers(0, 1000, len(steps))
    steps["num_open_prefixes"] = random.integers(0, 20, len(steps))
    steps["kv_pinned_tokens"] = random.integers(0, 40_000, len(steps))
    steps["kv_private_tokens"] = random.integers(0, 50_000, len(steps))
    steps["kv_free_tokens"] = 100_000 - steps["kv_pinned_tokens"] - steps["kv_private_tokens"]
    return StepTrace(label="simulate", kv_capacity_tokens=100_000, kv_limit_tokens=90_000, steps=steps)


@st.composite
def _any_trace(draw: st.DrawFn) -> StepTrace:
    """Whatever a `StepTrace` may hold."""
    seconds = st.floats(min_value=0.0, max_value=1e9)
    fields = {"<f8": seconds, "<i4": st.integers(0, 2**31 - 1), "<i8": st.integers(0, 2**53)}
    row = st.tuples(*(fields[STEP_DTYPE[name].str] for name in STEP_DTYPE.names or ()))
    rows = sorted(draw(st.lists(row, max_size=12)))
    count = st.integers(0, 2**53)
    return StepTrace(
        label=draw(st.text(alphabet=st.characters())),
        kv_capacity_tokens=draw(count),
        kv_limit_tokens=draw(count),
        steps=np.array(rows, dtype=STEP_DTYPE),
    )


@pytest.fixture(scope="session")
def any_trace() -> st.SearchStrategy[StepTrace]:
    """Draws whatever a `StepTrace` may hold."""
    return _any_trace()
