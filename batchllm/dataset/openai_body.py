"""What an OpenAI body asks for beside its prompt: OpenAI's names, their defaults, and SGLang's extensions.

Every name is in one of these tables: it is read, it is handed to SGLang's chat serving, it says nothing about the
answer, or it is refused. What says nothing is passed over, whatever the name: null, nothing in it, or a default
written out (`asks_nothing`). Knows bodies; not rows, files, prompts or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from batchllm.dataset import field_checks as checks
from batchllm.dataset.records import RowKind
from batchllm.dataset.sampling import (
    LIMIT,
    MINIMUM,
    NUM_ALTERNATIVES,
    SHARED_FIELDS,
    SamplingField,
    apply_settings,
    put_setting,
    read_settings,
)
from batchllm.dataset.scoring import checked
from batchllm.errors import RowError
from batchllm.request import ChatOptions, SamplingParams

PROMPT_FIELD: Mapping[RowKind, str] = {"completions": "prompt", "chat": "messages"}
COMPLETION_MAX_TOKENS = 16

_BODY_FIELDS = {
    **SHARED_FIELDS,
    "max_tokens": SamplingField("max_new_tokens", LIMIT),
    "min_tokens": SamplingField("min_new_tokens", MINIMUM),
    "prompt_logprobs": SamplingField("prompt_logprobs", NUM_ALTERNATIVES),
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
_MODEL_RECOMMENDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of `SamplingParams` that SGLang takes from the model where a chat says nothing."""

_CHAT_FIELDS: Mapping[str, checks.Check] = {
    "tools": checks.of_type(list, "a list"),
    "tool_choice": checks.anything,
    "parallel_tool_calls": checks.boolean,
    "reasoning_effort": checks.anything,
    "reasoning": checks.of_type(dict, "an object"),
    "chat_template_kwargs": checks.of_type(dict, "an object"),
    "continue_final_message": checks.boolean,
    "separate_reasoning": checks.boolean,
    "task": checks.anything,
}
"""What SGLang's chat serving makes of these is its own (`batchllm.srt.entrypoints.serving_chat`)."""

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention"),
        *("safety_identifier", "rid", "priority", "stream_options", "stream_reasoning"),
    }
)
"""Says nothing about the answer. A batch answers every row once; which runs first is the plan's."""

_NAMESPACE = ("cache_salt", "extra_key")
"""Prompts with other values never share KV. (Upstream: ``OpenAIServingBase._compute_extra_key``.)"""

_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1, False),
    "parallel_tool_calls": (True,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto", False),
    "modalities": (["text"], False),
    "verbosity": ("medium", False),
    "add_generation_prompt": (True,),
    "separate_reasoning": (True,),
}
"""Values beside null and nothing that ask for what happens anyway; of all other names it is false and 0."""

REFUSED: Mapping[str, str] = {
    "stream": "a batch answers each row once, when it is done",
    "echo": "only completions have it",
    "custom_logit_processor": "it is code that would run in the engine",
    "add_generation_prompt": "SGLang always adds it; continue_final_message goes on with the last message",
    **dict.fromkeys(
        (
            *("functions", "function_call", "best_of", "suffix", "modalities", "audio", "prediction", "verbosity"),
            *("web_search_options", "moderation", "custom_params", "session_id", "session_params", "input_ids"),
            *("return_hidden_states", "return_routed_experts", "routed_experts_start_len", "return_token_ids"),
            *("return_prompt_token_ids", "return_cached_tokens_details", "return_meta_info", "custom_labels"),
            *("max_dynamic_patch", "min_dynamic_patch", "use_audio_in_video", "images_config"),
            *("bootstrap_host", "bootstrap_port", "bootstrap_room"),
            *("routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank"),
        ),
        "it is not supported in batches",
    ),
}
"""Names of OpenAI's and SGLang's that would change the answer, and why they are not taken."""


class BodySettings(NamedTuple):
    """What a body asks for beside its prompt.

    Attributes:
        sampling: How to sample it.
        sets_limit: The body itself limits the output.
        chat: What a chat asks for beside its messages; None where that is nothing.
        namespace: Prompts of different namespaces never share KV.
        echo: The answer repeats the prompt.
        echoes_logprobs: With log probabilities.
    """

    sampling: SamplingParams
    sets_limit: bool
    chat: ChatOptions | None = None
    namespace: str = ""
    echo: bool = False
    echoes_logprobs: bool = False


def settings_part(body: Mapping[str, Any], kind: RowKind) -> dict[str, Any]:
    """The part of a body that `read_body` reads: all but prompt, model and bookkeeping."""
    prompt = PROMPT_FIELD[kind]
    return {k: v for k, v in body.items() if k not in IGNORED and k not in (prompt, "model")}


def asks_nothing(name: str, value: object) -> bool:
    """The value says nothing: null, false, empty, or the default of this name written out."""
    if value is None or (isinstance(value, (str, list, dict)) and not value):
        return True
    defaults = _DEFAULTS.get(name, (False, 0, 0.0))
    return any(type(value) is type(default) and value == default for default in defaults)


