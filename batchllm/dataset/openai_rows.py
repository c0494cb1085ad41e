"""OpenAI batch rows: ``{"custom_id", "method": "POST", "url", "body"}`` for chat and completions.

Knows OpenAI's names, their defaults, and SGLang's extensions to the body; not files or lines.
What a row leaves out takes the job's defaults, which are OpenAI's own unless the user changes them
(temperature 1, top_p 1, n 1), except ``max_tokens``: 16 for completions, as OpenAI documents, and
the job's ``default_max_new_tokens`` for chat.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping
from typing import Any

from batchllm.dataset import field_checks as checks
from batchllm.dataset.plain_rows import ReadSampling
from batchllm.dataset.prompts import check_completion_prompt, check_messages
from batchllm.dataset.records import Row, RowKind
from batchllm.dataset.sampling import (
    LIMIT,
    MINIMUM,
    NUM_ALTERNATIVES,
    SHARED_FIELDS,
    SamplingField,
    apply_settings,
    expected_len,
    put_setting,
    read_settings,
)
from batchllm.errors import RowError
from batchllm.request import Request, SamplingParams

KIND_OF_URL: Mapping[object, RowKind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}
ROW_FIELDS = frozenset({"custom_id", "method", "url", "body"})
COMPLETION_MAX_TOKENS = 16
_MAX_DIGITS = 18
"""Of a number given as text; Python refuses to read one of thousands."""

_BODY_FIELDS = {
    **SHARED_FIELDS,
    "max_tokens": SamplingField("max_new_tokens", LIMIT),
    "min_tokens": SamplingField("min_new_tokens", MINIMUM),
}
_FIELDS: Mapping[RowKind, Mapping[str, SamplingField]] = {
    "completions": _BODY_FIELDS,
    "chat": {
        **_BODY_FIELDS,
        "max_completion_tokens": SamplingField("max_new_tokens", LIMIT),
        "logprobs": SamplingField("logprobs", checks.boolean),
        "top_logprobs": SamplingField("top_logprobs", NUM_ALTERNATIVES),
    },
}
PROMPT_FIELD: Mapping[RowKind, str] = {"completions": "prompt", "chat": "messages"}

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"})
"""OpenAI's bookkeeping; says nothing about the answer."""

UNSUPPORTED = frozenset(
    {
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
        *("logit_bias", "best_of", "echo", "suffix", "stream", "stream_options", "modalities"),
        *("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"),
    }
)
"""OpenAI's names that would change the answer; accepted only where they ask for nothing."""


def parse_openai(record: dict[str, Any], *, given_id: str | int, index: int, line: int, sampling: ReadSampling) -> Row:
    """Reads one OpenAI batch row of the kind its url names.

    Args:
        sampling: Reads the body's sampling fields (`sampling_fields` of it).

    Raises:
        RowError: Anything in the row is wrong.
    """
    kind, body = check_envelope(record)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise checks.wrong_type("model", "a string", model)
    user = body.get("user")
    if user is not None and not isinstance(user, str):
        raise checks.wrong_type("user", "a string", user)
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise checks.wrong_type("metadata", "an object", metadata)
    params, given = sampling(sampling_fields(body, kind))
    name = PROMPT_FIELD[kind]
    if body.get(name) is None:
        raise RowError(f"the body has no {name}", code="missing_prompt", param=name)
    prompt = check_completion_prompt(body[name]) if kind == "completions" else None
    request = Request(
        row_id=str(given_id),
        index=index,
        sampling=params,
        prompt=prompt if isinstance(prompt, str) else None,
        input_ids=prompt if isinstance(prompt, array) else None,
        messages=check_messages(body[name]) if kind == "chat" else None,
        task=_task(metadata or {}),
        expected_new_tokens=_expected_len(metadata or {}),
        may_lower_max_new_tokens=not given,
    )
    return Row(request=request, kind=kind, given_id=given_id, line=line, model=model)


def _task(metadata: Mapping[str, Any]) -> str:
    """``metadata.task``: OpenAI gives metadata no meaning, so the same file still runs there."""
    task = metadata.get("task")
    return task if isinstance(task, str) else ""


