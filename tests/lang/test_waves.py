"""When a wave goes off."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from batchllm.lang.driver import WaveDriver
from batchllm.lang.waves import Ask, Parked, Waves

PATIENT_S = 1000.0


def _add(waves: Waves, count: int) -> list[Ask]:
    asks = [Ask(number, lambda _: None) for number in range(count)]
    for ask in asks:
        waves.add(ask)
    return asks


def _take(waves: Waves) -> list[Any]:
    return [ask.body for ask in waves.take_wave()[0]]


def test_nothing_asked_is_no_wave_and_no_reason_to_look_again() -> None:
    assert Waves().take_wave() == ([], None)


def test_a_wave_waits_for_programs_that_run_and_says_how_long() -> None:
    waves = Waves(quiet_s=PATIENT_S)
    waves.reserve()
    _add(waves, 3)
    wave, look_again_s = waves.take_wave()
    assert wave == [] and look_again_s is not None and 0 < look_again_s <= PATIENT_S
    waves.begin(is_pooled=True)
    waves.end()
    assert _take(waves) == [0, 1, 2]


def test_a_program_that_does_nothing_is_not_waited_for() -> None:
    waves = Waves(quiet_s=0.0)
    waves.reserve()
    _add(waves, 3)
    assert _take(waves) == [0, 1, 2]


def test_a_full_wave_waits_for_nobody() -> None:
    waves = Waves(max_wave=4, quiet_s=PATIENT_S)
    waves.reserve()
    _add(waves, 9)
    assert [_take(waves) for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], []]


@pytest.mark.parametrize("num_answered", range(11))
def test_the_next_wave_goes_when_as_much_waits_as_is_still_under_way(num_answered: int) -> None:
    waves = Waves(quiet_s=PATIENT_S)
    asks = _add(waves, 10)
    assert len(_take(waves)) == 10
    for ask in asks[:num_answered]:
        waves.deliver(ask, None)
    _add(waves, num_answered)
    assert len(_take(waves)) == (num_answered if num_answered >= 5 else 0)


def test_a_thread_that_is_woken_counts_as_running_at_once() -> None:
    """Between the answer and the moment its thread runs again, no wave may leave without it."""
    waves = Waves(quiet_s=PATIENT_S)
    waves.reserve()
    waiters: list[Parked] = []
    is_there: list[bool] = []
    has_gone_on = threading.Event()

    def program() -> None:
        waves.begin(is_pooled=True)
        waves.wait_for(waiters, lambda: bool(is_there))
        has_gone_on.wait()
        waves.end()

    thread = threading.Thread(target=program)
    thread.start()
    _add(waves, 1)
    while not (wave := waves.take_wave()[0]):
        pass  # until the program waits
    _add(waves, 1)
    waves.deliver(wave[0], None)
    with waves.lock:
        is_there.append(True)
        waves.wake(waiters)
    assert _take(waves) == []
    has_gone_on.set()
    thread.join()
    assert len(_take(waves)) == 1


def test_asks_of_a_wave_that_is_cancelled_hear_of_it() -> None:
    """Whoever waits for an answer would wait for ever when the engine is ended under it."""

    async def never(bodies: Any) -> AsyncIterator[tuple[int, Any]]:
        yield 0, "the first"
        await asyncio.sleep(3600)

    async def run() -> list[Any]:
        waves, got = Waves(10), []
        driver = WaveDriver(waves, asyncio.get_running_loop(), never)
        for number in range(2):
            waves.add(Ask(number, got.append))
        task = asyncio.create_task(driver._answer_wave(waves.take_wave()[0]))
        while not got:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return got

    first, second = asyncio.run(run())
    assert first == "the first"
    assert isinstance(second, RuntimeError)
