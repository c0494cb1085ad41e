"""The tokenizer of an engine, asked from another process. Knows what may be asked, not how it gets there."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from batchllm.errors import RowError
from batchllm.offline.runtime import Answer, Chat
from batchllm.request import ChatPrompt, Completion, Ranking, RankingPrompts


class RemoteTokenizer:
    """A `batchllm.srt.managers.chat_tokenizer.ChatTokenizer` in another process.

    Args:
        ask: Calls a method of it by its name, and gives the result.
        ask_each: The same for a method whose first argument is a list and whose result has an item for each of it; it
            may be asked of several engines, a part of each. None: ``ask``.
    """

    def __init__(self, ask: Callable[..., Any], ask_each: Callable[..., list[Any]] | None = None) -> None:
        self._ask = ask
        self._ask_each = ask_each or ask
        self._texts: dict[int, bytes | str] = {}

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        """Token ids of each text; special tokens are added as the model wants them."""
        return self._ask_each("encode", list(texts), add_special_tokens=add_special_tokens) if texts else []

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        """Each chat as a prompt, or why there is none."""
        return self._ask_each("encode_chats", list(chats)) if chats else []

    def encode_rankings(self, rankings: Sequence[Ranking]) -> list[RankingPrompts | RowError]:
        """The prompts of each ranking, or why there are none."""
        return self._ask_each("encode_rankings", list(rankings)) if rankings else []

    def parse_answers(self, answers: Sequence[Answer]) -> list[Completion]:
        """Answers to chats, as messages with reasoning and tool calls."""
        return self._ask_each("parse_answers", list(answers)) if answers else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._ask("decode", list(ids)))

    def decode_token(self, token_id: int) -> bytes | str:
        """Text of one token by itself."""
        if token_id not in self._texts:
            self._texts[token_id] = self._ask("decode_token", token_id)
        return self._texts[token_id]