def _expected_len(metadata: Mapping[str, Any]) -> int | None:
    """``metadata.expected_new_tokens``; OpenAI's metadata holds strings."""
    value = metadata.get("expected_new_tokens")
    if isinstance(value, str) and value.isdecimal() and len(value) <= _MAX_DIGITS:
        return expected_len(int(value))
    return expected_len(value)


def check_envelope(record: dict[str, Any]) -> tuple[RowKind, dict[str, Any]]:
    """Checks what is around the body; returns the kind that the url names, and the body."""
    for name in record:
        if name not in ROW_FIELDS:
            raise RowError(
                f"unknown field {checks.show(name)}{checks.closest(name, ROW_FIELDS)}",
                code="unknown_field",
                param=name,
            )
    if record.get("method") != "POST":
        raise RowError(
            f'method must be "POST", not {checks.show(record.get("method"))}',
            code="invalid_method",
            param="method",
        )
    url = record.get("url")
    kind = KIND_OF_URL.get(url) if isinstance(url, str) else None
    if kind is None:
        raise RowError(
            f"url must be {' or '.join(map(str, KIND_OF_URL))}, not {checks.show(url)}",
            code="invalid_url",
            param="url",
        )
    body = record.get("body")
    if not isinstance(body, dict):
        raise RowError(f"body must be an object, not {checks.show(body)}", code="invalid_body", param="body")
    return kind, body


def sampling_fields(body: dict[str, Any], kind: RowKind) -> dict[str, Any]:
    """The part of a body that says how to sample: all but prompt, model and bookkeeping."""
    prompt = PROMPT_FIELD[kind]
    return {k: v for k, v in body.items() if k not in IGNORED and k not in (prompt, "model")}


def read_body_sampling(
    body: Mapping[str, Any], kind: RowKind, *, defaults: SamplingParams
) -> tuple[SamplingParams, bool]:
    """Reads the sampling fields of a body.

    Args:
        body: As from `sampling_fields`.
        defaults: The job's; its ``max_new_tokens`` holds for chat rows that set no limit.

    Returns:
        The parameters, and whether the body itself limits the output.
    """
    fields = _FIELDS[kind]
    named: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in body.items():
        if name == "response_format":
            schema = _response_schema(value)
            if schema is not None:
                put_setting(settings, "json_schema", schema, name=name)
        elif name == "logprobs" and kind == "completions":
            if value is not None:
                settings |= {"logprobs": True, "top_logprobs": NUM_ALTERNATIVES(name, value)}
        elif name in UNSUPPORTED:
            _check_asks_nothing(name, value)
        elif name not in fields:
            raise _unknown_in_body(name, kind)
        else:
            named[name] = value
    for target, value in read_settings(named, fields).items():
        put_setting(settings, target, value, name=target)
    given = "max_new_tokens" in settings
    if kind == "completions":
        defaults = dataclasses.replace(defaults, max_new_tokens=COMPLETION_MAX_TOKENS)
    return apply_settings(settings, defaults), given


def _response_schema(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _bad_format("response_format", f"must be an object, not {checks.show(value)}")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type":"object"}'
    if kind != "json_schema":
        wanted = "text, json_object or json_schema"
        raise _bad_format("response_format.type", f"must be {wanted}, not {checks.show(kind)}")
    wrapper = value.get("json_schema")
    if not isinstance(wrapper, dict) or wrapper.get("schema") is None:
        raise _bad_format("response_format.json_schema", 'must be {"name": ..., "schema": {...}}')
    return checks.json_schema_text("response_format.json_schema.schema", wrapper["schema"])


def _check_asks_nothing(name: str, value: object) -> None:
    if value is None or value is False or value == [] or value == {}:
        return
    if name == "stream":
        message = "stream must be false: a batch answers each row once, when it is done"
    else:
        message = f"{name} is not supported; leave it out"
    raise RowError(message, code="unsupported_parameter", param=name)


def _unknown_in_body(name: str, kind: RowKind) -> RowError:
    known = {*_FIELDS[kind], PROMPT_FIELD[kind], "model", "logprobs", "response_format"}
    return RowError(
        f"unknown body field {checks.show(name)}{checks.closest(name, known)}",
        code="unknown_parameter",
        param=name,
    )


def _bad_format(name: str, what: str) -> RowError:
    return RowError(f"{name} {what}", code="invalid_response_format", param=name)
