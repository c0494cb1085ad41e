"""Walks a plan and keeps a bounded window of it submitted.

The scheduler never sees a million waiting requests, and the driver never holds a million tasks: about twice
what the KV pool can hold is on its way at any time, and more follows as answers come back.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchllm.planner.run import PlannedRun, RunCutter

# KV pools' worth of requests on their way. One is what runs; the other is what may start when it ends.
_WINDOW_POOLS = 2
_MAX_WINDOW_REQUESTS = MAX_RUN_REQUESTS = 8192
# Refill only when this share of the window is free, so that runs are long and messages few.
_REFILL_SHARE = 0.25


class Feeder:
    """Cuts the next run whenever enough of the window is free.

    Args:
        cutter: Of the plan to walk.
        kv_capacity_tokens: Slots of the KV pool.
        max_run_requests: Most requests of one run.
        max_in_flight: Most requests submitted and not finished; None for as many as serve throughput.
    """

    def __init__(
        self,
        cutter: RunCutter,
        kv_capacity_tokens: int,
        max_run_requests: int = MAX_RUN_REQUESTS,
        *,
        max_in_flight: int | None = None,
    ) -> None:
        self._cutter = cutter
        self._max_run_requests = max_run_requests
        self._max_in_flight = _MAX_WINDOW_REQUESTS if max_in_flight is None else max_in_flight
        self._cumulative_cost = np.zeros(len(cutter.kv_cost) + 1, np.int64)
        np.cumsum(cutter.kv_cost, out=self._cumulative_cost[1:])
        self._num_requests = len(cutter.kv_cost)
        self._window_cost = _WINDOW_POOLS * kv_capacity_tokens
        self._next_position = 0
        self._is_in_flight = np.zeros(self._num_requests, bool)
        self.num_in_flight = 0
        """Requests submitted and not finished."""
        self._cost_in_flight = 0

    @property
    def is_done(self) -> bool:
        """Everything has been submitted and has finished."""
        return self._next_position == self._num_requests and self.num_in_flight == 0

    def take_run(self) -> PlannedRun | None:
        """The next run to submit, or None while the window is full or nothing is left."""
        first = self._next_position
        if first == self._num_requests or not self._has_room():
            return None
        free_cost = self._window_cost - self._cost_in_flight
        last = int(np.searchsorted(self._cumulative_cost, self._cumulative_cost[first] + free_cost, "right"))
        num_more = min(self._max_run_requests, self._max_in_flight - self.num_in_flight)
        last = min(last - 1, first + num_more, self._num_requests)
        if last == first:
            if self.num_in_flight > 0:
                return None
            last = first + 1  # larger than the window by itself, and it has to run
        self._next_position = last
        self._is_in_flight[first:last] = True
        self.num_in_flight += last - first
        self._cost_in_flight += int(self._cumulative_cost[last] - self._cumulative_cost[first])
        return self._cutter.cut(first, last)

    def finish(self, positions: list[int]) -> None:
        """These have finished."""
        self._is_in_flight[positions] = False
        self.num_in_flight -= len(positions)
        self._cost_in_flight -= int(self._cutter.kv_cost[positions].sum())

    def positions_in_flight(self) -> npt.NDArray[np.int64]:
        """Plan positions that have been submitted and have not finished, ascending."""
        return np.flatnonzero(self._is_in_flight)

    def _has_room(self) -> bool:
        if self.num_in_flight == 0:
            return True
        return (
            self._cost_in_flight <= (1 - _REFILL_SHARE) * self._window_cost
            and self.num_in_flight <= (1 - _REFILL_SHARE) * self._max_in_flight
        )
