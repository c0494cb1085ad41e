"""Text to tokens on several engines: each takes a part, so that the driver does none of it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from batchllm.distributed.cluster import ClusterLostError
from batchllm.distributed.replica import Replica
from batchllm.errors import EngineDiedError, EngineError, RowError
from batchllm.offline.event_loop import run_on
from batchllm.offline.runtime import Answer, Chat
from batchllm.request import ChatPrompt, Completion, Ranking, RankingPrompts

_MIN_PART = 64
"""Texts below which a part is not worth a message of its own."""
_PAUSE_S = 1.0
_MAX_PAUSES = 60


class SpreadTokenizer:
    """The tokenizers of several engines as one; they are the same.

    Args:
        loop: The loop on which engines are called, in another thread than the caller's.
        live: The engines that are up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, live: Callable[[], list[Replica]]) -> None:
        self._loop, self._live = loop, live
        self._texts: dict[int, bytes | str] = {}

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        """Token ids of each text; special tokens are added as the model wants them."""
        return self._in_parts("encode", texts, add_special_tokens=add_special_tokens)

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        """Each chat as a prompt, or why there is none."""
        return self._in_parts("encode_chats", chats)

    def encode_rankings(self, rankings: Sequence[Ranking]) -> list[RankingPrompts | RowError]:
        """The prompts of each ranking, or why there are none."""
        return self._in_parts("encode_rankings", rankings)

    def parse_answers(self, answers: Sequence[Answer]) -> list[Completion]:
        """Answers to chats, as messages with reasoning and tool calls."""
        return self._in_parts("parse_answers", answers)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = run_on(self._loop, self._call(0, "decode", list(ids)))
        return text

    def decode_token(self, token_id: int) -> bytes | str:
        """Text of one token by itself."""
        if token_id not in self._texts:
            self._texts[token_id] = run_on(self._loop, self._call(0, "decode_token", token_id))
        return self._texts[token_id]

    def _in_parts(self, method: str, items: Sequence[Any], **kwargs: Any) -> list[Any]:
        if not items:
            return []
        return run_on(self._loop, self._call_all(method, list(items), kwargs))

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
