"""OpenAI batch rows: both urls, their names and defaults, and every refusal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as legacy_create_params
from openai.types.chat import completion_create_params

from batchllm.dataset import BadRow, Row, read_rows
from batchllm.dataset.openai_body import REFUSED
from batchllm.request import SamplingParams

HELLO = [{"role": "user", "content": "hi"}]


def line(url: str, body: object, **fields: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": url, "body": body, **fields}


def completion(**body: Any) -> dict[str, Any]:
    return line("/v1/completions", {"model": "m", "prompt": "hi", **body})


def chat(**body: Any) -> dict[str, Any]:
    return line("/v1/chat/completions", {"model": "m", "messages": HELLO, **body})


def read_one(record: dict[str, Any], **options: Any) -> Row | BadRow:
    options.setdefault("defaults", SamplingParams(max_new_tokens=99))
    (only,) = read_rows(io.BytesIO(json.dumps(record).encode()), **options)
    return only


def good(record: dict[str, Any], **options: Any) -> Row:
    row = read_one(record, **options)
    assert isinstance(row, Row), row
    return row


def bad(record: dict[str, Any]) -> BadRow:
    row = read_one(record)
    assert isinstance(row, BadRow), row
    return row


def test_completion_row_keeps_id_model_and_prompt() -> None:
    row = good(completion())
    assert (row.kind, row.given_id, row.model) == ("completions", "c", "m")
    assert (row.request.row_id, row.request.prompt) == ("c", "hi")


def test_chat_row_keeps_its_messages() -> None:
    row = good(chat())
    assert (row.kind, row.request.messages, row.request.prompt) == ("chat", HELLO, None)


def test_completion_without_limit_gets_openais_16() -> None:
    row = good(completion())
    assert row.request.sampling == SamplingParams(max_new_tokens=16)
    assert row.request.may_lower_max_new_tokens


def test_chat_without_limit_gets_the_jobs_default() -> None:
    assert good(chat()).request.sampling.max_new_tokens == 99
    row = good(chat(), default_max_new_tokens=5000)
    assert row.request.sampling.max_new_tokens == 5000
    assert row.request.may_lower_max_new_tokens


def test_the_job_decides_what_a_row_leaves_out() -> None:
    assert good(chat(), defaults=SamplingParams(temperature=0.0)).request.sampling.temperature == 0


def test_every_sampling_field_of_the_body_is_read() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": "x",
        "seed": 1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "top_k": 3,
        "min_p": 0.3,
        "min_tokens": 4,
        "repetition_penalty": 1.1,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "regex": "a+",
        "skip_special_tokens": False,
        "stream": False,
        "user": "me",
    }
    expected: dict[str, Any] = {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ("x",),
        "seed": 1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "top_k": 3,
        "min_p": 0.3,
        "min_new_tokens": 4,
        "repetition_penalty": 1.1,
        "stop_token_ids": (7,),
        "ignore_eos": True,
        "regex": "a+",
        "skip_special_tokens": False,
    }
    for record in (completion(**fields), chat(**fields)):
        row = good(record)
        assert row.request.sampling == SamplingParams(**expected)
        assert not row.request.may_lower_max_new_tokens


def test_completion_logprobs_is_a_number_of_alternatives() -> None:
    sampling = good(completion(logprobs=3)).request.sampling
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 3)
    sampling = good(completion(logprobs=0)).request.sampling
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 0)
    assert not good(completion(logprobs=None)).request.sampling.logprobs


def test_chat_logprobs_is_a_switch_beside_top_logprobs() -> None:
    sampling = good(chat(logprobs=True, top_logprobs=4)).request.sampling
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 4)


def test_max_completion_tokens_is_the_new_name_of_max_tokens_and_holds_beside_it() -> None:
    assert good(chat(max_completion_tokens=8)).request.sampling.max_new_tokens == 8
    both = chat(max_completion_tokens=8, max_tokens=9)
    assert good(both).request.sampling.max_new_tokens == 8


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("a", "a", None),
        (["a"], "a", None),
        ([1, 2], None, [1, 2]),
        ([[1, 2]], None, [1, 2]),
    ],
)
def test_prompt_is_text_or_ids_or_a_list_of_one(prompt: object, text: str | None, ids: list[int] | None) -> None:
    request = good(completion(prompt=prompt)).request
    assert request.prompt == text
    assert (None if request.input_ids is None else list(request.input_ids)) == ids
    assert request.prompts is None


def test_a_prompt_of_several_is_one_row_with_the_samples_of_each() -> None:
    row = good(completion(prompt=["a", "b"], n=3))
    assert row.request.prompts == ["a", "b"] and row.request.prompt is None
    assert (row.head.num_prompts, row.head.num_samples, row.head.echo) == (2, 6, None)
    row = good(completion(prompt=[[1, 2], [3]], echo=True))
    assert [list(ids) for ids in row.request.prompts or ()] == [[1, 2], [3]] == row.head.echo


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        (None, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_response_format_becomes_a_json_schema(response_format: object, schema: object) -> None:
    text = good(chat(response_format=response_format)).request.sampling.json_schema
    assert (None if text is None else json.loads(text)) == schema


DOCUMENTED_DEFAULTS: dict[str, Any] = {
    "audio": None,
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": None,
    "logprobs": False,
    "max_completion_tokens": None,
    "max_tokens": None,
    "metadata": {},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "prediction": None,
    "presence_penalty": 0,
    "prompt_cache_key": "",
    "reasoning_effort": "medium",
    "response_format": {"type": "text"},
    "safety_identifier": "",
    "seed": None,
    "service_tier": "auto",
    "stop": None,
    "store": False,
    "stream": False,
    "stream_options": None,
    "suffix": None,
    "temperature": 1,
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "user": "",
    "verbosity": "medium",
    "web_search_options": None,
}
"""Of every field of OpenAI's two bodies what its documentation gives as the default, or nothing."""


