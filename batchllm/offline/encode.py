"""Requests to prompts, in bulk, whichever way each gives its own."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from batchllm.dataset.sampling import with_chat_settings
from batchllm.errors import ConfigError, RowError
from batchllm.offline.runtime import PromptTokenizer
from batchllm.request import ChatPrompt, Request


class Encoded(NamedTuple):
    """A request that is ready to be taken in.

    Attributes:
        request: Sampled as its prompt needs.
        ids: Token ids of its prompts, one behind the other, int32.
        lengths: Tokens of each prompt.
    """

    request: Request
    ids: array[int]
    lengths: tuple[int, ...]


def encode_requests(
    requests: Sequence[Request], tokenizer: PromptTokenizer | None, chat_sampling: Mapping[str, Any]
) -> list[Encoded | RowError]:
    """Each request with its token ids, or why there are none.

    Args:
        requests: A slice of a job.
        tokenizer: None where the engine runs on token ids only.
        chat_sampling: What the model recommends for chats (`RuntimeInfo.chat_sampling`).

    Raises:
        ConfigError: A request gives text and there is no tokenizer.
    """
    encoded: list[Encoded | RowError] = []
    texts: list[str] = []
    text_of: list[int] = []
    chats: list[int] = []
    for i, request in enumerate(requests):
        if request.prompt is not None:
            texts.append(request.prompt)
            text_of.append(i)
            encoded.append(_NO_TOKENS)
        elif request.messages is not None:
            chats.append(i)
            encoded.append(_NO_TOKENS)
        elif request.prompts is not None:
            encoded.append(_encode_several(request, tokenizer))
        else:
            ids = _as_array(request.input_ids or ())
            encoded.append(Encoded(request, ids, (len(ids),)))
    if texts:
        for i, ids in zip(text_of, _need(tokenizer).encode(texts), strict=True):
            encoded[i] = Encoded(requests[i], ids, (len(ids),))
    if chats:
        prompts = _need(tokenizer).encode_chats([(requests[i].messages or (), requests[i].chat) for i in chats])
        for i, prompt in zip(chats, prompts, strict=True):
            encoded[i] = prompt if isinstance(prompt, RowError) else _with_prompt(requests[i], prompt, chat_sampling)
    for i, result in enumerate(encoded):
        if not isinstance(result, RowError) and 0 in result.lengths:
            encoded[i] = _NO_TOKENS
    return encoded


_NO_TOKENS = RowError("the prompt has no tokens; give it some text", code="empty_prompt")


def _encode_several(request: Request, tokenizer: PromptTokenizer | None) -> Encoded:
    prompts = list(request.prompts or ())
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    given = [_as_array(prompt) for prompt in prompts if not isinstance(prompt, str)]
    ids = _need(tokenizer).encode(texts) if texts else given
    return Encoded(request, array("i", b"".join(ids)), tuple(map(len, ids)))


def _with_prompt(request: Request, prompt: ChatPrompt, chat_sampling: Mapping[str, Any]) -> Encoded:
    settings = prompt.settings
    if chat_sampling and request.chat is not None:
        settings += tuple((name, chat_sampling[name]) for name in request.chat.unset if name in chat_sampling)
    if settings:
        request = msgspec.structs.replace(request, sampling=with_chat_settings(request.sampling, settings))
    return Encoded(request, prompt.ids, (len(prompt.ids),))


def _as_array(ids: Sequence[int]) -> array[int]:
    return ids if isinstance(ids, array) else array("i", ids)


def _need(tokenizer: PromptTokenizer | None) -> PromptTokenizer:
    if tokenizer is None:
        raise ConfigError("--skip-tokenizer-init: text needs a tokenizer; drop it or give input_ids")
    return tokenizer
