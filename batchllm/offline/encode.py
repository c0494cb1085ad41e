"""Requests to token ids, in bulk, whichever way each gives its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from batchllm.errors import ConfigError, RowError
from batchllm.request import Request
from batchllm.tokenizer import Tokenizer


def encode_requests(requests: Sequence[Request], tokenizer: Tokenizer | None) -> list[Sequence[int] | RowError]:
    """Token ids of each request, or why there are none.

    Args:
        requests: A slice of a job.
        tokenizer: None where the engine runs on token ids only.

    Raises:
        ConfigError: A request gives text and there is no tokenizer.
    """
    encoded: list[Sequence[int] | RowError] = [
        () if request.input_ids is None else request.input_ids for request in requests
    ]
    texts: list[tuple[int, str]] = []
    chats: list[tuple[int, str]] = []
    for i, request in enumerate(requests):
        try:
            if request.prompt is not None:
                texts.append((i, request.prompt))
            elif request.messages is not None:
                chats.append((i, _need(tokenizer).render_chat(request.messages)))
        except RowError as error:
            encoded[i] = error
    for pairs, add_special_tokens in ((texts, True), (chats, False)):
        if pairs:
            ids = _need(tokenizer).encode([text for _, text in pairs], add_special_tokens=add_special_tokens)
            for (i, _), row_ids in zip(pairs, ids, strict=True):
                encoded[i] = row_ids
    for i, result in enumerate(encoded):
        if not isinstance(result, RowError) and len(result) == 0:
            encoded[i] = RowError("the prompt has no tokens; give it some text", code="empty_prompt")
    return encoded


def _need(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError("--skip-tokenizer-init: text needs a tokenizer; drop it or give input_ids")
    return tokenizer