@pytest.mark.parametrize("value_of", [DOCUMENTED_DEFAULTS.__getitem__, lambda name: None], ids=["defaults", "null"])
@pytest.mark.parametrize(
    ("make", "definition"),
    [
        (chat, completion_create_params.CompletionCreateParamsNonStreaming),
        (completion, legacy_create_params.CompletionCreateParamsNonStreaming),
    ],
    ids=["chat", "completions"],
)
def test_every_field_that_the_openai_client_knows_may_be_written_out_at_its_default(
    make: Callable[..., dict[str, Any]], definition: Any, value_of: Callable[[str], Any]
) -> None:
    """And the row is the one that leaves them all out."""
    names = get_type_hints(definition).keys() - {"messages", "model", "prompt"}
    row, bare = good(make(**{name: value_of(name) for name in names})), good(make())
    assert row.request.sampling == bare.request.sampling
    assert row.request.namespace == "" and not row.echoes


@pytest.mark.parametrize("value", [None, "", [], {}, False])
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"add_generation_prompt"}))
def test_what_is_not_supported_may_be_there_and_say_nothing(name: str, value: object) -> None:
    assert good(chat(**{name: value})).request.chat == good(chat()).request.chat


def test_what_a_chat_asks_for_beside_its_messages_goes_to_sglang() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = good(chat(tools=tools, tool_choice="none", reasoning_effort="low", parallel_tool_calls=True, temperature=0))
    assert row.request.chat is not None
    assert row.request.chat.fields == {"tools": tools, "tool_choice": "none", "reasoning_effort": "low"}
    assert row.request.chat.unset == ("top_p", "top_k", "min_p", "repetition_penalty")
    assert row.head.chat == {**row.request.chat.fields, "messages": []}


@pytest.mark.parametrize("name", ["parallel_tool_calls", "separate_reasoning"])
def test_what_is_on_by_default_may_be_switched_off(name: str) -> None:
    row = good(chat(**{name: False}))
    assert row.request.chat is not None and row.request.chat.fields == {name: False}
    assert good(chat(**{name: True})).request.chat == good(chat()).request.chat


