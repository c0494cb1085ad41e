"""What programs ask, gathered into waves: who still runs, who waits, and when a wave goes off.

Knows threads that run programs, what they have asked and how much of it is under way. Must not know what is asked, who
answers, SGLang, or asyncio.

A wave is sent when nobody who runs could still add to it, and as much has gathered as is still being answered: so the
engine does not run dry while the last answers of a wave come in, and waves stay large, which is what sharing lives on.

INVARIANT: while something waits to be sent and a thread waits for an answer, there is always a leader, the one thread
that sends waves, and it never waits longer than `QUIET_S` for a program that neither asks nor ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_WAVE = 4096
"""Most asks of a wave, unless told otherwise."""

QUIET_S = 0.05
"""Programs that do nothing for so long (they sleep, or wait for something that is not ours) are not waited for."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Something asked. ``on_answer`` takes the answer, or the exception in its place; it must not raise."""

    body: Any
    on_answer: Callable[[Any], None]


@dataclass(slots=True, eq=False)
class Parked:
    """A thread that waits until ``is_ready``; ``is_counted`` where it counts as running when it does not."""

    is_ready: Callable[[], bool]
    is_counted: bool
    is_woken: bool = False
    event: threading.Event = field(default_factory=threading.Event)


class Waves:
    """The asks of all programs of a backend.

    Args:
        max_wave: Most asks of a wave.
        quiet_s: See `QUIET_S`.

    Attributes:
        lock: Guards everything here, and whatever an ``is_ready`` reads.
        lead: Runs on the thread of a leader; sends waves until what it is given says True. Set by who has the engine.
        on_change: Called, with the lock held and on any thread, when a wave may have become due. Must not block.
        num_sent: Asks sent so far.
        num_waves: Waves sent so far.
    """

    def __init__(self, max_wave: int = MAX_WAVE, quiet_s: float = QUIET_S) -> None:
        self.lock = threading.Lock()
        self.lead: Callable[[Callable[[], bool]], None] = lambda _: None
        self.on_change: Callable[[], None] = lambda: None
        self.num_sent = 0
        self.num_waves = 0
        self._max_wave = max_wave
        self._quiet_s = quiet_s
        self._pending: deque[Ask] = deque()
        self._num_in_flight = 0
        self._num_running = 0
        self._last_change = time.monotonic()
        self._is_led = False
        self._followers: list[Parked] = []
        self._thread = threading.local()

    # Who runs

    def reserve(self) -> None:
        """A program is about to run, on a thread that will `begin` it."""
        with self.lock:
            self._num_running += 1

    def begin(self, *, is_pooled: bool) -> None:
        """This thread runs a program that was reserved.

        Args:
            is_pooled: Another thread waits for it to end, and leads.
        """
        self._thread.is_counted = True
        self._thread.is_pooled = is_pooled

    def end(self) -> None:
        """This thread runs a program no more."""
        self._thread.is_counted = False
        self._thread.is_pooled = False
        with self.lock:
            self._num_running -= 1
            self.note()

    @property
    def is_in_program(self) -> bool:
        """This thread runs a program."""
        return getattr(self._thread, "is_counted", False)

    # Who waits

    def wait_for(self, waiters: list[Parked], is_ready: Callable[[], bool]) -> None:
        """Block until ``is_ready``, which is called with the lock held.

        Args:
            waiters: Where `wake`, called after every change that may make it ready, will look.
            is_ready: Must stay true once it is.
        """
        with self.lock:
            if is_ready():
                return
            parked = Parked(is_ready, self.is_in_program)
            waiters.append(parked)
            self._num_running -= parked.is_counted
            self.note()
        may_lead = not getattr(self._thread, "is_pooled", False)
        while not parked.is_woken:
            with self.lock:
                leads = may_lead and not self._is_led
                self._is_led |= leads
                if may_lead and not leads:
                    self._followers.append(parked)
            if leads:
                self._lead(waiters, parked)
            else:
                parked.event.wait()
                parked.event.clear()

    def _lead(self, waiters: list[Parked], parked: Parked) -> None:
        try:
            self.lead(lambda: parked.is_woken)
        finally:
            with self.lock:
                self._is_led = False
                if not parked.is_woken:  # interrupted: this thread runs on
                    waiters.remove(parked)
                    self._num_running += parked.is_counted
                while self._followers and (follower := self._followers.pop()):
                    if not follower.is_woken:
                        follower.event.set()
                        break

    def wake(self, waiters: list[Parked]) -> None:
        """Let those go on who are ready. Called with the lock held."""
        for parked in [parked for parked in waiters if parked.is_ready()]:
            waiters.remove(parked)
            # Counted here, not when it wakes: a decision in between must know that it runs.
            self._num_running += parked.is_counted
            parked.is_woken = True
            parked.event.set()
            self.on_change()

    def note(self) -> None:
        """Something has changed. Called with the lock held."""
        self._last_change = time.monotonic()
        if self._num_running == 0 or len(self._pending) in (1, self._max_wave):
            self.on_change()

    # What is asked

    def add(self, ask: Ask) -> None:
        """Take an ask into the next wave."""
        with self.lock:
            self._pending.append(ask)
            self.note()

    def take_wave(self) -> tuple[list[Ask], float | None]:
        """The wave that is due, which is then under way.

        Returns:
            The asks, none if it is not due yet; and after how many seconds to look again, None for only when something
            has changed.
        """
        with self.lock:
            num_pending = len(self._pending)
            if num_pending == 0:
                return [], None
            if num_pending < self._max_wave:
                quiet_left_s = self._last_change + self._quiet_s - time.monotonic()
                if self._num_running > 0 and quiet_left_s > 0:
                    return [], quiet_left_s
                if num_pending < self._num_in_flight:
                    return [], None
            wave = [self._pending.popleft() for _ in range(min(num_pending, self._max_wave))]
            self._num_in_flight += len(wave)
            self.num_sent += len(wave)
            self.num_waves += 1
            return wave, 0.0

    def deliver(self, ask: Ask, answer: Any) -> None:
        """Hand an answer, or an exception, to who has asked."""
        ask.on_answer(answer)
        with self.lock:
            self._num_in_flight -= 1
            self.note()
