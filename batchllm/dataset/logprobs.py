"""Log probabilities in the three output formats: plain, chat, and legacy completions; of answers and of prompts.

Knows the formats and how token bytes become text; not where the numbers came from.

INVARIANT: every number written is finite, so the output is JSON.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from batchllm.request import PromptScore, TokenLogprob

Decode = Callable[[int], bytes | str]
"""Text of one token; bytes where a token may be a part of a character."""

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for "essentially never"; JSON has no infinity."""


def plain_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """``[{token_id, logprob, top: [{token_id, logprob}]}]``, one for each generated token."""
    return [
        {
            "token_id": token.token_id,
            "logprob": _finite(token.logprob),
            "top": [{"token_id": i, "logprob": _finite(value)} for i, value in token.top],
        }
        for token in tokens
    ]


def plain_score(score: PromptScore) -> dict[str, Any]:
    """``{from, logprob, tokens: [{token_id, logprob, top}]}``: the sum over the tokens, and each of them."""
    values = [None if value is None else _finite(value) for value in score.logprobs]
    return {
        "from": score.start,
        "logprob": sum([value for value in values if value is not None]),
        "tokens": [
            {"token_id": token_id, "logprob": value, "top": [{"token_id": i, "logprob": _finite(v)} for i, v in top]}
            for token_id, value, top in zip(score.token_ids, values, score.top, strict=True)
        ],
    }


def vllm_prompt_logprobs(score: PromptScore, decode: Decode) -> list[dict[str, Any] | None]:
    """As vLLM's answers have it: of each token of the prompt itself and the likeliest ones, by id; null for the first.

    ``rank`` is null for a token that is not among the likeliest.
    """
    listed: list[dict[str, Any] | None] = []
    for token_id, value, top in zip(score.token_ids, score.logprobs, score.top, strict=True):
        if value is None:
            listed.append(None)
            continue
        ranks = {i: (v, rank) for rank, (i, v) in enumerate(top, start=1)}
        shown = {token_id: (value, ranks[token_id][1] if token_id in ranks else None), **ranks}
        listed.append(
            {
                str(i): {"logprob": _finite(v), "rank": rank, "decoded_token": _text(decode(i))}
                for i, (v, rank) in shown.items()
            }
        )
    return listed


def echoed_logprobs(
    score: PromptScore, tokens: Sequence[TokenLogprob], decode: Decode, text: str, *, with_top: bool
) -> dict[str, Any]:
    """OpenAI's completions format for an answer that repeats its prompt: the prompt's tokens, then the generated ones.

    The prompt's first token has null for its log probability and its alternatives.

    Args:
        text: Prompt and answer.
    """
    prompt = [
        TokenLogprob(token_id=token_id, logprob=0.0 if value is None else value, top=top)
        for token_id, value, top in zip(score.token_ids, score.logprobs, score.top, strict=True)
    ]
    listed = completion_logprobs([*prompt, *tokens], decode, text, with_top=with_top)
    if score.start == 0:
        listed["token_logprobs"][0] = None
        if listed["top_logprobs"] is not None:
            listed["top_logprobs"][0] = None
    return listed


def chat_logprobs(tokens: Sequence[TokenLogprob], decode: Decode) -> dict[str, Any]:
    """OpenAI's chat format; ``bytes`` is exact where ``token`` is half a character."""
    return {
        "content": [
            {
                **_chat_token(decode(token.token_id), token.logprob),
                "top_logprobs": [_chat_token(decode(i), value) for i, value in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _by_text(token: TokenLogprob, decode: Decode) -> dict[str, float]:
    """The alternatives to a token, the likeliest first."""
    alternatives: dict[str, float] = {}
    for token_id, value in token.top:
        alternatives.setdefault(_text(decode(token_id)), _finite(value))
    return alternatives


def completion_logprobs(tokens: Sequence[TokenLogprob], decode: Decode, text: str, *, with_top: bool) -> dict[str, Any]:
    """OpenAI's completions format; ``text_offset`` counts characters from the start of the answer.

    It lies inside the text and never goes back: a token of which there is nothing in the text, such as one that ended
    it, stands where the token before it ended.

    Alternatives that look alike as text (halves of characters) keep the likelier one: the format
    keys them by text.
    """
    pieces = [decode(token.token_id) for token in tokens]
    top: list[dict[str, float]] | None = None
    if with_top:
        top = [_by_text(token, decode) for token in tokens]
    return {
        "tokens": [_text(piece) for piece in pieces],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": top,
        "text_offset": _offsets(pieces, text),
    }


def _offsets(pieces: Sequence[bytes | str], text: str) -> list[int]:
    """Where each token begins in the text, in characters; a part of a character where the character begins."""
    offsets = []
    end = 0
    joined = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        offsets.append(end)
        characters = joined.decode(piece.encode() if isinstance(piece, str) else piece)
        # The space before its first word may be missing in the text.
        for part in (characters, characters.lstrip(" ")):
            if text.startswith(part, end):
                end += len(part)
                break
    return offsets


def _chat_token(piece: bytes | str, logprob: float) -> dict[str, Any]:
    raw = piece if isinstance(piece, bytes) else piece.encode()
    return {"token": _text(piece), "logprob": _finite(logprob), "bytes": list(raw)}


def _text(piece: bytes | str) -> str:
    return piece.decode("utf-8", "replace") if isinstance(piece, bytes) else piece


def _finite(logprob: float) -> float:
    # The comparison is false for NaN too.
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
