"""SGLang's own scheduler with a clock around its forward pass; writes what it saw when it ends.

Stock's side of `bench_step_cost.py`: a subclass that adds two clock readings to a step and changes nothing.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import sglang.srt.managers.scheduler as upstream
import stock

ENVIRONMENT = "STEP_TIMER_OUT"
_SAVE_EVERY = 200
Scheduler = upstream.Scheduler


class TimedScheduler(Scheduler):
    """Rows of ``(host seconds, waiting, rows, is prefill)`` per step."""

    def init_running_status(self) -> None:
        super().init_running_status()
        self.timed_steps: list[tuple[float, int, int, bool]] = []
        self.last_end: float | None = None

    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        if self.last_end is not None:
            row = (now - self.last_end, len(self.waiting_queue), len(batch.reqs), batch.forward_mode.is_extend())
            self.timed_steps.append(row)
            if len(self.timed_steps) % _SAVE_EVERY == 0:
                self.save()
        result = super().run_batch(batch, *args, **kwargs)
        self.last_end = time.monotonic()
        return result

    def save(self) -> None:
        np.save(os.environ[ENVIRONMENT], np.array(self.timed_steps, dtype=float))

    def on_idle(self) -> None:
        if self.last_end is not None:
            self.save()
        self.last_end = None
        super().on_idle()


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process."""
    upstream.Scheduler = TimedScheduler
    stock.run_scheduler_process(*args, **kwargs)
