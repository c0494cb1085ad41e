"""What rows of scores and rankings ask, what is refused of them, and what their output lines have."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest

from batchllm.dataset import BadRow, Row, find_abort, read_rows, render_success
from batchllm.request import Completion, Ranking, SamplingParams

LABELS = SamplingParams(max_new_tokens=0, temperature=0.0, ignore_eos=True, label_token_ids=(5, 6))


def read(kind: str, body: Any) -> Row | BadRow:
    record = {"custom_id": "a", "method": "POST", "url": f"/v1/{kind}", "body": body}
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams())
    return row


def good(kind: str, **body: Any) -> Row:
    row = read(kind, body)
    assert isinstance(row, Row), row
    return row


def completion(sample: int, *probabilities: float, **fields: Any) -> Completion:
    logprobs = [math.log(p) for p in probabilities]
    common: dict[str, Any] = {"index": 0, "sample": sample, "text": "", "output_ids": [], "finish_reason": "length"}
    return Completion(**common | {"prompt_tokens": 7, "cached_tokens": 3, "label_logprobs": logprobs} | fields)


def body_of(row: Row, completions: list[Completion]) -> Any:
    line = render_success(row.head, completions, model="m", created=1, decode=str, decode_prompt=str)
    assert line["response"]["status_code"] == 200
    return line["response"]["body"]


@pytest.mark.parametrize(
    ("query", "items", "first", "prompts"),
    [
        ("q", ["a", "b"], False, ["qa", "qb"]),
        ("q", ["a", "b"], True, ["aq", "bq"]),
        ("", ["a", "b"], False, ["a", "b"]),
        ([1, 2], [[3], [4, 5]], False, [[1, 2, 3], [1, 2, 4, 5]]),
        ([1, 2], [[3], []], True, [[3, 1, 2], [1, 2]]),
    ],
)
def test_a_score_is_a_prompt_for_each_item(query: Any, items: Any, first: bool, prompts: Any) -> None:
    request = good("score", query=query, items=items, label_token_ids=[5, 6], item_first=first).request
    assert request.prompts is not None
    assert [p if isinstance(p, str) else list(p) for p in request.prompts] == prompts
    assert (request.sampling, request.prompts_name) == (LABELS, "items")


def test_a_score_of_one_item_is_one_prompt() -> None:
    row = good(
        "score", query="q", items="a", label_token_ids=[5, 6], model="x", user="u", return_pooled_hidden_states=False
    )
    assert (row.request.prompt, row.request.prompts, row.head.num_prompts, row.model) == ("qa", None, 1, "x")
    assert list(good("score", query=[1], items=[[2]], label_token_ids=[5]).request.input_ids or ()) == [1, 2]


def test_a_ranking_is_the_rerankers_to_ask() -> None:
    row = good("rerank", query="q", documents=["a", "b"], instruct="i", top_n=1)
    assert row.request.ranking == Ranking(query="q", documents=["a", "b"], instruct="i")
    assert (row.head.num_prompts, row.head.num_samples) == (2, 2)
    assert row.head.answer == {"top_n": 1, "documents": ["a", "b"]}
    assert good("rerank", query="q", documents=["a"], return_documents=False).head.answer == {
        "top_n": None,
        "documents": None,
    }


SCORE = {"query": "q", "items": ["a", "b"], "label_token_ids": [5]}
RANKING = {"query": "q", "documents": ["a", "b"]}


@pytest.mark.parametrize(
    ("kind", "body", "code", "param"),
    [
        ("score", SCORE | {"label_token_ids": None}, "missing_labels", "label_token_ids"),
        ("score", SCORE | {"label_token_ids": ["5"]}, "invalid_input_ids", "label_token_ids"),
        ("score", SCORE | {"items": []}, "missing_prompt", "items"),
        ("score", SCORE | {"items": None}, "missing_prompt", "items"),
        ("score", SCORE | {"query": None}, "missing_prompt", "query"),
        ("score", SCORE | {"items": ["a", [1]]}, "invalid_parameter_type", "items[1]"),
        ("score", SCORE | {"query": [1], "items": ["a"]}, "invalid_parameter_type", "items[0]"),
        ("score", SCORE | {"query": [1], "items": [[1], [-1]]}, "invalid_input_ids", "items[1]"),
        ("score", SCORE | {"query": "", "items": ["a", "", "b"]}, "empty_prompt", "items[1]"),
        ("score", SCORE | {"apply_softmax": 1}, "invalid_parameter_type", "apply_softmax"),
        ("score", SCORE | {"model": "m:adapter"}, "unsupported_parameter", "model"),
        ("score", SCORE | {"item_embed_overrides": [[[0.5]]]}, "unsupported_parameter", "item_embed_overrides"),
        (
            "score",
            SCORE | {"return_pooled_hidden_states": True},
            "unsupported_parameter",
            "return_pooled_hidden_states",
        ),
        ("score", SCORE | {"label_tokens": [1]}, "unknown_parameter", "label_tokens"),
        ("rerank", RANKING | {"query": " "}, "empty_prompt", "query"),
        ("rerank", RANKING | {"documents": []}, "missing_prompt", "documents"),
        ("rerank", RANKING | {"documents": ["a", " "]}, "empty_prompt", "documents[1]"),
        ("rerank", RANKING | {"documents": [[{"type": "text", "text": "a"}]]}, "unsupported_content", "documents[0]"),
        ("rerank", RANKING | {"top_n": 0}, "parameter_out_of_range", "top_n"),
        ("rerank", RANKING | {"items": ["a"]}, "unknown_parameter", "items"),
        ("rerank", RANKING | {"max_tokens": 5}, "unsupported_parameter", "max_tokens"),
        ("score", SCORE | {"max_completion_tokens": 5}, "unsupported_parameter", "max_completion_tokens"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(kind: str, body: Any, code: str, param: str) -> None:
    row = read(kind, body)
    assert isinstance(row, BadRow)
    assert (row.code, row.param, row.given_id, row.kind) == (code, param, "a", kind)
    assert param in row.message


def test_scores_are_probabilities_or_shares_of_them() -> None:
    row = good("score", **SCORE | {"label_token_ids": [5, 6]})
    samples = [completion(1, 0.5, 0.25), completion(0, 0.1, 0.3)]
    assert body_of(row, samples) == {
        "scores": [[pytest.approx(0.1), pytest.approx(0.3)], [pytest.approx(0.5), pytest.approx(0.25)]],
        "pooled_hidden_states": None,
        "model": "default",
        "usage": {
            "prompt_tokens": 14,
            "total_tokens": 14,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        },
        "object": "scoring",
    }
    row = good("score", **SCORE | {"apply_softmax": True, "model": "x"})
    body = body_of(row, samples)
    assert body["scores"] == [[pytest.approx(0.25), pytest.approx(0.75)], [pytest.approx(2 / 3), pytest.approx(1 / 3)]]
    assert body["model"] == "x"


def test_documents_are_ranked_by_the_share_of_yes() -> None:
    samples = [completion(0, 0.1, 0.3), completion(1, 0.3, 0.1), completion(2, 0.2, 0.6), completion(3, 0.5, 0.5)]
    documents = {"documents": list("abcd")}
    ranked = body_of(good("rerank", **RANKING | documents), samples)
    assert [found["document"] for found in ranked] == ["b", "d", "a", "c"]
    assert ranked[0] == {"score": pytest.approx(0.75), "document": "b", "index": 1, "meta_info": None}
    ranked = body_of(good("rerank", **RANKING | documents | {"top_n": 2, "return_documents": False}), samples)
    assert [(found["index"], "document" in found) for found in ranked] == [(1, False), (3, False)]


def test_an_item_that_fails_fails_its_row_and_is_named() -> None:
    row = good("score", **SCORE)
    samples = [completion(0, 0.5), completion(1, 0.5, finish_reason="abort", error="why", error_code="aborted")]
    bad = find_abort(row.head, samples)
    assert bad is not None and bad.message == "items[1]: why"


def test_plain_rows_ask_for_labels_too() -> None:
    records = [
        {"prompt": "x", "sampling_params": {"label_token_ids": [5, 6]}},
        {"prompt": "x", "sampling_params": {"label_token_ids": [5, 6], "max_new_tokens": 3}},
        {"prompt": "x", "score": {}, "sampling_params": {"label_token_ids": [5, 6]}},
    ]
    lines = "\n".join(map(json.dumps, records)).encode()
    row, *others = read_rows(io.BytesIO(lines), defaults=SamplingParams())
    assert isinstance(row, Row) and row.request.sampling == LABELS
    assert [other.code for other in others if isinstance(other, BadRow)] == ["conflicting_parameters"] * 2
    line = render_success(row.head, [completion(0, 0.5, 0.25)], model="m", created=1, decode=str, decode_prompt=str)
    assert line["label_logprobs"] == [pytest.approx(math.log(0.5)), pytest.approx(math.log(0.25))]
