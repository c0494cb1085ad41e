"""How much of the engine must batches have beside live requests, so that they end within their completion windows?

Knows counts of rows and seconds; not requests, KV, or how the engine keeps the share.

INVARIANT: the share is within `LEAST` and `MOST`, and `LEAST` while every batch is on time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

LEAST, MOST = 1 / 8, 3 / 4
"""Of what live and planned requests compete for. `LEAST` is what batches have anyhow."""
_SPARE = 0.05
"""Part of a window that is to be left when its batch is done."""
_LEAST_SPAN_S, _MOST_SPAN_S = 20.0, 600.0
_SPANS = 20
"""A rate is measured over this part of the seconds left, within the two: rows of a group end together, and a batch that
stands still for a minute of a day is not late."""
_LOOKS = 4
"""In a span, after each of which the share changes; by less than twice, since a share does not tell its rate."""


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a batch is.

    Attributes:
        batch_id: Which.
        num_done: Rows that have a result.
        num_left: Rows that have none.
        window_s: Its completion window.
        seconds_left: Of that.
    """

    batch_id: str
    num_done: int
    num_left: int
    window_s: float
    seconds_left: float

    @property
    def span_s(self) -> float:
        """Seconds over which its rate is measured."""
        return min(max(self.seconds_left / _SPANS, _LEAST_SPAN_S), _MOST_SPAN_S)


@dataclass(slots=True)
class Deadlines:
    """Raises the share while a batch is late, and lowers it again.

    Attributes:
        share: The part that planned requests are to have at least.
    """

    share: float = LEAST
    _seen: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)
    _next_s: float = 0.0

    def update(self, now_s: float, advances: Iterable[Advance]) -> float:
        """The share from now on.

        Args:
            now_s: On a clock that does not jump.
            advances: Of every batch whose rows run.
        """
        advances = list(advances)
        if now_s < self._next_s and all(advance.batch_id in self._seen for advance in advances):
            return self.share
        self._next_s = now_s + min([advance.span_s for advance in advances], default=_LEAST_SPAN_S) / _LOOKS
        self._seen = {a.batch_id: self._seen.get(a.batch_id, deque()) for a in advances}
        needed = max([self._needed(now_s, advance) for advance in advances], default=0.0)
        self.share = min(max(self.share * min(max(needed, 0.8), 1.5), LEAST), MOST)
        return self.share

    def _needed(self, now_s: float, advance: Advance) -> float:
        """The rate that it needs, by its rate; 0 while that is not known."""
        seen = self._seen[advance.batch_id]
        seen.append((now_s, advance.num_done))
        while len(seen) > 2 and now_s - seen[1][0] >= advance.span_s:
            seen.popleft()
        since, num_before = seen[0]
        if not advance.num_left or now_s - since < advance.span_s / 2:
            return 0.0
        rate = (advance.num_done - num_before) / (now_s - since)
        return advance.num_left / max(rate * (advance.seconds_left - _SPARE * advance.window_s), 1e-9)
