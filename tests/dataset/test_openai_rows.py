"""OpenAI batch rows: both urls, their names and defaults, and every refusal."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from batchllm.dataset import BadRow, Row, read_rows
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


def test_max_completion_tokens_is_the_new_name_of_max_tokens() -> None:
    assert good(chat(max_completion_tokens=8)).request.sampling.max_new_tokens == 8
    both = chat(max_completion_tokens=8, max_tokens=8)
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


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    good(chat(tools=None, logit_bias={}, stream=False, functions=[], store=True, metadata={}))


FAULTS: list[tuple[dict[str, Any], str, str | None]] = [
    (line("/v1/embeddings", {}), "invalid_url", "url"),
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
    (completion(prompt=["a", "b"]), "multiple_prompts", "prompt"),
    (completion(prompt=[[1], [2]]), "multiple_prompts", "prompt"),
    (completion(prompt=3), "invalid_prompt", "prompt"),
    (completion(prompt=[1, "a"]), "invalid_input_ids", "prompt"),
    (completion(prompt=[True]), "invalid_input_ids", "prompt"),
    (chat(messages=[]), "empty_prompt", "messages"),
    (chat(model=3), "invalid_parameter_type", "model"),
    (chat(user=3), "invalid_parameter_type", "user"),
    (chat(stream=True), "unsupported_parameter", "stream"),
    (chat(tools=[{}]), "unsupported_parameter", "tools"),
    (completion(echo=True), "unsupported_parameter", "echo"),
    (chat(max_token=3), "unknown_parameter", "max_token"),
    (completion(max_completion_tokens=3), "unknown_parameter", "max_completion_tokens"),
    (completion(max_tokens=0), "parameter_out_of_range", "max_tokens"),
    (chat(max_tokens=3, max_completion_tokens=4), "conflicting_parameters", None),
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


def test_several_prompts_in_a_row_are_told_what_to_do() -> None:
    assert "one row for each" in bad(completion(prompt=["a", "b"])).message
