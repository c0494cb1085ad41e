"""What rows say of scores, how such rows are sampled, and what their output lines have."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from batchllm.dataset import BadRow, ColumnMap, Row, read_rows, render_success
from batchllm.request import Completion, PromptScore, SamplingParams, TokenLogprob

DEFAULTS = SamplingParams(max_new_tokens=64)
SCORE_ONLY = SamplingParams(max_new_tokens=0, temperature=0.0, ignore_eos=True, prompt_logprobs=0)


def read(record: dict[str, Any], **options: Any) -> Row | BadRow:
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=DEFAULTS, **options)
    return row


def good(record: dict[str, Any], **options: Any) -> Row:
    row = read(record, **options)
    assert isinstance(row, Row), row
    return row


def openai(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


def completion(**body: Any) -> dict[str, Any]:
    return openai("/v1/completions", prompt="hi", **body)


def test_a_row_that_is_scored_generates_nothing_unless_it_says_so() -> None:
    row = good({"id": "a", "prompt": "x", "score": {"from": 3}, "sampling_params": {"temperature": 2, "stop": "y"}})
    assert (row.request.score_from, row.request.sampling) == (3, SCORE_ONLY)
    row = good({"id": "a", "prompt": "x", "score": {"top": 2}, "sampling_params": {"max_new_tokens": 5}})
    assert row.request.sampling == SamplingParams(max_new_tokens=5, prompt_logprobs=2)


@pytest.mark.parametrize(("given", "kept"), [(" yes", " yes"), ([4, 5], [4, 5])])
def test_a_continuation_is_text_or_token_ids(given: Any, kept: Any) -> None:
    row = good({"id": "a", "prompt": "x", "continuation": given})
    continuation = row.request.continuation
    assert (continuation if isinstance(continuation, str) else list(continuation or ())) == kept
    assert row.request.sampling == SCORE_ONLY


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"continuation": ""}, "empty_continuation", "continuation"),
        ({"continuation": []}, "empty_continuation", "continuation"),
        ({"continuation": 3}, "invalid_parameter_type", "continuation"),
        ({"continuation": ["a"]}, "invalid_input_ids", "continuation"),
        ({"score": {"from": -1}}, "parameter_out_of_range", "score.from"),
        ({"score": {"from": "1"}}, "invalid_parameter_type", "score.from"),
        ({"score": {"top": 21}}, "parameter_out_of_range", "score.top"),
        ({"score": {"form": 1}}, "unknown_field", "score"),
        ({"score": 0.5}, "invalid_parameter_type", "score"),
        ({"score": {"from": 0}, "continuation": "y"}, "conflicting_parameters", "score"),
        ({"score": {}, "sampling_params": {"n": 2}}, "conflicting_parameters", "n"),
        ({"sampling_params": {"max_new_tokens": 0}}, "parameter_out_of_range", "max_new_tokens"),
    ],
)
def test_a_bad_score_fails_its_row(fields: dict[str, Any], code: str, param: str) -> None:
    row = read({"id": "a", "prompt": "x", **fields})
    assert isinstance(row, BadRow)
    assert (row.code, row.param) == (code, param)


def test_a_tables_own_score_is_not_a_field() -> None:
    columns = ColumnMap(prompt_column="text")
    row = good({"id": "a", "text": "x", "score": 0.5, "continuation": "y"}, columns=columns)
    assert row.request.continuation is None
    assert row.request.sampling == DEFAULTS
    row = good({"id": "a", "text": "x", "score": "{}", "continuation": "y"}, columns=columns)
    assert row.request.continuation == "y"


@pytest.mark.parametrize("columns", [ColumnMap(carry=("author",)), ColumnMap(id_column="key")])
def test_a_line_is_scored_whatever_else_is_asked_of_its_columns(columns: ColumnMap) -> None:
    line = {"key": "k", "prompt": "x", "continuation": "y", "author": "me", "score": 0.5}
    row = good(line, columns=columns)
    assert (row.request.continuation, row.request.sampling.prompt_logprobs) == ("y", 0)


def test_echo_with_logprobs_scores_the_prompt() -> None:
    row = good(completion(echo=True, logprobs=2, max_tokens=0))
    assert row.request.sampling.prompt_logprobs == 2
    assert row.request.sampling.max_new_tokens == 0
    row = good(completion(echo=True, logprobs=2, max_tokens=3))
    assert (row.request.sampling.prompt_logprobs, row.request.sampling.top_logprobs) == (2, 2)


SCORE = PromptScore(start=0, token_ids=[1, 2], logprobs=[None, -1.5], top=[(), ((3, -0.5), (2, -1.5))])


def _answer(**fields: Any) -> Completion:
    return Completion(
        index=0,
        text=fields.pop("text", ""),
        output_ids=[],
        finish_reason="length",
        prompt_tokens=2,
        cached_tokens=1,
        prompt_score=SCORE,
        **fields,
    )


def _line(row: Row, answer: Completion) -> dict[str, Any]:
    return render_success(
        row.head, [answer], model="m", created=1, decode=lambda i: f"<{i}>", decode_prompt=lambda ids: "?"
    )


def test_a_plain_answer_has_the_sum_and_each_token() -> None:
    line = _line(good({"id": "a", "prompt": "x", "score": {"top": 2}}), _answer())
    assert line["score"] == {
        "from": 0,
        "logprob": -1.5,
        "tokens": [
            {"token_id": 1, "logprob": None, "top": []},
            {
                "token_id": 2,
                "logprob": -1.5,
                "top": [{"token_id": 3, "logprob": -0.5}, {"token_id": 2, "logprob": -1.5}],
            },
        ],
    }


def test_an_echo_has_the_prompts_tokens_in_front_of_its_own() -> None:
    row = good(openai("/v1/completions", prompt="<1><2>", echo=True, logprobs=2, max_tokens=1))
    answer = _answer(text="<7>", logprobs=(TokenLogprob(token_id=7, logprob=-2.0, top=((7, -2.0),)),))
    (choice,) = _line(row, answer)["response"]["body"]["choices"]
    assert choice["text"] == "<1><2><7>"
    assert choice["logprobs"] == {
        "tokens": ["<1>", "<2>", "<7>"],
        "token_logprobs": [None, -1.5, -2.0],
        "top_logprobs": [None, {"<2>": -1.5, "<3>": -0.5}, {"<7>": -2.0}],
        "text_offset": [0, 3, 6],
    }


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_prompt_logprobs_are_where_vllm_has_them(url: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in url else {"prompt": "hi"}
    body = _line(good(openai(url, **prompt, prompt_logprobs=2)), _answer())["response"]["body"]
    holder = body if "chat" in url else body["choices"][0]
    assert holder["prompt_logprobs"] == [
        None,
        {
            "2": {"logprob": -1.5, "rank": 2, "decoded_token": "<2>"},
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": "<3>"},
        },
    ]
