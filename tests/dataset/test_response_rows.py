"""What rows of responses are as chats, what is refused of them, and what their output lines have."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from batchllm.dataset import BadRow, Row, read_rows, render_success
from batchllm.request import Completion, SamplingParams


def read(body: Any, **options: Any) -> Row | BadRow:
    record = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams(**options))
    return row


def good(**body: Any) -> Row:
    row = read(body)
    assert isinstance(row, Row), row
    return row


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "hi"}, [user("hi")]),
        ({"input": "hi", "instructions": "x"}, [{"role": "system", "content": "x"}, user("hi")]),
        (
            {
                "input": [
                    user([{"type": "input_text", "text": "a"}]),
                    {"role": "developer", "content": [{"type": "input_text", "text": "y"}]},
                ],
                "instructions": "x",
            },
            [{"role": "system", "content": "x\n\ny"}, user([{"type": "text", "text": "a"}])],
        ),
        (
            {
                "input": [
                    user("a"),
                    {"type": "message", "role": "assistant", "content": "b"},
                    {"role": "assistant", "content": "c"},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "d"}]},
                    user("e"),
                ]
            },
            [
                user("a"),
                {"role": "assistant", "content": [{"type": "text", "text": "b\n\nc"}, {"type": "text", "text": "d"}]},
                user("e"),
            ],
        ),
    ],
)
def test_a_response_is_a_chat_in_other_words(body: Any, messages: Any) -> None:
    row = good(**body)
    assert (row.kind, row.request.messages) == ("responses", messages)


def test_what_a_response_says_of_sampling_is_a_chats() -> None:
    said_nothing = {"store": True, "truncation": "disabled", "text": {"format": {"type": "text"}}, "tools": []}
    row = good(input="hi", max_output_tokens=5, temperature=0.5, stop="x", metadata={"task": "t"}, **said_nothing)
    assert row.request.sampling == SamplingParams(max_new_tokens=5, temperature=0.5, stop=("x",))
    assert (row.request.task, row.request.may_lower_max_new_tokens) == ("t", False)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_prompt", "input"),
        ({"input": []}, "missing_prompt", "input"),
        ({"input": "a", "tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"input": "a", "previous_response_id": "r"}, "unsupported_parameter", "previous_response_id"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "unsupported_parameter", "text"),
        ({"input": "a", "reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning"),
        ({"input": "a", "background": True}, "unsupported_parameter", "background"),
        ({"input": "a", "truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"input": "a", "max_output_tokens": 0}, "parameter_out_of_range", "max_output_tokens"),
        ({"input": "a", "max_tokens": 3}, "unknown_parameter", "max_tokens"),
        ({"input": [{"type": "function_call"}]}, "unsupported_content", "input[0]"),
        ({"input": [user([{"type": "input_image"}])]}, "unsupported_content", "input[0].content[0]"),
        ({"input": [user("a"), {"role": "tool", "content": "x"}]}, "invalid_messages", "input[1].role"),
        ({"input": "a", "instructions": 3}, "invalid_parameter_type", "instructions"),
    ],
)
def test_all_but_text_is_refused_by_name(body: Any, code: str, param: str) -> None:
    row = read(body)
    assert isinstance(row, BadRow)
    assert (row.code, row.param, row.kind) == (code, param, "responses")
    assert param in row.message


def test_a_response_has_one_answer() -> None:
    row = read({"input": "a"}, n=2)
    assert isinstance(row, BadRow) and row.param == "n"


@pytest.mark.parametrize(("reason", "status"), [("stop", "completed"), ("length", "incomplete")])
def test_an_answer_is_openais_object(reason: Any, status: str) -> None:
    row = good(input="a", instructions="i", temperature=0)
    sample = Completion(index=0, text="yes", output_ids=[1, 2], finish_reason=reason, prompt_tokens=7, cached_tokens=3)
    line = render_success(row.head, [sample], model="m", created=9, decode=str, decode_prompt=str)
    body = line["response"]["body"]
    assert (body["object"], body["status"], body["model"], body["created_at"]) == ("response", status, "m", 9)
    assert body["output"][0]["content"] == [{"type": "output_text", "text": "yes", "annotations": []}]
    assert (body["incomplete_details"] is None) == (status == "completed")
    assert (body["instructions"], body["temperature"], body["metadata"]) == ("i", 0, {})
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 3}
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"], body["usage"]["total_tokens"]) == (7, 2, 9)