def read_body(
    body: Mapping[str, Any],
    kind: RowKind,
    *,
    defaults: SamplingParams,
    chosen: Collection[str],
    json_schema: checks.Check,
) -> BodySettings:
    """Reads what a body asks for beside its prompt.

    Args:
        body: As from `settings_part`.
        defaults: The job's; its ``max_new_tokens`` holds for chat rows that set no limit.
        chosen: Fields of ``defaults`` that the job's user has set.
        json_schema: How a JSON schema is checked.

    Raises:
        RowError: A name is unknown or not supported, a value is wrong, or two contradict.
    """
    fields = {**_FIELDS[kind], "json_schema": SamplingField("json_schema", json_schema)}
    named: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in body.items():
        if name == "response_format":
            _read_format(value, settings, json_schema)
        elif name == "logprobs" and kind == "completions":
            if value is not None and value is not False:
                settings |= {"logprobs": True, "top_logprobs": NUM_ALTERNATIVES(name, value)}
        elif name in fields:
            named[name] = value
        elif name in _CHAT_FIELDS and kind == "chat":
            if not asks_nothing(name, value) or name == "tool_choice":
                options[name] = checks.writable(name, _CHAT_FIELDS[name](name, value))
        elif name not in _NAMESPACE and not (name == "echo" and kind == "completions"):
            _refuse(name, value, kind)
    if kind == "chat" and named.get("max_completion_tokens") is not None:
        named.pop("max_tokens", None)  # as on the server
    for target, value in read_settings(named, fields).items():
        put_setting(settings, target, value, name=target)
    given = "max_new_tokens" in settings
    limit_name = "max_tokens" if named.get("max_completion_tokens") is None else "max_completion_tokens"
    if kind == "completions":
        defaults = dataclasses.replace(defaults, max_new_tokens=COMPLETION_MAX_TOKENS)
    unset = tuple(name for name in _MODEL_RECOMMENDS if name not in settings and name not in chosen)
    echo = _echo(body) if kind == "completions" else False
    if echo and settings.get("logprobs"):  # of the prompt too
        settings["prompt_logprobs"] = max(settings["top_logprobs"], settings.get("prompt_logprobs", 0))
    return BodySettings(
        checked(apply_settings(settings, defaults, least="min_tokens", limit=limit_name), name=limit_name),
        given,
        _chat_options(options, settings, unset) if kind == "chat" else None,
        "".join(checks.text(name, body[name]) for name in _NAMESPACE if body.get(name)),
        echo,
        echo and bool(settings.get("logprobs")),
    )


def _echo(body: Mapping[str, Any]) -> bool:
    return body.get("echo") is not None and bool(checks.boolean("echo", body["echo"]))


def _chat_options(options: dict[str, Any], settings: Mapping[str, Any], unset: tuple[str, ...]) -> ChatOptions:
    choice = options.get("tool_choice")
    if choice is None or (isinstance(choice, str) and choice in ("none", "auto") and "tools" not in options):
        options.pop("tool_choice", None)
    if settings.get("ignore_eos"):
        options["ignore_eos"] = True  # a named template then adds no stop strings
    return ChatOptions(fields=options, unset=unset)


def _read_format(value: object, settings: dict[str, Any], json_schema: checks.Check) -> None:
    """Reads ``response_format``."""
    if asks_nothing("response_format", value):
        return
    if not isinstance(value, dict):
        raise _bad_format("response_format", f"must be an object, not {checks.show(value)}")
    kind = value.get("type")
    if kind == "text":
        return
    if kind == "json_object":
        put_setting(settings, "json_schema", '{"type":"object"}', name="response_format")
    elif kind == "structural_tag":
        put_setting(
            settings, "structural_tag", checks.structural_tag_text("response_format", value), name="response_format"
        )
    elif kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else value.get("schema")
        if schema is None:
            raise _bad_format("response_format.json_schema", 'must be {"name": ..., "schema": {...}}')
        text = json_schema("response_format.json_schema.schema", schema)
        put_setting(settings, "json_schema", text, name="response_format")
    else:
        wanted = "text, json_object, json_schema or structural_tag"
        raise _bad_format("response_format.type", f"must be {wanted}, not {checks.show(kind)}")


def _refuse(name: str, value: object, kind: RowKind) -> None:
    if asks_nothing(name, value):
        if name in REFUSED or name in _CHAT_FIELDS or name in _DEFAULTS:
            return
    elif name in REFUSED:
        raise RowError(f"{name}: {REFUSED[name]}; leave it out", code="unsupported_parameter", param=name)
    elif name in _CHAT_FIELDS:
        raise RowError(f"{name}: only chats have it; leave it out", code="unsupported_parameter", param=name)
    known = {*_FIELDS[kind], *(_CHAT_FIELDS if kind == "chat" else ("echo",)), PROMPT_FIELD[kind], "model", "logprobs"}
    known |= {"response_format", *_NAMESPACE}
    raise unknown_name(name, known)


def check_names(body: Mapping[str, Any], known: Collection[str], refused: Mapping[str, str]) -> None:
    """Checks that every name of a body is known, or says nothing about the answer.

    Args:
        body: The body.
        known: Names that are read.
        refused: Why each of some other names is not taken, where it asks for something.

    Raises:
        RowError: One is refused, or not known.
    """
    for name, value in body.items():
        if name in known or name in IGNORED:
            continue
        if name not in refused:
            raise unknown_name(name, known)
        if not asks_nothing(name, value):
            raise RowError(f"{name}: {refused[name]}", code="unsupported_parameter", param=name)


def unknown_name(name: str, known: Collection[str]) -> RowError:
    """The error of a body with a name that nobody knows."""
    return RowError(
        f"unknown body field {checks.show(name)}{checks.closest(name, known)}", code="unknown_parameter", param=name
    )


def _bad_format(name: str, what: str) -> RowError:
    return RowError(f"{name} {what}", code="invalid_response_format", param=name)
