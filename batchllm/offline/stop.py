"""Ctrl-C, SIGTERM and SIGHUP, or a word from another thread, as a request that the work under way can answer.

Knows signals of this process; not what it works on.

INVARIANT: outside `StopSignal.heeded` a signal ends the process as Ctrl-C does; inside it the first two are only noted.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PATIENCE_S = 5.0
"""After an exception, what it ends has so long to clean up: who presses Ctrl-C often would else interrupt just that."""


def answered_signals() -> list[signal.Signals]:
    """Those of them that are answered: whoever ignores SIGHUP for us (nohup) wants us to outlive the terminal."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


class StopSignal:
    """The first signal asks to stop when what runs has finished, the second one to stop now.

    Args:
        grace_s: Seconds that what runs may take to finish after the first.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.name: str | None = None
        """Name of the signal that came, if one did."""
        self._asked_at = 0.0
        self._num_signals = 0
        self._raised_at = -math.inf
        self._is_heeded = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_set(self) -> bool:
        """A signal has come."""
        return self.name is not None

    @property
    def is_overdue(self) -> bool:
        """What runs has had its time: ``grace_s`` are over, or a second signal has come."""
        return self._num_signals > 1 or (self.is_set and time.monotonic() - self._asked_at >= self.grace_s)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """In here somebody looks at `is_set` and `is_overdue`: no exception comes in the middle of anything.

        Except at the third signal, when nobody seems to look.
        """
        self._is_heeded = True
        try:
            yield
        finally:
            self._is_heeded = False

    def ask(self, name: str) -> None:
        """Asks as a signal of that name would; from any thread."""
        self._asked_at = self._asked_at if self.is_set else time.monotonic()
        self._num_signals += 1
        self.name = name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        now = time.monotonic()
        if (not self._is_heeded or self._num_signals > 2) and now - self._raised_at >= _PATIENCE_S:
            self._raised_at = now
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in answered_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
