"""Cuts a plan into runs, as much of it at a time as `FeedWindow` says."""

from __future__ import annotations

import numpy as np

from batchllm.planner.run import PlannedRun, RunCutter
from batchllm.scheduler.feed_window import MAX_IN_FLIGHT, FeedWindow
from batchllm.tokens import Int64Array

MAX_RUN_REQUESTS = MAX_IN_FLIGHT


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
        self._window = FeedWindow(
            cutter.kv_cost,
            kv_capacity_tokens,
            max_run_requests=max_run_requests,
            max_in_flight=MAX_IN_FLIGHT if max_in_flight is None else max_in_flight,
        )
        self._is_in_flight = np.zeros(len(cutter.kv_cost), bool)

    @property
    def num_in_flight(self) -> int:
        """Requests submitted and not finished."""
        return self._window.num_in_flight

    @property
    def is_done(self) -> bool:
        """Everything has been submitted and has finished."""
        return self._window.is_done

    def take_run(self) -> PlannedRun | None:
        """The next run to submit, or None while the window is full or nothing is left."""
        positions = self._window.take_next()
        if positions is None:
            return None
        self._is_in_flight[slice(*positions)] = True
        return self._cutter.cut(*positions)

    def finish(self, positions: list[int]) -> None:
        """These have finished."""
        self._is_in_flight[positions] = False
        self._window.finish(positions)

    def positions_in_flight(self) -> Int64Array:
        """Plan positions that have been submitted and have not finished, ascending."""
        return np.flatnonzero(self._is_in_flight)
