"""Sampling parameters from a mapping of names to values, every name and value checked.

Knows SGLang's names (plain rows, the Python API) and how checked settings become `SamplingParams`;
not where the mapping came from. OpenAI's names are in `openai_rows`, on top of the same table.

INVARIANT: no name is ignored: each is read, or the row is refused with the nearest known name.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from batchllm.dataset import field_checks as checks
from batchllm.errors import RowError
from batchllm.request import GRAMMARS, SamplingParams

MAX_NUM_SAMPLES = 128
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingField:
    """One accepted name: which field of `SamplingParams` it sets, and how its value is checked."""

    target: str
    check: checks.Check


def stop_regexes(name: str, value: object) -> tuple[str, ...] | None:
    """Checks for one regular expression, or a list of them, of Python's ``re``, by which SGLang looks for them.

    Raises:
        RowError: One is none.
    """
    expressions = checks.stop_strings(name, value)
    for expression in expressions or ():
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise RowError(
                f"{name} {checks.show(expression)} is no regular expression of Python's re: {error}",
                code="invalid_regex",
                param=name,
            ) from None
    return expressions


SHARED_FIELDS: Mapping[str, SamplingField] = {
    name: SamplingField(name, check)
    for name, check in {
        "temperature": checks.number(0.0),
        "top_p": checks.number(0.0, 1.0, low_open=True),
        "top_k": checks.top_k,
        "min_p": checks.number(0.0, 1.0),
        "frequency_penalty": checks.number(-2.0, 2.0),
        "presence_penalty": checks.number(-2.0, 2.0),
        "repetition_penalty": checks.number(0.0, 2.0, low_open=True),
        "n": checks.integer(1, MAX_NUM_SAMPLES),
        "seed": checks.integer(-checks.MAX_INT64, checks.MAX_INT64),
        "stop": checks.stop_strings,
        "stop_token_ids": checks.stop_ids,
        "ignore_eos": checks.boolean,
        "json_schema": checks.json_schema_text,
        "regex": checks.regex_text,
        "ebnf": checks.grammar_text,
        "structural_tag": checks.structural_tag_text,
        "logit_bias": checks.logit_bias,
        "stop_regex": stop_regexes,
        "no_stop_trim": checks.boolean,
        "spaces_between_special_tokens": checks.boolean,
        "require_reasoning": checks.boolean,
        "skip_special_tokens": checks.boolean,
        "lora_path": checks.adapter_name,
    }.items()
}
"""Names that mean the same to SGLang and in an OpenAI body."""

LIMIT = checks.integer(0)
"""0 only where the prompt is scored (`batchllm.dataset.scoring.checked`)."""
EXPECTED = checks.integer(1)
MINIMUM = checks.integer(0)
NUM_ALTERNATIVES = checks.integer(0, MAX_TOP_LOGPROBS)

SGLANG_FIELDS: Mapping[str, SamplingField] = {
    **SHARED_FIELDS,
    "max_new_tokens": SamplingField("max_new_tokens", LIMIT),
    "min_new_tokens": SamplingField("min_new_tokens", MINIMUM),
    "sampling_seed": SamplingField("seed", SHARED_FIELDS["seed"].check),
    "logprobs": SamplingField("logprobs", checks.boolean),
    "top_logprobs": SamplingField("top_logprobs", NUM_ALTERNATIVES),
    "prompt_logprobs": SamplingField("prompt_logprobs", NUM_ALTERNATIVES),
    "label_token_ids": SamplingField("label_token_ids", checks.stop_ids),
    "embed": SamplingField("embed", checks.boolean),
    "dimensions": SamplingField("dimensions", checks.integer(1)),
}


def expected_len(value: object) -> int | None:
    """Checks ``expected_new_tokens``, what a row says of the length of its answer; None where it says nothing.

    Raises:
        RowError: It is not an integer from 1.
    """
    return None if value is None else cast("int", EXPECTED("expected_new_tokens", value))


def sglang_fields(json_schema: checks.Check) -> Mapping[str, SamplingField]:
    """The table of SGLang's names, with this check of JSON schemas."""
    return {**SGLANG_FIELDS, "json_schema": SamplingField("json_schema", json_schema)}


