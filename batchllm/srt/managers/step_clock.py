"""When steps begin and end: by the host's clock, or by the device's where it runs behind the host. Runs in the
scheduler's process.

(Upstream: ``srt/utils/device_timer.py``, which the runners of SGLang wrap around each forward pass.)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch


class StepClock(Protocol):
    """A mark is a point in time that may still lie ahead.

    Attributes:
        forward: Where the last forward pass began.
    """

    forward: Any

    def start_forward(self) -> None:
        """A forward pass is about to be launched."""

    def mark(self) -> Any:
        """Behind everything that was launched so far."""

    def is_past(self, mark: Any) -> bool:
        """Whether the time of a mark is known."""

    def seconds(self, first: Any, last: Any) -> float:
        """Seconds between two marks that are past."""


class HostClock:
    """A clock for devices on which launching a forward pass waits for its end."""

    forward = 0.0

    def start_forward(self) -> None:
        self.forward = self.mark()

    def mark(self) -> float:
        return time.monotonic()

    def is_past(self, mark: float) -> bool:
        return True

    def seconds(self, first: float, last: float) -> float:
        return last - first


class DeviceClock:
    """Events on the stream of the forward passes: nobody waits for them.

    It is a ``device_timer`` of SGLang's model runner, which says where each forward pass begins. Of a decode step in a
    graph that is before its attention is planned.

    Args:
        stream: The stream of forward passes; None for the current one.
        timer: SGLang's own ``DeviceTimer``, which goes on beside this; None if there is none.
    """

    forward: torch.cuda.Event

    def __init__(self, stream: Any, timer: Any) -> None:
        self._stream = stream
        self._timer = timer

    @contextlib.contextmanager
    def wrap(self, metadata: dict[str, Any]) -> Iterator[None]:
        """Around a forward pass. (Upstream: ``DeviceTimer.wrap``.)"""
        self.forward = self.mark()
        with contextlib.nullcontext() if self._timer is None else self._timer.wrap(metadata):
            yield

    def start_forward(self) -> None:
        # In case the pass is of a kind that SGLang does not time.
        self.forward = self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return float(first.elapsed_time(last)) / 1e3


def step_clock(scheduler: Any) -> StepClock:
    """The clock of a scheduler's steps, the device's where it has one; called when all of the scheduler is there."""
    runner = scheduler.tp_worker.model_runner
    if torch.device(runner.device).type != "cuda":
        return HostClock()
    clock = DeviceClock(scheduler.forward_stream if scheduler.enable_overlap else None, runner.device_timer)
    runner.device_timer = clock
    return clock
