"""Requests to token ids, in bulk, whichever way each gives its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from batchllm.errors import ConfigError, RowError
from batchllm.offline.runtime import BulkTokenizer
from batchllm.request import Request


def encode_requests(requests: Sequence[Request], tokenizer: BulkTokenizer | None) -> list[Sequence[int] | RowError]:
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
    texts = [(i, request.prompt) for i, request in enumerate(requests) if request.prompt is not None]
    chats: list[tuple[int, str]] = []
    with_messages = [(i, request.messages) for i, request in enumerate(requests) if request.messages is not None]
    if with_messages:
        rendered = _need(tokenizer).render_chats([messages for _, messages in with_messages])
        for (i, _), text in zip(with_messages, rendered, strict=True):
            if isinstance(text, RowError):
                encoded[i] = text
            else:
                chats.append((i, text))
    for pairs, add_special_tokens in ((texts, True), (chats, False)):
        if pairs:
            ids = _need(tokenizer).encode([text for _, text in pairs], add_special_tokens=add_special_tokens)
            for (i, _), row_ids in zip(pairs, ids, strict=True):
                encoded[i] = row_ids
    for i, result in enumerate(encoded):
        if not isinstance(result, RowError) and len(result) == 0:
            encoded[i] = RowError("the prompt has no tokens; give it some text", code="empty_prompt")
    return encoded


def _need(tokenizer: BulkTokenizer | None) -> BulkTokenizer:
    if tokenizer is None:
        raise ConfigError("--skip-tokenizer-init: text needs a tokenizer; drop it or give input_ids")
    return tokenizer