def test_what_the_user_of_a_job_has_chosen_is_not_left_to_the_model() -> None:
    row = good(chat(top_p=0.5), chosen={"temperature"})
    assert row.request.chat is not None and row.request.chat.unset == ("top_k", "min_p", "repetition_penalty")


def test_salts_of_the_cache_are_a_namespace() -> None:
    assert good(chat(cache_salt="a", extra_key="b")).request.namespace == "ab"
    assert good(completion(cache_salt="a")).request.namespace == "a"


def test_logit_bias_is_pairs_by_ascending_id() -> None:
    assert good(chat(logit_bias={"10": -100, "9": 2.5})).request.sampling.logit_bias == ((9, 2.5), (10, -100.0))


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"annotations": [{"type": "url_citation"}]},
        {"name": "", "tool_calls": [], "parsed": None},
    ],
)
def test_a_message_as_a_client_writes_it_is_taken(more: dict[str, Any]) -> None:
    messages = [{"role": "assistant", "content": None} | more, *HELLO]
    assert good(chat(messages=messages)).request.messages == messages


FAULTS: list[tuple[dict[str, Any], str, str | None]] = [
    (line("/v1/moderations", {}), "invalid_url", "url"),
    (line("", {}), "invalid_url", "url"),
    ({"custom_id": "c", "method": "POST", "body": {}}, "invalid_url", "url"),
    (line("/v1/completions", {"prompt": "x"}, method="GET"), "invalid_method", "method"),
    ({"custom_id": "c", "url": "/v1/completions", "body": {}}, "invalid_method", "method"),
    (line("/v1/completions", None), "invalid_body", "body"),
    (line("/v1/completions", []), "invalid_body", "body"),
    (line("/v1/completions", {"prompt": "x"}, extra=1), "unknown_field", "extra"),
    (line("/v1/completions", {}), "missing_prompt", "prompt"),
    (line("/v1/chat/completions", {"prompt": "x"}), "unknown_parameter", "prompt"),
    (line("/v1/chat/completions", {}), "missing_prompt", "messages"),
    (completion(prompt=""), "empty_prompt", "prompt"),
    (completion(prompt=[]), "empty_prompt", "prompt"),
    (completion(prompt=[""]), "empty_prompt", "prompt[0]"),
    (completion(prompt=[[]]), "empty_prompt", "prompt[0]"),
    (completion(prompt=["a", ""]), "empty_prompt", "prompt[1]"),
    (completion(prompt=["a", [1]]), "invalid_prompt", "prompt[1]"),
    (completion(prompt=[[1], "a"]), "invalid_input_ids", "prompt[1]"),
    (completion(prompt=3), "invalid_prompt", "prompt"),
    (completion(prompt=[1, "a"]), "invalid_input_ids", "prompt"),
    (completion(prompt=[True]), "invalid_input_ids", "prompt"),
    (chat(messages=[]), "empty_prompt", "messages"),
    (chat(model=3), "invalid_parameter_type", "model"),
    (chat(user=3), "invalid_parameter_type", "user"),
    (chat(stream=True), "unsupported_parameter", "stream"),
    (completion(tools=[{}]), "unsupported_parameter", "tools"),
    (chat(tools={"a": 1}), "invalid_parameter_type", "tools"),
    (chat(echo=True), "unsupported_parameter", "echo"),
    (completion(echo=True, logprobs=0, n=2), "conflicting_parameters", "n"),
    (completion(max_tokens=0), "parameter_out_of_range", "max_tokens"),
    (completion(max_tokens=0, echo=True), "parameter_out_of_range", "max_tokens"),
    (completion(prompt_logprobs=-1), "parameter_out_of_range", "prompt_logprobs"),
    (chat(max_completion_tokens=0), "parameter_out_of_range", "max_completion_tokens"),
    (completion(echo=1), "invalid_parameter_type", "echo"),
    (chat(verbosity="high"), "unsupported_parameter", "verbosity"),
    (chat(lora_path=["x"]), "invalid_parameter_type", "lora_path"),
    (completion(lora_path=3), "invalid_parameter_type", "lora_path"),
    (chat(add_generation_prompt="no"), "unsupported_parameter", "add_generation_prompt"),
    (chat(continue_final_message="yes"), "invalid_parameter_type", "continue_final_message"),
    (chat(logit_bias={"a": 1}), "parameter_out_of_range", None),
    (chat(logit_bias={"3": "x"}), "invalid_parameter_type", "logit_bias[3]"),
    (chat(cache_salt=3), "invalid_parameter_type", "cache_salt"),
    (chat(ebnf=3), "invalid_parameter_type", "ebnf"),
    (chat(ebnf="root ::= 'a'", regex="a"), "conflicting_parameters", "ebnf"),
    (chat(stop_regex="a+", min_tokens=3), "conflicting_parameters", "stop_regex"),
    (chat(stop_regex=["a+", "(b"]), "invalid_regex", "stop_regex"),
    (completion(stop_regex="a{1,99999999999}"), "invalid_regex", "stop_regex"),
    (completion(min_tokens=5, max_tokens=3), "conflicting_parameters", "min_tokens"),
    (completion(logit_bias={"x": 1}), "parameter_out_of_range", "logit_bias"),
    (chat(max_token=3), "unknown_parameter", "max_token"),
    (completion(max_completion_tokens=3), "unknown_parameter", "max_completion_tokens"),
    (completion(max_tokens=0), "parameter_out_of_range", "max_tokens"),
    (completion(logprobs=True), "invalid_parameter_type", "logprobs"),
    (completion(logprobs=21), "parameter_out_of_range", "logprobs"),
    (chat(logprobs=3), "invalid_parameter_type", "logprobs"),
    (chat(top_logprobs=3), "conflicting_parameters", "top_logprobs"),
    (chat(response_format="json"), "invalid_response_format", "response_format"),
    (chat(response_format={"type": "xml"}), "invalid_response_format", "response_format.type"),
    (
        chat(response_format={"type": "json_schema"}),
        "invalid_response_format",
        "response_format.json_schema",
    ),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": "{"}}),
        "invalid_json_schema",
        "response_format.json_schema.schema",
    ),
    (chat(response_format={"type": "json_object"}, regex="a"), "conflicting_parameters", "regex"),
    (
        chat(response_format={"type": "json_object"}, json_schema={}),
        "conflicting_parameters",
        "json_schema",
    ),
]


