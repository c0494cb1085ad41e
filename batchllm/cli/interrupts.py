"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends when it is closed.

Knows signals of this process, from its first line to its last; not what a command does. It imports nothing that takes
time: what comes meanwhile must be caught.

INVARIANT: a signal that comes while modules are imported is answered when they are there (an exception would get lost
in a module's own handlers, or leave half of it behind); one that comes when a command has ended changes nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

from batchllm.offline.stop import answered_signals

WORDS = "batchllm: interrupted\n"


class Interrupts:
    """What the signals of a command do."""

    def __init__(self) -> None:
        self._num_noted = 0

    def note(self) -> None:
        """From now on the first one is remembered, and the next one raises KeyboardInterrupt."""
        for number in answered_signals():
            signal.signal(number, self._note)

    def act(self) -> None:
        """From now on each raises KeyboardInterrupt, and so does this, if one was noted."""
        for number in answered_signals():
            signal.signal(number, interrupt)
        if self._num_noted:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """From now on none does anything: what is to be done has been done, or has been stopped."""
        for number in answered_signals():
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._num_noted += 1
        if self._num_noted > 1:
            raise KeyboardInterrupt


def interrupt(number: int, frame: FrameType | None) -> None:
    """End a command as Ctrl-C does: what has been answered is kept, and the engine is ended."""
    raise KeyboardInterrupt


def pass_on_hangup() -> None:
    """Have the end of the terminal be a SIGTERM, for whoever answers that and does not know the other."""
    if signal.SIGHUP in answered_signals():
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def tell() -> None:
    """Say that it was a signal, if that can be said."""
    with contextlib.suppress(OSError, AttributeError):  # it is gone, or closed
        sys.stderr.write(WORDS)
