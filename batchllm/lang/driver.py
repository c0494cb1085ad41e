"""Sends waves on an event loop and hands out the answers, for as long as somebody waits for one.

Knows an event loop that runs in a thread of its own, and a function that answers a wave. Must not know programs,
SGLang, or what an ask says.

INVARIANT: every ask that was taken gets exactly one answer, or an exception in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from batchllm.lang.waves import Ask, Waves
from batchllm.offline.event_loop import run_on

Answerer = Callable[[Sequence[Any]], AsyncIterator[tuple[int, Any]]]
"""Bodies in; pairs of (which body, its answer or an exception) out, in any order."""


class WaveDriver:
    """Sends `waves` on ``loop``. Answers under way go on when nobody waits.

    Args:
        waves: What is asked. Its ``lead`` and ``on_change`` are set.
        loop: Runs in a thread of its own.
        answer: Answers a wave.
    """

    def __init__(self, waves: Waves, loop: asyncio.AbstractEventLoop, answer: Answerer) -> None:
        self._waves = waves
        self._loop = loop
        self._answer = answer
        self._changed = asyncio.Event()
        self._is_signalled = False
        self._under_way: set[asyncio.Task[None]] = set()
        waves.lead = self._lead
        waves.on_change = self._on_change

    def _lead(self, is_done: Callable[[], bool]) -> None:
        run_on(self._loop, self._drive(is_done))

    def _on_change(self) -> None:
        if not self._is_signalled:
            self._is_signalled = True
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _drive(self, is_done: Callable[[], bool]) -> None:
        while True:
            self._changed.clear()
            self._is_signalled = False
            if is_done():
                return
            wave, look_again_s = self._waves.take_wave()
            if wave:
                task = asyncio.ensure_future(self._answer_wave(wave))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
                continue
            try:
                await asyncio.wait_for(self._changed.wait(), look_again_s)
            except TimeoutError:
                continue

    async def _answer_wave(self, wave: list[Ask]) -> None:
        missing = dict(enumerate(wave))
        failure: Exception = RuntimeError("the engine gave no answer")
        try:
            async for index, answer in self._answer([ask.body for ask in wave]):
                self._waves.deliver(missing.pop(index), answer)
        except Exception as error:  # whatever it was, the programs that wait must hear of it
            failure = error
        finally:  # cancelled, too: the engine is being ended
            for ask in missing.values():
                self._waves.deliver(ask, failure)
