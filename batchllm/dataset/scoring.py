"""What a row says of scores: how likely tokens of its prompt are, from one on, or those of a continuation of it.

Knows names and values, and how a scored row is sampled; not tokens: where a continuation begins is found when it is
tokenized.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Mapping, Sequence

from batchllm.dataset import field_checks as checks
from batchllm.dataset.sampling import NUM_ALTERNATIVES
from batchllm.errors import RowError
from batchllm.request import SamplingParams

_FIRST = checks.integer(0)
_SCORE_FIELDS = ("from", "top")
_AT_LEAST_ONE = checks.integer(1)


def check_score(value: object) -> tuple[int | None, int]:
    """Reads ``{"from": N, "top": K}``; both may be missing. Returns the first token to score, None where that is not
    said, and how many alternatives to each.

    Raises:
        RowError: It is not such an object.
    """
    value = checks.as_list(value)
    if not isinstance(value, Mapping):
        raise checks.wrong_type("score", 'an object such as {"from": 0}', value)
    for name in value:
        if name not in _SCORE_FIELDS:
            raise RowError(
                f"unknown field {checks.show(name)} of score{checks.closest(name, _SCORE_FIELDS)}",
                code="unknown_field",
                param="score",
            )
    first, top = value.get("from"), value.get("top")
    return _number(_FIRST, "score.from", first), _number(NUM_ALTERNATIVES, "score.top", top) or 0


def _number(check: checks.Check, name: str, value: object) -> int | None:
    number = None if value is None else check(name, value)
    assert number is None or isinstance(number, int)
    return number


def check_continuation(value: object) -> str | array[int]:
    """Checks for a text or token ids that are not empty.

    Raises:
        RowError: ``empty_continuation``, or it is neither.
    """
    value = checks.as_list(value)
    if isinstance(value, (str, list)) and not value:
        raise RowError(
            "continuation is empty: there is nothing to score; give it text or token ids, or leave it out",
            code="empty_continuation",
            param="continuation",
        )
    if isinstance(value, str):
        return checks.whole_characters("continuation", value)
    if isinstance(value, list):
        return checks.token_ids("continuation", value)
    raise checks.wrong_type("continuation", "a text or a list of token ids", value)


def read_score(
    score: object, continuation: object, sampling: SamplingParams, *, sets_limit: bool
) -> tuple[SamplingParams, int, str | Sequence[int] | None]:
    """What the fields ``score`` and ``continuation`` make of a row.

    Args:
        score: As the row has it, None for nothing.
        continuation: The same.
        sampling: How the row is sampled otherwise.
        sets_limit: The row itself says how much to generate; else it generates nothing.

    Returns:
        How it is sampled, the first token to score, and what follows the prompt.

    Raises:
        RowError: One of them is wrong, or they contradict each other or the rest of the row.
    """
    first, top = (None, 0) if score is None else check_score(score)
    following = None if continuation is None else check_continuation(continuation)
    if first is not None and following is not None:
        raise RowError(
            "score.from and continuation each say where scores begin; give one of them",
            code="conflicting_parameters",
            param="score",
        )
    return scored(sampling, top, sets_limit=sets_limit), first or 0, following


@functools.lru_cache(maxsize=4096)
def scored(sampling: SamplingParams, top: int, *, sets_limit: bool) -> SamplingParams:
    """The same sampling of a row whose prompt is scored, with so many alternatives to each token."""
    limit = sampling.max_new_tokens if sets_limit else 0
    return checked(
        dataclasses.replace(
            sampling,
            max_new_tokens=limit,
            min_new_tokens=min(sampling.min_new_tokens, limit),
            prompt_logprobs=max(top, sampling.prompt_logprobs or 0),
        )
    )


@functools.lru_cache(maxsize=256)
def only_labels(labels: tuple[int, ...], lora_path: str | None = None) -> SamplingParams:
    """Sampling of a prompt behind which only these tokens are scored."""
    return SamplingParams(
        max_new_tokens=0, temperature=0.0, ignore_eos=True, label_token_ids=labels, lora_path=lora_path
    )


@functools.lru_cache(maxsize=256)
def only_embeds(dimensions: int | None, lora_path: str | None = None) -> SamplingParams:
    """Sampling of a prompt that is embedded, in so many numbers; None for as many as the model has."""
    return SamplingParams(
        max_new_tokens=0, temperature=0.0, ignore_eos=True, embed=True, dimensions=dimensions, lora_path=lora_path
    )


def _labelled(sampling: SamplingParams, *, sets_limit: bool) -> SamplingParams:
    """Sampling of a row that names label tokens; it may ask for nothing else."""
    if (sets_limit and sampling.max_new_tokens) or sampling.n > 1 or sampling.prompt_logprobs is not None:
        raise RowError(
            "label_token_ids: how likely they are is all that such a row can ask; leave out max_new_tokens, n and "
            "scores of the prompt, or ask for these in a row of its own",
            code="conflicting_parameters",
            param="label_token_ids",
        )
    return only_labels(sampling.label_token_ids, sampling.lora_path)


def _embedded(sampling: SamplingParams, *, sets_limit: bool) -> SamplingParams:
    """Sampling of a row that asks for a vector; it may ask for nothing else."""
    has_more = (sets_limit and sampling.max_new_tokens) or sampling.n > 1 or sampling.prompt_logprobs is not None
    if not sampling.embed or has_more or sampling.label_token_ids:
        raise RowError(
            "embed: a vector of the prompt is all that such a row can ask, and dimensions are its alone; give embed, "
            "and leave out max_new_tokens, n, label_token_ids and scores",
            code="conflicting_parameters",
            param="embed",
        )
    return only_embeds(sampling.dimensions, sampling.lora_path)


def checked(sampling: SamplingParams, *, name: str = "max_new_tokens", sets_limit: bool = True) -> SamplingParams:
    """Sampling that may run. What only scores is sampled greedily, since nothing is drawn.

    Args:
        name: What the row calls the limit of its output.
        sets_limit: The row itself says how much to generate; else one that names label tokens generates nothing.

    Raises:
        RowError: It generates nothing and scores nothing, is scored several times over, or names label tokens or asks
            for a vector and asks for more.
    """
    if sampling.embed or sampling.dimensions is not None:
        return _embedded(sampling, sets_limit=sets_limit)
    if sampling.label_token_ids:
        return _labelled(sampling, sets_limit=sets_limit)
    if sampling.prompt_logprobs is None:
        if sampling.max_new_tokens == 0:
            _AT_LEAST_ONE(name, 0)
        return sampling
    if sampling.n > 1:
        raise RowError(
            f"n is {sampling.n}, and a prompt whose tokens are scored has one answer: its scores would be the same; "
            "set n to 1, or ask for scores in a row of its own",
            code="conflicting_parameters",
            param="n",
        )
    return sampling if sampling.max_new_tokens else _only_scores(sampling.prompt_logprobs, sampling.lora_path)


@functools.lru_cache(maxsize=256)
def _only_scores(top: int, lora_path: str | None) -> SamplingParams:
    return SamplingParams(max_new_tokens=0, temperature=0.0, ignore_eos=True, prompt_logprobs=top, lora_path=lora_path)


def past_the_end(first: int, num_tokens: int, *, has_continuation: bool) -> RowError:
    """The error of a row that asks for scores behind its last token."""
    if has_continuation:
        return RowError(
            "the continuation adds no token to the prompt: the tokenizer takes it for a part of the prompt's last one; "
            "move the prompt's last word or space to the continuation",
            code="empty_continuation",
            param="continuation",
        )
    return RowError(
        f"score.from is {first}, and the prompt has {num_tokens} tokens, 0 to {num_tokens - 1}; lower it, or give "
        "what is to be scored as continuation",
        code="score_past_end",
        param="score",
    )


NOTHING_IN_FRONT = RowError(
    "the prompt has one token: nothing is in front of it that could make it likely or not; put a token such as the "
    "beginning of a text in front",
    code="nothing_to_score",
    param="prompt",
)
