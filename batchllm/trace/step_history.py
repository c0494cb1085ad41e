"""The last steps of a process that never ends.

INVARIANT: memory is that of `MAX_STEPS` steps and one message; steps are in the order in which they were added.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from batchllm.trace.steps import STEP_DTYPE, StepArray

MAX_STEPS = 16_384


class StepHistory:
    """Keeps the last `MAX_STEPS` steps that were added. Any thread may add and read."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._parts: deque[StepArray] = deque()
        self._num_steps = 0

    def add(self, steps: StepArray) -> None:
        """Add steps, `STEP_DTYPE` ``[num_steps]``, that ran after those that are here."""
        if not len(steps):
            return
        with self._turn:
            self._parts.append(steps)
            self._num_steps += len(steps)
            while self._num_steps - len(self._parts[0]) >= MAX_STEPS:
                self._num_steps -= len(self._parts.popleft())

    def recent(self) -> StepArray:
        """The last steps, a copy, `STEP_DTYPE` ``[at most MAX_STEPS]``."""
        with self._turn:
            parts = list(self._parts)
        recent: StepArray = np.concatenate([np.zeros(0, STEP_DTYPE), *parts])[-MAX_STEPS:]
        return recent
