"""Steps by their clock: what they took, whose time it was, and that nobody waits for a device to know."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from batchllm.srt.managers import step_recorder
from batchllm.srt.managers.step_clock import DeviceClock, HostClock, step_clock
from batchllm.srt.managers.step_recorder import StepRecorder
from batchllm.trace.steps import checked_steps


class _Clock:
    """A device that is as far as it is told: marks are seconds on it, known when it is past them."""

    forward = 0.0

    def __init__(self) -> None:
        self.launched = self.reached = 0.0

    def start_forward(self) -> None:
        self.forward = self.launched

    def mark(self) -> float:
        return self.launched

    def is_past(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, first: float, last: float) -> float:
        assert self.is_past(last)
        return last - first


_BATCH = SimpleNamespace(
    forward_mode=SimpleNamespace(is_extend=lambda: False),
    reqs=[1, 2],
    decoding_reqs=None,
    seq_lens_cpu=torch.tensor([5, 7]),
)
_SCHEDULER: Any = SimpleNamespace(
    tree_cache=SimpleNamespace(ledger=SimpleNamespace(num_pinned_tokens=0, num_open=0)),
    planned_window=[],
    max_total_num_tokens=100,
)


@pytest.fixture(autouse=True)
def _all_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_recorder, "free_kv_tokens", lambda _: 100)


def _run(recorder: StepRecorder, clock: _Clock, host: float, forward: float) -> None:
    recorder.begin(_SCHEDULER, _BATCH)
    clock.launched += host
    clock.start_forward()
    clock.launched += forward
    recorder.end()


def test_steps_are_taken_when_the_device_has_done_them() -> None:
    """With the time that it stood still before each; one follows the other without a gap until there is a pause."""
    clock = _Clock()
    recorder = StepRecorder(None, clock)
    _run(recorder, clock, 0.5, 2.0)
    _run(recorder, clock, 0.0, 1.0)
    assert len(recorder.take_steps()) == 0
    clock.reached = 2.5
    first = recorder.take_steps()
    assert first["duration_s"].tolist() == [2.5] and first["host_s"].tolist() == [0.5]
    _run(recorder, clock, 0.25, 0.75)
    clock.reached = clock.launched
    rest = recorder.take_steps()
    assert rest["duration_s"].tolist() == [1.0, 1.0] and rest["host_s"].tolist() == [0.0, 0.25]
    _run(recorder, clock, 0.0, 1.0)  # ended a request in vain, and nobody asked for it
    recorder.pause()
    _run(recorder, clock, 0.0, 1.0)
    clock.reached = clock.launched
    steps = np.concatenate([first, rest, recorder.take_steps()])
    checked_steps(steps)
    assert np.allclose(steps["start_s"][1:3], steps["start_s"][:2] + steps["duration_s"][:2])
    assert steps["kv_read_tokens"].tolist() == [12] * 4
    assert steps["num_live_decode_tokens"].tolist() == [2] * 4  # neither is a planned request


def test_the_host_s_clock_adds_up_to_the_time_that_passed() -> None:
    """Where nobody runs ahead, all between two forward passes is the host's."""
    recorder = StepRecorder(None, HostClock())
    began = time.monotonic()
    for _ in range(3):
        recorder.begin(_SCHEDULER, _BATCH)
        time.sleep(0.01)  # the forward pass
        recorder.end()
    ended = time.monotonic()
    steps = checked_steps(recorder.take_steps())
    assert steps["start_s"][0] >= began
    assert float(steps["start_s"][-1] + steps["duration_s"][-1]) <= ended + 1e-6
    assert (steps["duration_s"] - steps["host_s"] >= 0.01).all()


def test_a_device_s_clock_takes_the_place_of_sglang_s_timer_and_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded on the stream of the forward passes; where there is no device, none are."""
    recorded: list[Any] = []
    event = SimpleNamespace(record=recorded.append, query=lambda: True, elapsed_time=lambda other: 1500.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    entered: list[Any] = []

    class Timer:
        def wrap(self, metadata: Any) -> Any:
            entered.append(metadata)
            return torch.no_grad()

    runner = SimpleNamespace(device="cuda", device_timer=Timer())
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner), forward_stream="stream", enable_overlap=True
    )
    clock = step_clock(scheduler)
    assert isinstance(clock, DeviceClock) and runner.device_timer is clock
    with clock.wrap({"category": "decode"}):
        pass
    assert entered == [{"category": "decode"}] and recorded == ["stream"]
    assert clock.forward is event and clock.is_past(event) and clock.seconds(event, event) == 1.5
    runner.device = "cpu"
    assert isinstance(step_clock(scheduler), HostClock)