def parse_sampling(
    mapping: Mapping[str, Any], *, defaults: SamplingParams, json_schema: checks.Check = checks.json_schema_text
) -> SamplingParams:
    """Reads sampling parameters under SGLang's names.

    Args:
        mapping: Names and values; None means "not given".
        defaults: What holds for every name not given.
        json_schema: How a JSON schema is checked.

    Raises:
        RowError: A name is unknown, a value has the wrong type or range, or two contradict.
    """
    return apply_settings(read_settings(mapping, sglang_fields(json_schema)), defaults)


def read_settings(mapping: object, fields: Mapping[str, SamplingField]) -> dict[str, Any]:
    """Checks names and values against a table; returns fields of `SamplingParams` to set."""
    if not isinstance(mapping, Mapping):
        raise checks.wrong_type("sampling_params", "an object", mapping)
    settings: dict[str, Any] = {}
    for name, value in mapping.items():
        field = fields.get(name)
        if field is None:
            raise RowError(
                f"unknown parameter {checks.show(name)}{checks.closest(name, fields)}",
                code="unknown_parameter",
                param=checks.show(name) if not isinstance(name, str) else name,
            )
        says_nothing = value is None or (field.target in GRAMMARS and isinstance(value, str) and not value)
        checked = None if says_nothing else field.check(name, value)
        if checked is not None:
            put_setting(settings, field.target, checked, name=name)
    return settings


def put_setting(settings: dict[str, Any], target: str, value: object, *, name: str) -> None:
    """Sets one field; a second name for the same field must not say something else."""
    if settings.setdefault(target, value) != value:
        raise RowError(
            f"{name} contradicts another name for the same setting "
            f"({checks.show(settings[target])} and {checks.show(value)}); give one of them",
            code="conflicting_parameters",
            param=name,
        )


def apply_settings(
    settings: Mapping[str, Any],
    defaults: SamplingParams,
    *,
    least: str = "min_new_tokens",
    limit: str = "max_new_tokens",
) -> SamplingParams:
    """Puts checked settings over the defaults and checks what concerns several of them.

    Args:
        least: What the row calls the fewest tokens of its output.
        limit: What it calls the most.
    """
    grammars = [name for name in GRAMMARS if name in settings]
    if len(grammars) > 1:
        raise _conflict(f"{' and '.join(grammars)} exclude each other; give one of them", grammars[-1])
    if grammars:
        # The row decides its own output format: a default of another kind gives way.
        nothing: dict[str, Any] = dict.fromkeys(GRAMMARS)
        defaults = dataclasses.replace(defaults, **nothing)
    merged = dataclasses.replace(defaults, **settings)
    if merged.min_new_tokens > merged.max_new_tokens:
        raise _conflict(
            f"{least} {merged.min_new_tokens} is more than {limit} {merged.max_new_tokens}; raise one or lower the "
            "other",
            least,
        )
    if merged.stop_regex and merged.min_new_tokens:
        raise _conflict(f"{least} does not hold beside stop_regex; give stop, or one of them", "stop_regex")
    if merged.top_logprobs > 0 and not merged.logprobs:
        raise _conflict('top_logprobs needs "logprobs": true beside it', "top_logprobs")
    return merged


@functools.lru_cache(maxsize=4096)
def with_adapter(sampling: SamplingParams, adapter: str) -> SamplingParams:
    """The same sampling, answered by this adapter."""
    return dataclasses.replace(sampling, lora_path=adapter)


@functools.lru_cache(maxsize=4096)
def with_chat_settings(sampling: SamplingParams, settings: tuple[tuple[str, Any], ...]) -> SamplingParams:
    """Sampling of a chat: what the row asks, and what its template and tools need (`ChatPrompt.settings`).

    Stop strings are added to the row's own. A grammar that tools need gives way to the row's own, as on the server.
    """
    if not settings:
        return sampling
    changes = dict(settings)
    if "stop" in changes:
        changes["stop"] = (*changes["stop"], *(s for s in sampling.stop if s not in changes["stop"]))
    if sampling.has_grammar:
        changes = {name: value for name, value in changes.items() if name not in GRAMMARS}
    return dataclasses.replace(sampling, **changes)


def _conflict(message: str, param: str) -> RowError:
    return RowError(message, code="conflicting_parameters", param=param)
