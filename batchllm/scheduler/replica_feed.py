"""Which part of a plan each of several engines gets, and when: whoever has room takes the next units.

Units are in the order of their work, most first (`batchllm.planner.partition`). An engine takes as many as its window
has room for, about two KV pools' worth as in `feed_window`, but never more than its share of what is left: so a slow
one gets less by itself, and all end together.

Knows: the KV and the work that each position adds, where units begin, the KV limits of the engines. Must not know:
tokens, messages, time, why an engine is gone.
Invariant: a unit goes to one engine, each of its positions once, in plan order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchllm.scheduler.feed_window import MAX_IN_FLIGHT, REFILL_SHARE, WINDOW_POOLS
from batchllm.tokens import Int64Array, starts_of


@dataclass(slots=True)
class _Hand:
    """What one engine has.

    Attributes:
        window_cost: KV that may be on its way to it.
        cost: KV of what has been taken and has not finished.
        work: Work of that, and of what is left of its last unit.
        num_in_flight: Requests taken and not finished.
        rest: Positions of its last unit that have not been taken yet.
    """

    window_cost: int
    cost: int = 0
    work: float = 0.0
    num_in_flight: int = 0
    rest: tuple[int, int] = (0, 0)

    @property
    def has_rest(self) -> bool:
        return self.rest[0] < self.rest[1]


class ReplicaFeed:
    """Says which positions of a plan go to which engine next.

    Args:
        kv_cost: KV slots that each position is sure to add, int[num_requests].
        work: Work that each position is, float64[num_requests].
        bounds: First position of each unit, and the end, int64[num_units + 1].
        kv_limits: Slots of its KV pool that each engine may use, by its number. Engines that come into it later join;
            one that is no longer in it gets nothing more, and `lose` says what it has left.
        max_run_requests: Most requests that are taken together.
        max_in_flight: Most requests of one engine taken and not finished.

    Attributes:
        engine: The engine that took last in `take_next`.
    """

    def __init__(
        self,
        kv_cost: npt.NDArray[np.integer],
        work: npt.NDArray[np.float64],
        bounds: Int64Array,
        kv_limits: Mapping[int, int],
        *,
        max_run_requests: int = MAX_IN_FLIGHT,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._work, self._bounds = work, bounds
        self._cost_before = starts_of(kv_cost)
        self._work_before = np.append(0.0, np.cumsum(work))
        self._kv_limits = kv_limits
        self._max_run_requests, self._max_in_flight = max_run_requests, max_in_flight
        self._hands: dict[int, _Hand] = {}
        self._owner = np.full(len(kv_cost), -1, np.int32)
        self._next_unit = 0
        self.engine = -1

    @property
    def num_units_left(self) -> int:
        """Units that no engine has."""
        return len(self._bounds) - 1 - self._next_unit

    @property
    def is_done(self) -> bool:
        """Everything has been taken and has finished."""
        return not self.num_units_left and not any(h.num_in_flight or h.has_rest for h in self._hands.values())

    def has_work(self, engine: int) -> bool:
        """Whether an engine has something, or could still get something."""
        hand = self._hands.get(engine)
        return bool(self.num_units_left or (hand is not None and (hand.num_in_flight or hand.has_rest)))

    def take_next(self) -> tuple[int, int] | None:
        """Positions ``[first, last)`` for an engine that has room, the emptiest first; None where none has."""
        hands = [(self._hand(number), number) for number in list(self._kv_limits)]
        for _, number in sorted(hands, key=lambda item: (item[0].cost / item[0].window_cost, item[1])):
            if (taken := self.take(number)) is not None:
                self.engine = number
                return taken
        return None

    def take(self, engine: int) -> tuple[int, int] | None:
        """Positions ``[first, last)`` that an engine gets now; None while it has enough, or nothing is left."""
        hand = self._hand(engine)
        if hand.num_in_flight and not self._has_room(hand):
            return None
        if hand.has_rest:
            first, end = hand.rest
        elif self.num_units_left:
            first = int(self._bounds[self._next_unit])
            end = int(self._bounds[self._next_unit + self._num_fair_units(hand)])
        else:
            return None
        last = self._fitting(hand, first, end)
        if last <= first:
            return None
        if not hand.has_rest:
            self._assign(hand, first, last)
        hand.rest = (last, hand.rest[1])
        hand.num_in_flight += last - first
        hand.cost += int(self._cost_before[last] - self._cost_before[first])
        self._owner[first:last] = engine
        return first, last

    def finish(self, positions: Sequence[int] | Int64Array) -> None:
        """These have finished."""
        places = np.asarray(positions, np.int64)
        owners = self._owner[places]
        self._owner[places] = -1
        for number in np.unique(owners).tolist():
            hand, own = self._hands[number], places[owners == number]
            hand.num_in_flight -= len(own)
            hand.cost -= int((self._cost_before[own + 1] - self._cost_before[own]).sum())
            hand.work -= float(self._work[own].sum())

    def lose(self, engine: int) -> tuple[int, int]:
        """An engine is gone: positions ``[first, last)`` of its last unit that it was not given. Others cannot have
        them, since they may read what it has computed. What it was given is to be finished as ever.
        """
        hand = self._hands.get(engine)
        if hand is None:
            return 0, 0
        rest, hand.rest = hand.rest, (0, 0)
        hand.work -= float(self._work_before[rest[1]] - self._work_before[rest[0]])
        return rest

    def _hand(self, engine: int) -> _Hand:
        hand = self._hands.get(engine)
        if hand is None:
            hand = self._hands[engine] = _Hand(WINDOW_POOLS * self._kv_limits[engine])
        return hand

    def _has_room(self, hand: _Hand) -> bool:
        share = 1 - REFILL_SHARE
        return hand.cost <= share * hand.window_cost and hand.num_in_flight <= share * self._max_in_flight

    def _num_fair_units(self, hand: _Hand) -> int:
        """Units with which an engine has no more work than its share of all that is left; one, if it has nothing."""
        left = float(self._work_before[-1] - self._work_before[self._bounds[self._next_unit]])
        in_hand = sum(self._hands[number].work for number in self._kv_limits if number in self._hands)
        fair = (left + in_hand) / len(self._kv_limits) - hand.work
        start = self._work_before[self._bounds[self._next_unit]]
        end_position = int(np.searchsorted(self._work_before, start + fair * (1 + 1e-9), "right")) - 1
        end_unit = int(np.searchsorted(self._bounds, end_position, "right")) - 1
        return max(end_unit - self._next_unit, 0 if hand.num_in_flight else 1)

    def _fitting(self, hand: _Hand, first: int, end: int) -> int:
        """Position before which the window is full; one fits at least where nothing is in flight."""
        free = hand.window_cost - hand.cost
        last = int(np.searchsorted(self._cost_before, self._cost_before[first] + free, "right")) - 1
        last = min(last, first + self._max_run_requests, first + self._max_in_flight - hand.num_in_flight, end)
        return last if last > first or hand.num_in_flight or first == end else first + 1

    def _assign(self, hand: _Hand, first: int, last: int) -> None:
        """The units that begin in ``[first, last)`` are the engine's, the last one to its end."""
        self._next_unit = int(np.searchsorted(self._bounds, last, "left"))
        end = int(self._bounds[self._next_unit])
        hand.rest = (first, end)
        hand.work += float(self._work_before[end] - self._work_before[first])
