"""Requests to prompts, in bulk, whichever way each gives its own."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from batchllm.dataset.sampling import with_chat_settings
from batchllm.errors import ConfigError, RowError
from batchllm.offline.runtime import PromptTokenizer
from batchllm.request import ChatPrompt, RankingPrompts, Request


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """A request that is ready to be taken in.

    Attributes:
        request: Sampled as its prompt needs.
        ids: Token ids of its prompts, one behind the other, int32.
        lengths: Tokens of each prompt.
        merged_len: Tokens of the prompt by itself, where it and its continuation have fewer of these in common than
            that, since the tokenizer joins the two; 0 elsewhere.
    """

    request: Request
    ids: array[int]
    lengths: tuple[int, ...]
    merged_len: int = 0


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
    rankings: list[int] = []
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
        elif request.ranking is not None:
            rankings.append(i)
            encoded.append(_NO_TOKENS)
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
    if rankings:
        found = _need(tokenizer).encode_rankings([r for i in rankings if (r := requests[i].ranking) is not None])
        for i, ranked in zip(rankings, found, strict=True):
            encoded[i] = ranked if isinstance(ranked, RowError) else _with_labels(requests[i], ranked)
    _continue(encoded, tokenizer)
    for i, result in enumerate(encoded):
        if not isinstance(result, RowError) and 0 in result.lengths:
            encoded[i] = of_prompt(_NO_TOKENS, result, result.lengths.index(0))
    return encoded


def of_prompt(error: RowError, encoded: Encoded, number: int) -> RowError:
    """An error of one of a row's prompts, which says of which where the row gives several, or calls them otherwise."""
    name = encoded.request.prompts_name
    if len(encoded.lengths) == 1 and name == "prompt":
        return error
    return RowError(f"{name}[{number}]: {error.message}", code=error.code, param=f"{name}[{number}]")


def _with_labels(request: Request, ranked: RankingPrompts) -> Encoded:
    sampling = replace(request.sampling, label_token_ids=ranked.labels)
    return Encoded(msgspec.structs.replace(request, sampling=sampling), ranked.ids, ranked.lengths)


def _continue(encoded: list[Encoded | RowError], tokenizer: PromptTokenizer | None) -> None:
    """Put continuations behind their prompts, and find on tokens where each begins."""
    found = [(i, e) for i, e in enumerate(encoded) if not isinstance(e, RowError) and e.request.continuation]
    joined: list[tuple[int, Encoded, str]] = []  # a text behind a text: the tokenizer sees both together
    alone: list[tuple[int, Encoded, str]] = []
    for i, prompt in found:
        following = prompt.request.continuation
        if not isinstance(following, str):
            encoded[i] = _with_continuation(prompt, prompt.ids + _as_array(following or ()))
        elif prompt.request.prompt is not None:
            joined.append((i, prompt, prompt.request.prompt + following))
        else:
            alone.append((i, prompt, following))
    for some, has_prompt in ((joined, True), (alone, False)):
        texts = [text for _, _, text in some]
        all_ids = _need(tokenizer).encode(texts, add_special_tokens=has_prompt) if texts else []
        for (i, prompt, _), ids in zip(some, all_ids, strict=True):
            encoded[i] = _with_continuation(prompt, ids if has_prompt else prompt.ids + ids)


def _with_continuation(prompt: Encoded, ids: array[int]) -> Encoded:
    """The prompt with what follows it; scored from the first token that the prompt alone does not have there."""
    start = prompt_len = len(prompt.ids)
    if ids[:prompt_len] != prompt.ids:
        start = next((i for i, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b), len(ids))
    request = msgspec.structs.replace(prompt.request, score_from=start)
    return Encoded(request, ids, (len(ids),), 0 if start == prompt_len else prompt_len)


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
