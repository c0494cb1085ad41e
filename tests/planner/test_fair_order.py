"""Owners that are planned together keep pace, within what is stated, and what that costs in reuse is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchllm.errors import PlanError, WorkloadError
from batchllm.planner import GROUP_ORDERS, BatchPlan, GroupOrder, plan_batch
from batchllm.planner.fair_order import MAX_LOST_SHARE, FairPlan, fair_order
from batchllm.tokens import TokenTable, lcp, page_floor
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(80, 300))

_RUNS = [[0], [1], [0, 1, 2], [4] * 4, [4] * 16, [5] * 40]


class _Row(NamedTuple):
    tokens: list[int]
    namespace: int
    owner: int
    cost: int


def _joined(runs: list[list[int]]) -> list[int]:
    return [token for run in runs for token in run]


prompts = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=5).map(_joined)
rows = st.builds(_Row, prompts, st.integers(0, 1), st.integers(0, 3), st.sampled_from([1, 1, 2, 30]))
workloads = st.lists(rows, min_size=1, max_size=60)
page_sizes = st.sampled_from([1, 2, 4, 16])
quanta = st.integers(1, 100)
group_orders = st.sampled_from(GROUP_ORDERS)
services = st.lists(st.integers(0, 200), min_size=4, max_size=4)


def _plan(workload: list[_Row], page_size: int = 1, group_order: GroupOrder = "lexicographic") -> BatchPlan:
    return plan_batch(
        TokenTable.from_lists([row.tokens for row in workload]),
        page_size=page_size,
        namespaces=np.array([row.namespace for row in workload]),
        group_order=group_order,
    )


def _fair(workload: list[_Row], plan: BatchPlan, quantum: int, service: list[int] | None = None) -> FairPlan:
    return fair_order(
        plan,
        np.array([row.owner for row in workload]),
        np.array([row.cost for row in workload]),
        quantum=quantum,
        service=None if service is None else np.array(service),
    )


def _computed(workload: list[_Row], order: list[int], page_size: int) -> int:
    """Tokens computed where a prompt reads what it has in common with the one before it, in whole pages."""
    num_computed = 0
    for i, row in enumerate(order):
        tokens, shared = workload[row].tokens, 0
        if i > 0 and workload[order[i - 1]].namespace == workload[row].namespace:
            shared = lcp(np.array(workload[order[i - 1]].tokens, np.int32), np.array(tokens, np.int32))
        num_computed += len(tokens) - page_floor(min(shared, len(tokens) - 1), page_size)
    return num_computed


def _furthest_behind(workload: list[_Row], order: list[int], service: list[int]) -> int:
    """Most that an owner has been served more than another, while both had work left."""
    served, furthest = list(service), 0
    num_left = [sum(row.owner == owner for row in workload) for owner in range(len(service))]
    for row in order:
        owner = workload[row].owner
        served[owner] += workload[row].cost
        num_left[owner] -= 1
        working = [served[o] for o in range(len(service)) if num_left[o]]
        furthest = max(furthest, max(working, default=0) - min(working, default=0))
    return furthest


@untimed
@given(workloads, page_sizes, quanta, group_orders, services)
def test_the_plan_is_sound_and_what_it_loses_is_counted(
    workload: list[_Row], page_size: int, quantum: int, group_order: GroupOrder, service: list[int]
) -> None:
    """The same requests once each, prefixes that their consumers do start with, the optimum as it was."""
    best = _plan(workload, page_size, group_order)
    plan = _fair(workload, best, quantum, service).plan
    table = TokenTable.from_lists([row.tokens for row in workload])
    plan.validate(table, np.array([row.namespace for row in workload]))
    assert plan.optimal_prefill_tokens == best.optimal_prefill_tokens
    consumers = list(zip(plan.first.tolist(), plan.num_consumers.tolist(), strict=True))
    assert len(set(consumers)) == len(consumers), "two prefixes with the same consumers are one"
    num_computed = _computed(workload, plan.order.tolist(), page_size)
    assert plan.optimal_prefill_tokens + plan.num_lost_tokens == num_computed


@untimed
@given(workloads, page_sizes, quanta, group_orders)
def test_no_owner_falls_behind_by_more_than_the_quantum_and_one_request(
    workload: list[_Row], page_size: int, quantum: int, group_order: GroupOrder
) -> None:
    fair = _fair(workload, _plan(workload, page_size, group_order), quantum)
    largest = max(row.cost for row in workload)
    assert _furthest_behind(workload, fair.plan.order.tolist(), [0] * 4) < fair.quantum + largest


@untimed
@given(workloads, quanta, services)
def test_owners_that_begin_apart_do_not_get_further_apart(
    workload: list[_Row], quantum: int, service: list[int]
) -> None:
    fair = _fair(workload, _plan(workload), quantum, service)
    bound = max(fair.quantum + max(row.cost for row in workload), max(service) - min(service) + 1)
    assert _furthest_behind(workload, fair.plan.order.tolist(), service) < bound


@untimed
@given(workloads, page_sizes, quanta)
def test_fairness_costs_a_twentieth_at_most(workload: list[_Row], page_size: int, quantum: int) -> None:
    """The quantum is as asked for, or doubled so often as that takes, and no oftener."""
    best = _plan(workload, page_size)
    fair = _fair(workload, best, quantum)
    may_lose = MAX_LOST_SHARE * sum(row.cost for row in workload)
    assert fair.plan.num_lost_tokens <= may_lose
    num_doubled = (fair.quantum // quantum).bit_length() - 1
    assert fair.quantum == quantum << num_doubled
    assert num_doubled == 0 or fair.quantum < 4 * sum(row.cost for row in workload)


@untimed
@given(workloads, quanta)
def test_a_single_owner_s_plan_is_left_alone(workload: list[_Row], quantum: int) -> None:
    workload = [row._replace(owner=0) for row in workload]
    best = _plan(workload)
    assert _fair(workload, best, quantum).plan is best


@untimed
@given(workloads)
def test_owners_that_keep_pace_leave_the_order_alone(workload: list[_Row]) -> None:
    """Within the quantum nobody is behind, whatever is whose."""
    best = _plan(workload)
    quantum = sum(row.cost for row in workload)
    assume(quantum > 0)
    assert _fair(workload, best, quantum).plan is best


def _questions(document: int, owner: int, num: int, document_len: int = 100) -> list[_Row]:
    """Questions of three tokens about a document, each of the cost that it alone adds."""
    return [_Row([document] * document_len + [1000 + owner, 2000 + i, 7], 0, owner, 20) for i in range(num)]


def _last_place(workload: list[_Row], plan: BatchPlan, owner: int) -> int:
    return max(place for place, row in enumerate(plan.order.tolist()) if workload[row].owner == owner)


def test_a_long_document_of_one_owner_is_read_in_pieces_while_another_waits() -> None:
    """Each piece about two quanta, and a prefix of its own; what is left when the other is done is one piece."""
    workload = _questions(1, 0, 1000) + _questions(2, 1, 500)
    best = _plan(workload)
    assert best.num_prefixes == 2
    fair = _fair(workload, best, 2000)
    assert fair.quantum == 2000
    assert fair.plan.num_consumers.tolist() == [100, 200, 200, 200, 200, 100, 500]
    assert fair.plan.num_lost_tokens == 5 * 101


def test_a_small_owner_is_served_soon_though_it_asks_of_every_document() -> None:
    """Its documents are computed for it alone: little, beside what all cost."""
    workload = [row for d in range(20) for row in _questions(d, 0, 250) + _questions(d, 1, 2)]
    fair = _fair(workload, _plan(workload), 2000)
    assert fair.quantum == 2000
    assert _last_place(workload, fair.plan, 1) < 2 * 100 + 40 + 1
    assert 0 < fair.plan.num_lost_tokens <= 20 * 101


def test_documents_that_owners_share_alike_are_computed_once() -> None:
    workload = [row for d in range(50) for row in _questions(d, 0, 10) + _questions(d, 1, 10)]
    fair = _fair(workload, _plan(workload), 2000)
    assert (fair.plan.num_lost_tokens, fair.quantum) == (0, 2000)


def test_an_owner_that_is_ahead_waits_until_it_is_not_and_few_documents_are_cut() -> None:
    """Not until it is a little less ahead: it would cut each of its documents, a question at a time."""
    workload = [row for d in range(200) for row in _questions(2 * d, 0, 10) + _questions(2 * d + 1, 1, 1)]
    best = _plan(workload)
    fair = _fair(workload, best, 1000)
    assert fair.quantum == 1000
    assert best.num_prefixes < fair.plan.num_prefixes < best.num_prefixes + 10


def test_where_fairness_would_be_dear_it_is_coarser() -> None:
    """Documents that cost more than what is asked of them, and one owner asks ten times as much as the other."""
    workload = [row._replace(cost=4) for d in range(60) for row in _questions(d, 0, 10) + _questions(d, 1, 1)]
    fair = _fair(workload, _plan(workload), 50)
    assert fair.quantum > 50
    assert fair.plan.num_lost_tokens <= MAX_LOST_SHARE * 4 * len(workload)


def test_an_owner_that_was_served_before_waits_until_the_other_has_had_as_much() -> None:
    workload = _questions(1, 0, 500) + _questions(2, 1, 500)
    plan = _fair(workload, _plan(workload), 4000, service=[5000, 0]).plan
    owners = [workload[row].owner for row in plan.order.tolist()]
    assert owners[:450] == [1] * 450
    assert owners[450:850] == [0] * 400


def test_no_requests_and_an_owner_without_any_are_no_trouble() -> None:
    empty = plan_batch(TokenTable.from_lists([]))
    nothing = np.zeros(0, np.int64)
    assert fair_order(empty, nothing, nothing, quantum=5).plan is empty
    workload = [row._replace(owner=2) for row in _questions(1, 0, 5)]
    best = _plan(workload)
    assert _fair(workload, best, 1).plan is best


_ONE = plan_batch(TokenTable.from_lists([[1], [2]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"owners": [0]}, "owners must be 2 integers, not int64 of shape"),
        ({"owners": [0.0, 1.0]}, "owners must be 2 integers, not float64"),
        ({"owners": [0, -1]}, "row 1 has the owner -1; it must be at least 0"),
        ({"costs": [1, 1, 1]}, "costs must be 2 integers"),
        ({"costs": [0, 1]}, "row 0 has the cost 0; it must be at least 1"),
        ({"quantum": 0}, "quantum must be at least 1, not 0"),
        ({"service": [5]}, "service must be 2 or more integers"),
        ({"service": [0.5, 1.0]}, "service must be 2 or more integers, not float64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"owners": [0, 1], "costs": [1, 1], "service": None} | arguments
    quantum = fields.pop("quantum", 5)
    arrays = {name: None if value is None else np.array(value) for name, value in fields.items()}
    with pytest.raises(WorkloadError, match=message):
        fair_order(_ONE, quantum=quantum, **arrays)


def test_a_plan_that_misstates_what_it_loses_is_not_sound() -> None:
    workload = _questions(1, 0, 1000) + _questions(2, 1, 200)
    plan = _fair(workload, _plan(workload), 2000).plan
    with pytest.raises(PlanError, match=r"optimal_prefill_tokens \+ num_lost_tokens is"):
        replace(plan, num_lost_tokens=plan.num_lost_tokens - 1).validate()
    with pytest.raises(PlanError, match="num_lost_tokens must be at least 0, not -1"):
        replace(plan, num_lost_tokens=-1).validate()
