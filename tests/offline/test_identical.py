"""A row that is another's double by definition is found; one that only looks like it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.offline.identical import IdenticalRows
from batchllm.offline.job_rows import UNLIMITED, JobRows
from batchllm.offline.token_store import TokenStore
from batchllm.request import Request, SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0.0}


def _leaders(*rows: tuple[list[int], dict[str, Any], str]) -> list[int]:
    """Of each row the first one whose answer it gets."""
    identical = IdenticalRows()
    job_rows = JobRows(UNLIMITED, None, TokenStore(None, 1 << 20), identical)
    requests = [
        Request(row_id=str(i), index=i, input_ids=ids, sampling=SamplingParams(**sampling), namespace=namespace)
        for i, (ids, sampling, namespace) in enumerate(rows)
    ]
    assert job_rows.add(requests) == [None] * len(rows)
    identical.find(np.arange(len(rows)))
    leaders = list(range(len(rows)))
    for row in range(len(rows)):
        for follower in identical.followers(row):
            assert identical.is_follower[follower]
            assert not identical.is_follower[row]
            leaders[follower] = row
    assert [leader != row for row, leader in enumerate(leaders)] == identical.is_follower.tolist()
    return leaders


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=2), st.integers(0, 2)), max_size=30))
def test_greedy_rows_with_the_same_tokens_and_parameters_are_doubles(rows: list[tuple[list[int], int]]) -> None:
    kinds = [GREEDY, GREEDY | {"max_new_tokens": 5}, GREEDY | {"stop": ("x",)}]
    first: dict[str, int] = {}
    wanted = [first.setdefault(str(row), i) for i, row in enumerate(rows)]
    assert _leaders(*((ids, kinds[kind], "") for ids, kind in rows)) == wanted


@pytest.mark.parametrize(
    ("one", "other", "are_doubles"),
    [
        (GREEDY, GREEDY, True),
        (GREEDY | {"seed": 1}, GREEDY | {"seed": 2}, True),
        ({"top_k": 1}, {"top_k": 1}, True),
        ({"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1}, True),
        ({"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2}, False),
        ({"temperature": 1.0}, {"temperature": 1.0}, False),
        (GREEDY | {"n": 2}, GREEDY | {"n": 2}, False),
        (GREEDY, GREEDY | {"logprobs": True}, False),
        (GREEDY, GREEDY | {"max_new_tokens": 7}, False),
        (GREEDY | {"embed": True}, GREEDY | {"embed": True}, True),
        (GREEDY | {"embed": True}, GREEDY | {"embed": True, "dimensions": 8}, False),
    ],
)
def test_only_an_answer_that_is_a_function_of_the_row_is_shared(
    one: dict[str, Any], other: dict[str, Any], are_doubles: bool
) -> None:
    assert (_leaders(([1, 2], one, ""), ([1, 2], other, "")) == [0, 0]) == are_doubles


def test_rows_of_other_namespaces_are_not_doubles() -> None:
    assert _leaders(([1], GREEDY, "a"), ([1], GREEDY, "b"), ([1], GREEDY, "a")) == [0, 1, 0]


def test_a_row_that_is_left_out_is_nobodys_double() -> None:
    identical = IdenticalRows()
    for _ in range(4):
        identical.append(b"same", 1)
    identical.find(np.array([1, 3]))
    assert identical.followers(1) == [3]
    assert identical.is_follower.tolist() == [False, False, False, True]
