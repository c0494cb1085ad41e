"""validate() catches every way a plan can break its contract, and says which and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchllm.errors import PlanError
from batchllm.planner import BatchPlan, plan_batch
from batchllm.tokens import TokenTable

# Sorted, in pages of 2: rows 2, 0, 1 share four tokens, 2 and 0 six; 4, 3 share two; 5 is alone.
PROMPTS = [
    [1, 1, 1, 1, 2, 2, 3],
    [1, 1, 1, 1, 5],
    [1, 1, 1, 1, 2, 2],
    [8, 8, 2],
    [8, 8, 1],
    [9],
]
TABLE = TokenTable.from_lists(PROMPTS)
NAMESPACES = np.array([0, 0, 0, 1, 1, 1])


def _plan() -> BatchPlan:
    return plan_batch(TABLE, page_size=2, namespaces=NAMESPACES)


def _with(**changes: Any) -> BatchPlan:
    """The plan with elements replaced, ``name={index: value}``, or whole fields."""
    plan = _plan()
    fields = {}
    for name, change in changes.items():
        fields[name] = change
        if isinstance(change, dict):
            fields[name] = getattr(plan, name).copy()
            for index, value in change.items():
                fields[name][index] = value
    return replace(plan, **fields)


def test_the_plan_of_these_tests_is_sound() -> None:
    plan = _plan()
    plan.validate(TABLE, NAMESPACES)
    assert plan.order.tolist() == [2, 0, 1, 4, 3, 5]
    assert plan.parent.tolist() == [-1, 0, -1]
    assert plan.start_len.tolist() == [0, 4, 0]
    assert plan.end_len.tolist() == [4, 6, 2]
    assert plan.first.tolist() == [0, 0, 3]
    assert plan.num_consumers.tolist() == [3, 2, 2]
    assert plan.request_prefix.tolist() == [1, 1, 0, 2, 2, -1]
    assert plan.computed_lens().tolist() == [6, 1, 1, 3, 1, 1]
    assert plan.optimal_reuse == pytest.approx(1 - 13 / 25)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda: _with(order=np.arange(6, dtype=np.int32)), r"order must be int64\[6\], not int32"),
        (lambda: _with(num_requests=7), r"order must be int64\[7\]"),
        (lambda: _with(end_len=np.array([4, 6], np.int32)), r"end_len must be int32\[3\]"),
        (lambda: _with(page_size=0), "page_size must be at least 1, not 0"),
        (lambda: _with(order={3: 6}), r"position 3: order must name one of 6 rows \(order=6\)"),
        (lambda: _with(order={3: -1}), "position 3: order must name one of 6 rows"),
        (lambda: _with(order={3: 0}), "position 1: order must list every row once"),
        (lambda: _with(parent={1: 1}), "prefix 1: parent must be -1 or an earlier prefix"),
        (lambda: _with(parent={0: -2}), "prefix 0: parent must be -1 or an earlier prefix"),
        (lambda: _with(start_len={1: 2}), "prefix 1: start_len must be the parent's end_len or 0"),
        (lambda: _with(end_len={1: 4}), "prefix 1: end_len must exceed start_len"),
        (lambda: _with(end_len={1: 5}), "prefix 1: end_len must be whole pages of 2 tokens"),
        (lambda: _with(num_consumers={1: 1}), "prefix 1: num_consumers must be at least 2"),
        (lambda: _with(first={2: 5}), "prefix 2: consumers must be among 6 positions"),
        (lambda: _with(first={0: -1}), "prefix 0: consumers must be among 6 positions"),
        (lambda: _with(num_consumers={2: 4}), "prefix 2: consumers must be among 6 positions"),
        (lambda: _with(first={0: 1, 1: 0}), "prefix 1: prefixes must be in depth-first preorder"),
        (lambda: _with(first={1: 2}), "prefix 1: consumers must be nested in the parent's"),
        (lambda: _with(first={2: 2}), "prefix 2: consumers must be nested in the parent's"),
        (lambda: _with(parent={1: -1}, start_len={1: 0}), "prefix 1: consumers must be nested"),
        (lambda: _with(request_prefix={1: 0}), "position 1: request_prefix must be the deepest"),
        (lambda: _with(request_prefix={5: 2}), "position 5: request_prefix must be the deepest"),
        (lambda: _with(request_prefix={5: 99}), "position 5: request_prefix must be the deepest"),
        (lambda: _with(prompt_lens={1: 5}), "position 1: prompt_lens must be at least 1 and cover"),
        (lambda: _with(prompt_lens={5: 0}), "position 5: prompt_lens must be at least 1"),
        (lambda: _with(num_prompt_tokens=24), "num_prompt_tokens is 24, but .* add up to 25"),
        (lambda: _with(optimal_prefill_tokens=12), "optimal_prefill_tokens is 12, but .* to 13"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(corrupt: Callable[[], BatchPlan], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        corrupt().validate()


def test_a_prompt_without_the_tokens_of_its_prefix_is_refused() -> None:
    prompts = [list(tokens) for tokens in PROMPTS]
    prompts[0][5] = 7
    with pytest.raises(PlanError, match="position 1: row 0 does not start with the 6 tokens of prefix 1, as row 2"):
        _plan().validate(TokenTable.from_lists(prompts))


def test_the_tokens_of_every_consumer_are_compared() -> None:
    """Whichever shared token of whichever follower is changed, the plan no longer holds."""
    plan = _plan()
    for position, prefix in enumerate(plan.read_prefix().tolist()):
        for i in range(plan.end_len[prefix] if prefix >= 0 else 0):
            prompts = [list(tokens) for tokens in PROMPTS]
            prompts[plan.order[position]][i] = 77
            with pytest.raises(PlanError, match="does not start with"):
                plan.validate(TokenTable.from_lists(prompts))


def test_a_table_of_other_lengths_is_refused() -> None:
    with pytest.raises(PlanError, match="the plan has 6 requests, the table 5"):
        _plan().validate(TokenTable.from_lists(PROMPTS[:-1]))
    with pytest.raises(PlanError, match="position 5: prompt_lens must be the length of the row"):
        _plan().validate(TokenTable.from_lists([*PROMPTS[:-1], [9, 9]]))


def test_a_prefix_across_namespaces_is_refused() -> None:
    with pytest.raises(PlanError, match="position 4: consumers of a prefix must be of one namespac"):
        _plan().validate(TABLE, np.array([0, 0, 0, 1, 0, 1]))
    with pytest.raises(PlanError, match="6 requests, namespaces the shape"):
        _plan().validate(TABLE, NAMESPACES[:-1])


def test_a_plan_cannot_be_changed() -> None:
    plan = _plan()
    with pytest.raises(ValueError, match="read-only"):
        plan.order[0] = 1
    with pytest.raises(AttributeError):
        plan.page_size = 4


@pytest.mark.parametrize(
    "changes",
    [
        {"order": {0: 0, 1: 2}},
        {"end_len": {2: 4}},
        {"request_prefix": {5: 0}},
        {"page_size": 1},
        {"optimal_prefill_tokens": 14},
    ],
)
def test_plans_that_differ_have_different_fingerprints(changes: dict[str, Any]) -> None:
    assert _with(**changes).fingerprint() != _plan().fingerprint()
