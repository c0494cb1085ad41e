"""What of a scored prompt is computed, from where it is scored, and what is said of it; with a tokenizer of letters."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchllm.dataset.scoring import only_labels
from batchllm.errors import RowError
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.job_rows import UNLIMITED, JobRows
from batchllm.offline.token_store import TokenStore
from batchllm.request import NO_TARGET, Completion, PromptScore, Request, SamplingParams

SCORED = SamplingParams(max_new_tokens=0, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
_JOINED = 200
"""Stands for the letters ``ab`` side by side."""


class Letters:
    """A token for each letter, but one for ``ab``; a text begins with token 1."""

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        begin = [1] if add_special_tokens else []
        return [array("i", begin + [ord(c) for c in text.replace("ab", chr(_JOINED))]) for text in texts]

    def encode_chats(self, chats: Any) -> Any:
        raise NotImplementedError


def _rows(*requests: Request, identical: IdenticalRows | None = None) -> tuple[JobRows, list[RowError | None]]:
    rows = JobRows(UNLIMITED, Letters(), TokenStore(None, 1 << 20), identical)
    return rows, rows.add(requests)


def _request(index: int = 0, sampling: SamplingParams = SCORED, **fields: Any) -> Request:
    return Request(row_id=str(index), index=index, sampling=sampling, **fields)


def _stored(rows: JobRows) -> list[list[int]]:
    samples, table = rows.sample_table()
    return [table.row(i).tolist() for i in range(samples.num_samples)]


def _share_lens(rows: JobRows) -> list[int]:
    samples, table = rows.sample_table()
    lens: list[int] = rows.scores.share_lens(samples.all_rows(), table.lengths).tolist()
    return lens


def _targets(rows: JobRows) -> list[int]:
    samples, _ = rows.sample_table()
    numbers = samples.all_rows()
    targets: list[int] = rows.scores.targets(rows.prompt_of(numbers, samples.samples(numbers))).tolist()
    return targets


def test_what_only_scores_is_stored_without_its_last_token() -> None:
    generates = SamplingParams(max_new_tokens=3, prompt_logprobs=0)
    rows, errors = _rows(
        _request(0, input_ids=[5, 6, 7, 8], score_from=2),
        _request(1, generates, input_ids=[5, 6, 7, 8], score_from=2),
        _request(2, SamplingParams(max_new_tokens=3), input_ids=[5, 6, 7, 8]),
        _request(3, input_ids=[5, 6, 7, 8], score_from=3),
        _request(4, input_ids=[5, 6], score_from=0),
    )
    assert errors == [None] * 5
    assert _stored(rows) == [[5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7], [5]]
    assert _targets(rows) == [8, NO_TARGET, NO_TARGET, 8, 6]
    assert _share_lens(rows) == [2, 2, 4, 3, 1]
    assert rows.max_new_len.tolist() == [1, 3, 3, 1, 1]


@pytest.mark.parametrize(
    ("fields", "start", "stored"),
    [
        ({"prompt": "xy", "continuation": "zz"}, 3, [1, 120, 121, 122]),
        ({"prompt": "xy", "continuation": [7, 8]}, 3, [1, 120, 121, 7]),
        ({"input_ids": [3, 4], "continuation": "ab"}, 2, [3, 4]),
        ({"prompt": "xa", "continuation": "bz"}, 2, [1, 120, _JOINED]),
    ],
)
def test_a_continuation_begins_at_the_first_token_that_the_prompt_alone_has_not(
    fields: dict[str, Any], start: int, stored: list[int]
) -> None:
    rows, errors = _rows(_request(**fields))
    assert errors == [None]
    assert (_stored(rows), _share_lens(rows)) == ([stored], [start])


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"input_ids": [5, 6], "score_from": 2}, "score_past_end", "score.from is 2, and the prompt has 2 tokens"),
        ({"input_ids": [5]}, "nothing_to_score", "one token"),
        ({"prompt": "a", "continuation": array("i", [])}, "empty_continuation", "adds no token"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_itself(fields: dict[str, Any], code: str, words: str) -> None:
    first = {"score_from": 2} if "continuation" in fields else {}
    rows, (error, none) = _rows(_request(0, **fields, **first), _request(1, input_ids=[5, 6]))
    assert error is not None
    assert error.code == code
    assert words in error.message
    assert none is None
    assert len(rows) == 1


def _from_engine(start: int, num_tokens: int) -> Completion:
    score = PromptScore(
        start=start,
        token_ids=list(range(num_tokens)),
        logprobs=[None, *(-float(i) for i in range(1, num_tokens))],
        top=[()] * num_tokens,
    )
    return Completion(
        index=0, text="", output_ids=[], finish_reason="length", prompt_tokens=9, cached_tokens=0, prompt_score=score
    )


def test_an_answer_begins_where_its_row_asked_and_counts_all_of_its_prompt() -> None:
    rows, _ = _rows(
        _request(0, input_ids=[5, 6, 7, 8]),
        _request(1, input_ids=[5, 6, 7, 8], score_from=2),
        _request(2, prompt="xa", continuation="bz"),
    )
    whole = rows.scores.finish(0, _from_engine(0, 4))
    assert whole.prompt_score is not None
    assert (whole.prompt_score.start, whole.prompt_score.logprobs) == (0, [None, -1.0, -2.0, -3.0])
    later = rows.scores.finish(1, _from_engine(1, 3))
    assert later.prompt_score is not None
    assert (later.prompt_score.start, later.prompt_score.token_ids) == (2, [1, 2])
    assert later.prompt_score.logprobs == [-1.0, -2.0]
    assert [whole.prompt_tokens, later.prompt_tokens] == [4, 4]
    assert (whole.note, later.note) == (None, None)
    merged = rows.scores.finish(2, _from_engine(1, 3))
    assert merged.note is not None
    assert "scored from token 2 on, and the prompt alone has 3" in merged.note


def test_rows_are_alike_only_where_they_score_the_same_tokens() -> None:
    identical = IdenticalRows()
    rows, _ = _rows(
        _request(0, input_ids=[5, 6, 7], score_from=1),
        _request(1, input_ids=[5, 6, 8], score_from=1),  # stored alike
        _request(2, input_ids=[5, 6, 7], score_from=2),
        _request(3, input_ids=[5, 6, 7], score_from=1),
        identical=identical,
    )
    identical.find(np.arange(len(rows)))
    assert identical.is_follower.tolist() == [False, False, False, True]


def test_rows_are_alike_only_where_they_ask_the_same_log_probabilities() -> None:
    """Of labels and of answers; the one that runs has what its doubles asked."""
    greedy = SamplingParams(max_new_tokens=3, temperature=0.0)
    asked = [replace(greedy, logprobs=True), replace(greedy, logprobs=True, top_logprobs=2)]
    labels = [only_labels((5, 6)), only_labels((6, 5)), only_labels((5, 6))]
    identical = IdenticalRows()
    samplings = [greedy, *asked, asked[0], *labels]
    requests = [_request(i, sampling, input_ids=[5, 6, 7]) for i, sampling in enumerate(samplings)]
    rows, _ = _rows(*requests, identical=identical)
    identical.find(np.arange(len(rows)))
    assert identical.is_follower.tolist() == [False, False, False, True, False, False, True]


def test_of_several_prompts_the_one_at_fault_is_named() -> None:
    """As the row calls them; the other rows are taken in."""
    labels = only_labels((5,))
    long = array("i", [5] * 90)
    rows = JobRows(replace(UNLIMITED, context_len=80, vocab_size=100), Letters(), TokenStore(None, 1 << 20))
    errors = rows.add(
        [
            _request(0, labels, prompts=[array("i", [5]), long], prompts_name="items"),
            _request(1, labels, prompts=[array("i", [5]), array("i", [6, 100])], prompts_name="items"),
            _request(2, labels, input_ids=long, prompts_name="items"),
            _request(3, labels, input_ids=long),
            _request(4, labels, prompts=[array("i", [5]), array("i", [6])], prompts_name="items"),
        ]
    )
    found = [error and (error.param, error.message.partition(":")[0]) for error in errors]
    assert found[:3] == [("items[1]", "items[1]"), ("items[1]", "items[1]"), ("items[0]", "items[0]")]
    assert errors[3] is not None and errors[3].param == "prompt"
    assert (errors[4], rows.num_prompts.tolist()) == (None, [2])


def test_an_adapter_scores_no_rows_of_the_servers_routes() -> None:
    rows = JobRows(replace(UNLIMITED, adapters=("a",)), Letters(), TokenStore(None, 1 << 20))
    refused, none = rows.add(
        [_request(0, only_labels((5,)), prompt="x", model="a"), _request(1, only_labels((5,)), prompt="x")]
    )
    assert refused is not None and refused.param == "model"
    assert none is None
