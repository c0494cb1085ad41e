"""An event loop in a thread of its own, and asynchronous generators of it as ordinary iterators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from batchllm.errors import EngineDiedError

T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a thread of its own until it is closed.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what still runs, and end the thread. Doing it twice does nothing."""
        if self.loop.is_closed():
            return
        run_on(self.loop, _end_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _end_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


def iterate_on(loop: asyncio.AbstractEventLoop, stream: AsyncGenerator[T, None]) -> Iterator[T]:
    """An asynchronous generator as an ordinary iterator, driven on a loop that runs in another thread.

    It is closed when this returns, whatever interrupts the caller.

    Raises:
        EngineDiedError: The loop has been closed.
    """
    turn = asyncio.Lock()
    try:
        while items := run_on(loop, _next(stream, turn)):
            yield from items
    finally:
        run_on(loop, _close(stream, turn))


async def aiterate_on(loop: asyncio.AbstractEventLoop, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same for a caller on a loop of its own, which is not blocked meanwhile.

    Raises:
        EngineDiedError: The loop has been closed.
    """
    turn = asyncio.Lock()
    try:
        while items := await _arun_on(loop, _next(stream, turn)):
            for item in items:
                yield item
    finally:
        await asyncio.shield(_arun_on(loop, _close(stream, turn)))


def run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine that runs on a loop of another thread.

    Raises:
        EngineDiedError: The loop has been closed.
    """
    if loop.is_closed():
        coroutine.close()
        raise EngineDiedError("the engine has ended")
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()  # nothing, where it is the coroutine that raised
        raise


async def _arun_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    if loop.is_closed():
        coroutine.close()
        raise EngineDiedError("the engine has ended")
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop))


async def _next(stream: AsyncGenerator[T, None], turn: asyncio.Lock) -> list[T]:
    """The next item, or none at the end.

    Args:
        stream: A generator.
        turn: Held by the task that runs it: one that was cancelled holds it until the generator has cleaned up.
    """
    async with turn:
        try:
            return [await anext(stream)]
        except StopAsyncIteration:
            return []


async def _close(stream: AsyncGenerator[T, None], turn: asyncio.Lock) -> None:
    async with turn:
        await stream.aclose()
