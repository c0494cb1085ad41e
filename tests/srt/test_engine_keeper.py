"""Claims about a server that is asked to end while its engine is started again."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from batchllm.srt.entrypoints import engine_keeper
from batchllm.srt.entrypoints.engine_keeper import EngineKeeper


class LoadingProcess:
    """A scheduler that loads its model for ever, unless it is killed."""

    def __init__(self) -> None:
        self._is_dead = threading.Event()
        self.is_awaited = threading.Event()

    def kill(self) -> None:
        self._is_dead.set()

    def wait_for_ready(self) -> None:
        self.is_awaited.set()
        self._is_dead.wait()
        raise RuntimeError("the scheduler died during initialization")


class Processes:
    """Nothing was started before."""

    @contextlib.contextmanager
    def starting(self, server_args: Any) -> Iterator[None]:
        yield


def _manager() -> Any:
    return SimpleNamespace(
        on_death=None,
        has_given_weights=False,
        num_planned_answers=0,
        config_value=lambda name: name,
        fail_live=lambda reason: None,
        _subprocess_watchdog=None,
    )


def test_a_server_that_ends_does_not_wait_for_an_engine_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it take that one's end for a reason to end in another way, or starts the next."""
    monkeypatch.setattr(engine_keeper, "_LOOK_EVERY_S", 0.0)
    started: list[LoadingProcess] = []

    def launch(*args: Any) -> tuple[LoadingProcess, list[LoadingProcess]]:
        started.append(LoadingProcess())
        return started[-1], [started[-1]]

    monkeypatch.setattr(engine_keeper.Engine, "_launch_scheduler_processes", launch)
    monkeypatch.setattr(engine_keeper.Engine, "_launch_detokenizer_subprocesses", lambda **args: ([], []))
    num_ended: list[bool] = []

    async def end() -> None:
        num_ended.append(True)

    async def scenario() -> None:
        args: Any = SimpleNamespace(enable_lora=False, override=lambda *args, **values: None)
        processes: Any = Processes()
        keeper, manager = EngineKeeper(args, processes, end), _manager()
        keeper.watch(manager, None, asyncio.get_running_loop())
        manager.on_death()
        while not started or not started[0].is_awaited.is_set():
            await asyncio.sleep(0)
        keeper.stop()
        await asyncio.wait_for(asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()})), 60)
        assert not keeper.is_up

    asyncio.run(scenario())
    assert (len(started), num_ended) == (1, [])
