"""Claims about when tokens of live requests are said to come."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from batchllm.srt.managers.live_latency import observe
from batchllm.trace.latency import LiveLatency


def _state(*, stream: bool = True) -> SimpleNamespace:
    return SimpleNamespace(obj=SimpleNamespace(stream=stream), time_stats=SimpleNamespace(created_time=100.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.s)
    return now


def test_the_first_token_and_those_behind_it_are_told_apart(clock: Any) -> None:
    """Several that come together share the time since the last."""
    latency, states = LiveLatency(), {"a": _state(), "b": _state()}
    for at, rids, num_tokens in ((102.0, ["a"], [1]), (103.0, ["a", "b"], [2, 1]), (105.0, ["a"], [6])):
        clock.s = at
        observe(latency, SimpleNamespace(rids=rids, completion_tokens=num_tokens), states)
    first, between = (window.summary(time.monotonic()) for window in (latency.first_token, latency.between_tokens))
    assert first.count == 2 and first.p50_s == pytest.approx(2.0, rel=0.05)
    assert first.p99_s == pytest.approx(3.0, rel=0.05)
    assert between.count == 5 and between.p50_s == pytest.approx(0.5, rel=0.05)
    assert between.p99_s == pytest.approx(1.0, rel=0.05)


def test_what_is_not_streamed_or_known_is_not_counted(clock: Any) -> None:
    """Nor an output without a token, or one of embeddings."""
    latency, states = LiveLatency(), {"whole": _state(stream=False), "a": _state()}
    clock.s = 101.0
    for output in (
        SimpleNamespace(rids=["whole", "gone"], completion_tokens=[50, 1]),
        SimpleNamespace(rids=["a"], completion_tokens=[0]),
        SimpleNamespace(rids=["a"]),
    ):
        observe(latency, output, states)
    assert latency.first_token.summary(time.monotonic()).count == 0
    assert latency.between_tokens.summary(time.monotonic()).count == 0
