"""How long live requests wait for their tokens: counts by length of time, of the last minutes only.

Knows seconds and counts; not requests, and no clock: whoever adds a time says when it was.

INVARIANT: memory is the same for any number of times; a percentile is within 5 % of one that was added, from 0.1 ms to
1,000 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

_LEAST_S = 1e-4
_RATIO = 1.1
"""Of two neighbouring edges: the middle of a bucket is at most 5 % from all that is in it."""
_NUM_BUCKETS = math.ceil(math.log(1e3 / _LEAST_S) / math.log(_RATIO))
WINDOW_S = 300.0
_NUM_SLOTS = 30


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Times of a window: how many, and which half and 99 of 100 do not exceed, in seconds (0 of none)."""

    count: int
    p50_s: float
    p99_s: float


class LatencyWindow:
    """Times of the last `WINDOW_S` seconds, give or take a thirtieth. One thread adds, any may read."""

    def __init__(self) -> None:
        self._counts = np.zeros((_NUM_SLOTS, _NUM_BUCKETS), np.int64)
        self._slot_of = np.full(_NUM_SLOTS, -1, np.int64)

    def add(self, seconds: float, *, now_s: float, count: int = 1) -> None:
        """Count a time.

        Args:
            seconds: The time; what is outside of the range goes to its end.
            now_s: When it ended, on a clock that never goes back.
            count: How often it is counted.
        """
        number = int(now_s * _NUM_SLOTS / WINDOW_S)
        slot = number % _NUM_SLOTS
        if self._slot_of[slot] != number:
            self._counts[slot] = 0
            self._slot_of[slot] = number
        bucket = int(math.log(max(seconds, _LEAST_S) / _LEAST_S) / math.log(_RATIO))
        self._counts[slot, min(bucket, _NUM_BUCKETS - 1)] += count

    def summary(self, now_s: float) -> LatencySummary:
        """What was added in the window that ends now."""
        number = int(now_s * _NUM_SLOTS / WINDOW_S)
        counts = self._counts[self._slot_of > number - _NUM_SLOTS].sum(axis=0)
        return LatencySummary(int(counts.sum()), _percentile(counts, 0.5), _percentile(counts, 0.99))


@dataclass(frozen=True, slots=True)
class LiveLatency:
    """What streamed live requests wait: for their first token, and from each token to the next."""

    first_token: LatencyWindow = field(default_factory=LatencyWindow)
    between_tokens: LatencyWindow = field(default_factory=LatencyWindow)


def _percentile(counts: np.ndarray[tuple[int], np.dtype[np.int64]], part: float) -> float:
    total = int(counts.sum())
    if not total:
        return 0.0
    bucket = int(np.searchsorted(np.cumsum(counts), math.ceil(part * total)))
    return float(_LEAST_S * _RATIO ** (bucket + 0.5))
