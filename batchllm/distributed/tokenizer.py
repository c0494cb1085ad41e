"""Text to tokens on several engines: each takes a part, so that the driver does none of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from batchllm.distributed.cluster import ClusterLostError
from batchllm.distributed.replica import Replica
from batchllm.errors import EngineDiedError, EngineError
from batchllm.host.tokenizer import RemoteTokenizer
from batchllm.offline.event_loop import run_on

_MIN_PART = 64
"""Texts below which a part is not worth a message of its own."""
_PAUSE_S = 1.0
_MAX_PAUSES = 60


class SpreadTokenizer(RemoteTokenizer):
    """The tokenizers of several engines as one; they are the same.

    Args:
        loop: The loop on which engines are called, in another thread than the caller's.
        live: The engines that are up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, live: Callable[[], list[Replica]]) -> None:
        super().__init__(
            lambda method, *args: run_on(loop, self._call(0, method, *args)),
            lambda method, items, **kwargs: run_on(loop, self._call_all(method, items, kwargs)),
        )
        self._live = live

    async def _call_all(self, method: str, items: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        size = max(_MIN_PART, -(-len(items) // max(1, len(self._live()))))
        parts = [items[first : first + size] for first in range(0, len(items), size)]
        results = await asyncio.gather(
            *(self._call(number, method, part, **kwargs) for number, part in enumerate(parts))
        )
        return [result for part in results for result in part]

    async def _call(self, number: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the engine of this number among those that are up, and the next where it dies meanwhile.

        Raises:
            EngineDiedError: None is up for a minute, or the connection to Ray is gone.
        """
        num_pauses = 0
        while True:
            live = self._live()
            if not live:
                if num_pauses == _MAX_PAUSES:
                    raise EngineDiedError("no engine is up that could tokenize")
                num_pauses += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            replica = live[number % len(live)]
            try:
                return await replica.call_tokenizer(method, *args, **kwargs)
            except ClusterLostError as lost:
                raise EngineDiedError(str(lost)) from lost
            except EngineError:
                number += 1
                await asyncio.sleep(0.1)
