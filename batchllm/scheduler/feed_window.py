"""How much of a plan is submitted at any time: about two KV pools' worth of requests.

The scheduler never sees a million waiting requests, and the driver never holds a million tasks: what follows is
submitted as answers come back.

Knows: the KV that each position of the plan adds. Must not know: tokens, messages, steps, time.
Invariant: requests are submitted in plan order, each once, and the next is never held back while nothing runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batchllm.tokens import starts_of

# KV pools' worth of requests on their way. One is what runs; the other is what may start when it ends.
WINDOW_POOLS = 2
MAX_IN_FLIGHT = 8192
# More follows only when this share of the window is free, so that runs are long and messages few.
REFILL_SHARE = 0.25


class Feed(Protocol):
    """Says which positions of a plan come next: all of them to one engine, or to each of several its own."""

    @property
    def is_done(self) -> bool:
        """Nothing of it runs, and nothing more will come."""

    def take_next(self) -> tuple[int, int] | None:
        """Positions ``[first, last)`` that come now; None where none do."""

    def finish(self, positions: Sequence[int]) -> None:
        """These have finished."""


class FeedWindow:
    """Says which positions of a plan to submit next.

    Args:
        kv_cost: KV slots that each position is sure to add. int[num_requests]
        kv_capacity_tokens: Slots of the KV pool.
        max_run_requests: Most requests that are submitted together.
        max_in_flight: Most requests submitted and not finished.

    Attributes:
        num_in_flight: Requests submitted and not finished.
    """

    def __init__(
        self,
        kv_cost: npt.NDArray[np.integer],
        kv_capacity_tokens: int,
        *,
        max_run_requests: int = MAX_IN_FLIGHT,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._num_requests = len(kv_cost)
        self._cost_before = starts_of(kv_cost)
        self._window_cost = WINDOW_POOLS * kv_capacity_tokens
        self._max_run_requests, self._max_in_flight = max_run_requests, max_in_flight
        self._next_position = 0
        self._cost_in_flight = 0
        self.num_in_flight = 0

    @property
    def engine(self) -> int:
        """All goes to the same one."""
        return 0

    @property
    def is_done(self) -> bool:
        """Everything has been submitted and has finished."""
        return self._next_position == self._num_requests and self.num_in_flight == 0

    def take_next(self) -> tuple[int, int] | None:
        """Positions ``[first, last)`` to submit now; None while the window is full or nothing is left."""
        first = self._next_position
        if first == self._num_requests or not self._has_room():
            return None
        free_cost = self._window_cost - self._cost_in_flight
        last = int(np.searchsorted(self._cost_before, self._cost_before[first] + free_cost, "right")) - 1
        num_more = min(self._max_run_requests, self._max_in_flight - self.num_in_flight)
        last = min(last, first + num_more, self._num_requests)
        if last <= first:
            if self.num_in_flight:
                return None
            last = first + 1  # larger than the window by itself, and it has to run
        self._next_position = last
        self.num_in_flight += last - first
        self._cost_in_flight += int(self._cost_before[last] - self._cost_before[first])
        return first, last

    def finish(self, positions: Sequence[int]) -> None:
        """These have finished."""
        self.num_in_flight -= len(positions)
        places = np.asarray(positions, np.int64)
        self._cost_in_flight -= int((self._cost_before[places + 1] - self._cost_before[places]).sum())

    def lose(self, engine: int) -> tuple[int, int]:
        """Where there is one engine, its end is the end of the plan; nothing is left over for another one."""
        return 0, 0

    def _has_room(self) -> bool:
        if self.num_in_flight == 0:
            return True
        return (
            self._cost_in_flight <= (1 - REFILL_SHARE) * self._window_cost
            and self.num_in_flight <= (1 - REFILL_SHARE) * self._max_in_flight
        )
