"""The last steps of a process that never ends.

INVARIANT: memory is that of `MAX_STEPS` steps; steps are in the order in which they were added.
"""

from __future__ import annotations

import threading

import numpy as np

from batchllm.trace.steps import STEP_DTYPE, StepArray

MAX_STEPS = 16_384


class StepHistory:
    """Keeps the last `MAX_STEPS` steps that were added. Any thread may add and read."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        # A copy: each array that comes from another process has a type of its own, larger than a step.
        self._steps: StepArray = np.zeros(MAX_STEPS, STEP_DTYPE)
        self._num_added = 0

    def add(self, steps: StepArray) -> None:
        """Add steps, `STEP_DTYPE` ``[num_steps]``, that ran after those that are here."""
        kept = steps[-MAX_STEPS:]
        with self._turn:
            self._num_added += len(steps)
            places = np.arange(self._num_added - len(kept), self._num_added) % MAX_STEPS
            self._steps[places] = kept

    def recent(self) -> StepArray:
        """The last steps, a copy, `STEP_DTYPE` ``[at most MAX_STEPS]``."""
        with self._turn:
            first = max(0, self._num_added - MAX_STEPS)
            recent: StepArray = self._steps[np.arange(first, self._num_added) % MAX_STEPS]
        return recent