@pytest.mark.parametrize(("record", "code", "param"), FAULTS)
def test_fault_has_its_code_and_field(record: dict[str, Any], code: str, param: str | None) -> None:
    row = bad(record)
    assert (row.code, row.given_id) == (code, "c")
    assert row.kind in ("chat", "completions")
    if param is not None:
        assert row.param == param


def test_unknown_body_field_is_refused_with_the_nearest_known_one() -> None:
    assert "did you mean 'max_tokens'?" in bad(chat(max_tokenz=3)).message
    assert "did you mean 'temperature'?" in bad(completion(temprature=3)).message


@pytest.mark.parametrize("missing", [{}, {"custom_id": None}])
def test_custom_id_is_needed(missing: dict[str, Any]) -> None:
    record = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}, **missing}
    row = bad(record)
    assert (row.code, row.given_id, row.param) == ("missing_id", None, "custom_id")


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        ({}, None),
        ({"lora_path": None}, None),
        ({"lora_path": ""}, None),
        ({"lora_path": "x"}, "x"),
        ({"model": "base:x"}, "x"),
        ({"model": " base : x "}, "x"),
        ({"model": "base:"}, None),
        ({"model": "base:x", "lora_path": "y"}, "x"),
        ({"model": "base", "lora_path": "y"}, "y"),
    ],
)
def test_an_adapter_is_named_as_on_the_server(
    make: Callable[..., dict[str, Any]], body: dict[str, Any], adapter: str | None
) -> None:
    """The model's name wins over lora_path, as in SGLang's ``OpenAIServingBase._resolve_lora_path``."""
    row = read_one(make(**body))
    assert isinstance(row, Row), row
    assert row.request.sampling.lora_path == adapter
