"""Output lines: OpenAI's own types read them back, and the same run writes the same bytes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

from batchllm.dataset import (
    BadRow,
    Row,
    duplicate_error,
    find_abort,
    read_rows,
    reject,
    render_error,
    render_success,
)
from batchllm.dataset.logprobs import completion_logprobs
from batchllm.errors import RowError
from batchllm.request import Completion, SamplingParams, TokenLogprob

PIECES: dict[int, bytes] = {1: b"Hel", 2: b"lo", 3: "é".encode()[:1], 4: "é".encode()[1:], 5: b"!"}
LOGPROBS = tuple(TokenLogprob(token_id=i, logprob=-0.5 * i, top=((i, -0.5 * i), (5, -3.0))) for i in (1, 2, 3, 4))


def read_one(record: dict[str, Any]) -> Row:
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams())
    assert isinstance(row, Row), row
    return row


def chat_row(**body: Any) -> Row:
    messages = [{"role": "user", "content": "hi"}]
    return read_one(
        {
            "custom_id": "c-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": messages, **body},
        }
    )


def completion_row(**body: Any) -> Row:
    return read_one(
        {
            "custom_id": "c-1",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "hi", **body},
        }
    )


def plain_row(**fields: Any) -> Row:
    return read_one({"id": 7, "prompt": "hi", **fields})


def sample(**fields: Any) -> Completion:
    given: dict[str, Any] = {
        "index": 0,
        "text": "Helloé",
        "output_ids": (1, 2, 3, 4),
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "cached_tokens": 8,
        **fields,
    }
    return Completion(**given)


def render(row: Row, *samples: Completion, job_seed: int = 0) -> dict[str, Any]:
    line = render_success(
        row.head,
        samples,
        model="served",
        created=1700000000,
        decode=PIECES.__getitem__,
        decode_prompt=lambda ids: f"<{list(ids)}>",
        job_seed=job_seed,
    )
    read_back: dict[str, Any] = json.loads(orjson.dumps(line))
    return read_back


def test_chat_answer_is_a_chat_completion_to_openais_client() -> None:
    line = render(chat_row(), sample())
    assert line["custom_id"] == "c-1"
    assert line["id"].startswith("batch_req_")
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["request_id"].startswith("req_")
    body = ChatCompletion.model_validate(line["response"]["body"])
    assert body.id.startswith("chatcmpl-")
    assert (body.model, body.created) == ("served", 1700000000)
    (choice,) = body.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Helloé")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert body.usage is not None and body.usage.prompt_tokens_details is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (10, 4)
    assert body.usage.total_tokens == 14
    assert body.usage.prompt_tokens_details.cached_tokens == 8


@pytest.mark.parametrize("make", [chat_row, completion_row])
@pytest.mark.parametrize("matched", [2, "é", None])
def test_a_choice_says_what_ended_it_as_on_the_live_route(make: Callable[[], Row], matched: int | str | None) -> None:
    (choice,) = render(make(), sample(matched_stop=matched))["response"]["body"]["choices"]
    assert choice.get("matched_stop") == matched


def test_completion_answer_is_a_text_completion_to_openais_client() -> None:
    line = render(completion_row(model="mine"), sample(finish_reason="length"))
    body = TextCompletion.model_validate(line["response"]["body"])
    assert body.id.startswith("cmpl-")
    assert (body.model, body.object) == ("mine", "text_completion")
    (choice,) = body.choices
    assert (choice.text, choice.finish_reason) == ("Helloé", "length")


def test_chat_logprobs_keep_the_bytes_of_half_characters() -> None:
    row = chat_row(logprobs=True, top_logprobs=2)
    line = render(row, sample(logprobs=LOGPROBS))
    logprobs = ChatCompletion.model_validate(line["response"]["body"]).choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.bytes for token in logprobs.content] == [list(PIECES[i]) for i in (1, 2, 3, 4)]
    assert logprobs.content[0].token == "Hel"
    assert logprobs.content[0].logprob == -0.5
    assert [top.token for top in logprobs.content[1].top_logprobs] == ["lo", "!"]


def test_completion_logprobs_offsets_count_characters() -> None:
    line = render(completion_row(logprobs=2), sample(logprobs=LOGPROBS))
    logprobs = TextCompletion.model_validate(line["response"]["body"]).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 3, 5, 5]
    assert logprobs.tokens is not None and logprobs.tokens[:2] == ["Hel", "lo"]
    assert logprobs.token_logprobs == [-0.5, -1.0, -1.5, -2.0]
    assert logprobs.top_logprobs is not None
    assert list(logprobs.top_logprobs[0].items()) == [("Hel", -0.5), ("!", -3.0)]  # the likeliest first, as live


def test_completion_logprobs_without_alternatives_have_none() -> None:
    line = render(completion_row(logprobs=0), sample(logprobs=LOGPROBS))
    assert line["response"]["body"]["choices"][0]["logprobs"]["top_logprobs"] is None


def test_alternatives_that_look_alike_keep_the_likelier() -> None:
    token = TokenLogprob(token_id=3, logprob=-1.0, top=((3, -1.0), (4, -2.0)))
    line = render(completion_row(logprobs=2), sample(logprobs=(token,)))
    assert line["response"]["body"]["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -1.0}]


def test_decode_may_give_text_instead_of_bytes() -> None:
    line = render_success(
        completion_row(logprobs=0).head,
        [sample(logprobs=LOGPROBS[:2], text="<1><2>")],
        model="m",
        created=0,
        decode=lambda token_id: f"<{token_id}>",
        decode_prompt=lambda ids: f"<{list(ids)}>",
    )
    logprobs = line["response"]["body"]["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["<1>", "<2>"], [0, 3])


@pytest.mark.parametrize(
    ("text", "pieces", "offsets"),
    [
        ("Hello", ["Hel", "lo", "</s>"], [0, 3, 5]),
        ("Hello", [" Hel", "lo"], [0, 3]),
        ("é!", [b"\xc3", b"\xa9", "!"], [0, 0, 1]),
        ("ab", ["a", "bc", "d"], [0, 1, 1]),
        ("a\ufffdb", ["a", b"\xe2\x80", "b"], [0, 1, 1]),
        ("", ["</s>"], [0]),
    ],
    ids=["end token", "space taken away", "half a character", "stop string", "never completed", "nothing"],
)
def test_text_offset_lies_in_the_text(text: str, pieces: list[bytes | str], offsets: list[int]) -> None:
    tokens = [TokenLogprob(token_id=i, logprob=-1.0) for i in range(len(pieces))]
    assert completion_logprobs(tokens, pieces.__getitem__, text, with_top=False)["text_offset"] == offsets


def test_row_at_fault_is_a_400_with_its_code() -> None:
    """It would fail again; what the engine could not do is a 500."""
    fault = sample(finish_reason="abort", error="regex is refused: a", error_code="invalid_grammar")
    bad = find_abort(completion_row().head, [fault])
    assert bad is not None and (bad.status_code, bad.code) == (400, "invalid_grammar")
    ours = find_abort(completion_row().head, [sample(finish_reason="abort", error="a")])
    assert ours is not None and (ours.status_code, ours.code) == (500, "aborted")


def test_note_of_an_answer_stands_in_every_format() -> None:
    noted = sample(note="the grammar ended it")
    assert render(chat_row(), noted)["response"]["body"]["choices"][0]["note"] == "the grammar ended it"
    assert render(read_one({"prompt": "a"}), noted)["note"] == "the grammar ended it"
    assert "note" not in render(read_one({"prompt": "a"}), sample())


@settings(deadline=None)
@given(text=st.text(max_size=5), pieces=st.lists(st.text(max_size=3) | st.binary(max_size=3), max_size=6))
def test_text_offset_never_goes_back_or_beyond_the_text(text: str, pieces: list[bytes | str]) -> None:
    tokens = [TokenLogprob(token_id=i, logprob=-1.0) for i in range(len(pieces))]
    offsets = completion_logprobs(tokens, pieces.__getitem__, text, with_top=False)["text_offset"]
    assert offsets == sorted(offsets) and all(0 <= offset <= len(text) for offset in offsets)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_logprob_json_cannot_hold_is_written_as_openai_writes_it(value: float) -> None:
    token = TokenLogprob(token_id=1, logprob=value, top=((1, value),))
    row = plain_row(sampling_params={"logprobs": True, "top_logprobs": 1})
    (written,) = render(row, sample(logprobs=(token,)))["logprobs"]
    assert written == {
        "token_id": 1,
        "logprob": -9999.0,
        "top": [{"token_id": 1, "logprob": -9999.0}],
    }


def test_plain_answer_has_the_id_as_given_and_nothing_not_asked_for() -> None:
    assert render(plain_row(), sample(logprobs=LOGPROBS)) == {
        "id": 7,
        "text": "Helloé",
        "output_ids": [1, 2, 3, 4],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "cached_tokens": 8, "completion_tokens": 4},
    }


def test_plain_answer_says_what_stopped_it() -> None:
    assert render(plain_row(), sample(matched_stop="\n"))["matched_stop"] == "\n"
    assert render(plain_row(), sample(matched_stop=0))["matched_stop"] == 0


def test_samples_come_in_their_order_and_the_prompt_counts_once() -> None:
    samples = [sample(sample=1, text="b", cached_tokens=10), sample(sample=0, text="a")]
    line = render(plain_row(sampling_params={"n": 2}), *samples)
    assert [(c["index"], c["text"]) for c in line["choices"]] == [(0, "a"), (1, "b")]
    assert line["usage"] == {"prompt_tokens": 10, "cached_tokens": 8, "completion_tokens": 8}
    body = ChatCompletion.model_validate(render(chat_row(n=2), *samples)["response"]["body"])
    assert [choice.message.content for choice in body.choices] == ["a", "b"]
    assert body.usage is not None and body.usage.total_tokens == 18


def test_same_row_answer_and_seed_give_the_same_bytes() -> None:
    first, again = (render(chat_row(), sample()) for _ in range(2))
    assert first == again
    assert render(chat_row(), sample(), job_seed=1)["id"] != first["id"]


def test_an_aborted_sample_makes_the_row_an_error_of_ours() -> None:
    row = chat_row(n=2)
    done = sample()
    assert find_abort(row.head, [done]) is None
    bad = find_abort(row.head, [done, sample(sample=1, finish_reason="abort", error="pool is gone")])
    assert bad is not None
    line = render_error(bad)
    assert line["response"]["status_code"] == 500
    assert line["error"] is None
    error = line["response"]["body"]["error"]
    assert (error["code"], error["type"]) == ("aborted", "server_error")
    assert "pool is gone" in error["message"]


def test_openai_error_line_has_the_status_and_body_of_an_http_failure() -> None:
    error = RowError("too long", code="prompt_too_long", param="prompt")
    line = render_error(reject(chat_row().head, error))
    assert line["custom_id"] == "c-1"
    assert line["response"]["status_code"] == 400
    assert line["error"] is None
    assert line["response"]["body"] == {
        "error": {
            "message": "line 1: too long",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "prompt_too_long",
        }
    }


def test_plain_error_line_has_code_message_line_and_field() -> None:
    line = render_error(reject(plain_row().head, RowError("no", code="empty_prompt", param="prompt")))
    assert line == {
        "id": 7,
        "error": {"code": "empty_prompt", "message": "no", "line": 1, "param": "prompt"},
    }


def test_a_line_without_id_renders_with_null() -> None:
    (bad,) = read_rows(io.BytesIO(b"{"), defaults=SamplingParams())
    assert isinstance(bad, BadRow)
    assert render_error(bad)["id"] is None


def test_a_duplicates_error_line_has_an_id_of_its_own() -> None:
    data = json.dumps(
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "x"},
        }
    ).encode()
    first, second = read_rows(io.BytesIO(data + b"\n" + data), defaults=SamplingParams())
    assert isinstance(first, Row) and isinstance(second, Row)
    refused = reject(second.head, duplicate_error("a", first.line, second.kind))
    assert render(first, sample())["id"] != render_error(refused)["id"]


@pytest.mark.parametrize("carried", [None, {}, {"text": "t", "n": None, "of": [{"a": 1}]}])
def test_lines_end_with_what_is_carried(carried: dict[str, Any] | None) -> None:
    rows = [
        msgspec.structs.replace(row, carried=carried)
        for row in (plain_row(), plain_row(sampling_params={"n": 2}), chat_row())
    ]
    samples = [[sample()], [sample(), sample(sample=1)], [sample()]]
    lines = [render(row, *answers) for row, answers in zip(rows, samples, strict=True)]
    lines += [render_error(reject(row.head, RowError("no", code="empty_prompt"))) for row in rows]
    for line in lines:
        assert line.get("carried") == carried
        assert (list(line)[-1] == "carried") == (carried is not None)


def test_a_row_of_several_prompts_has_the_choices_of_each_and_counts_each_prompt_once() -> None:
    row = completion_row(prompt=["a", "bc"], n=2)
    samples = [
        sample(sample=i, text=str(i), prompt_tokens=3 + i // 2, cached_tokens=i, output_ids=(1,)) for i in (2, 0, 3, 1)
    ]
    body = render(row, *samples)["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, str(i)) for i in range(4)]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3 + 4, 4)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0 + 2}


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hi", ["hi0", "hi1"]),
        (["a", "b"], ["a0", "a1", "b2", "b3"]),
        ([[1, 2], [3]], ["<[1, 2]>0", "<[1, 2]>1", "<[3]>2", "<[3]>3"]),
    ],
)
def test_an_echo_is_the_prompt_before_each_of_its_answers(prompt: object, texts: list[str]) -> None:
    row = completion_row(prompt=prompt, n=2, echo=True)
    body = render(row, *[sample(sample=i, text=str(i)) for i in range(len(texts))])["response"]["body"]
    assert [choice["text"] for choice in body["choices"]] == texts


def test_tool_calls_have_ids_that_are_the_same_each_time_and_differ() -> None:
    """The parsers give random ones; those that say which call of a chat it is stay."""
    calls = [
        {"id": given, "type": "function", "index": i, "function": {"name": "f", "arguments": "{}"}}
        for i, given in enumerate(["call_1234", "call_5678", "functions.f:2"])
    ]
    message = {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "hm"}
    answers = [sample(sample=i, message=message, finish_reason="tool_calls") for i in range(2)]
    first, again = (render(chat_row(n=2), *answers)["response"]["body"] for _ in range(2))
    assert first == again
    parsed = ChatCompletion.model_validate(first)
    ids = [call.id for choice in parsed.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == 5 and ids.count("functions.f:2") == 2
    assert {choice.finish_reason for choice in parsed.choices} == {"tool_calls"}
    assert first["choices"][0]["message"]["reasoning_content"] == "hm"


SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 3}}, "required": ["n"]}'


def checked(record: dict[str, Any]) -> Row:
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams(), checks_schemas=True)
    assert isinstance(row, Row), row
    return row


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"n": 6}', None),
        ('{"n": 7}', "$.n: 7 is not a multiple of 3"),
        ("{}", "$: 'n' is a required property"),
        ('{"n": 6', "the answer is not JSON"),
    ],
)
def test_an_answer_that_breaks_its_schema_says_so_where_answers_are_checked(text: str, error: str | None) -> None:
    """In both formats; the row has its answer all the same."""
    body = {"messages": [{"role": "user", "content": "hi"}]}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(SCHEMA)}}
    chat = checked({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body})
    plain = checked({"id": 7, "prompt": "hi", "sampling_params": {"json_schema": SCHEMA}})
    (choice,) = render(chat, sample(text=text))["response"]["body"]["choices"]
    answer = render(plain, sample(text=text))
    assert (choice["message"]["content"], answer["text"]) == (text, text)
    for marked in (choice, answer):
        assert ("schema_error" in marked) == (error is not None)
        assert error is None or marked["schema_error"].startswith(error)


def test_reasoning_is_no_part_of_the_answer_that_is_checked() -> None:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(SCHEMA)}}
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": format}
    row = checked({"custom_id": "c-1", "method": "POST", "url": "/v1/chat/completions", "body": body})
    kept, broken = (
        sample(text=f"<think>Hm.</think>{text}", message={"reasoning_content": "Hm.", "content": text})
        for text in ('{"n": 9}', "no JSON")
    )
    assert "schema_error" not in render(row, kept)["response"]["body"]["choices"][0]
    assert "schema_error" in render(row, broken)["response"]["body"]["choices"][0]


def test_without_the_check_such_a_schema_fails_its_row_and_other_answers_are_not_checked() -> None:
    record = {"id": 7, "prompt": "hi", "sampling_params": {"json_schema": SCHEMA}}
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams())
    assert isinstance(row, BadRow) and row.code == "unsupported_schema" and "multipleOf" in row.message
    kept = read_one({"id": 7, "prompt": "hi", "sampling_params": {"json_schema": '{"type": "object"}'}})
    assert "schema_error" not in render(kept, sample(text="no JSON"))


def test_a_schema_that_refers_elsewhere_is_not_fetched() -> None:
    schema = '{"type": "object", "properties": {"n": {"$ref": "http://127.0.0.1:9/x.json"}}}'
    row = checked({"id": 7, "prompt": "hi", "sampling_params": {"json_schema": schema}})
    assert "cannot be checked" in render(row, sample(text='{"n": 1}'))["schema_error"]
