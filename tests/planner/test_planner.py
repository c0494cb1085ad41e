"""A plan attains the optimum it states, names the prefixes it should, and is deterministic."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.planner import GROUP_ORDERS, BatchPlan, GroupOrder, plan_batch
from batchllm.tokens import TokenTable, page_floor
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(50, 100))

Workload = list[tuple[list[int], int]]

_RUNS = [[0], [1], [0, 1, 2], [0, 1, 3], [4] * 4, [4] * 16]


def _joined(runs: list[list[int]]) -> list[int]:
    return [token for run in runs for token in run]


prompt = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=6).map(_joined)
workloads = st.lists(st.tuples(prompt, st.integers(0, 1)), max_size=30)
few_prompts = st.lists(st.tuples(prompt, st.integers(0, 1)), max_size=4)
page_sizes = st.sampled_from([1, 2, 4, 16])
group_orders = st.sampled_from(GROUP_ORDERS)


def _plan(workload: Workload, page_size: int = 1, group_order: GroupOrder = "lexicographic") -> BatchPlan:
    """Plan and validate against the prompts."""
    table = TokenTable.from_lists([p for p, _ in workload])
    namespaces = np.array([s for _, s in workload], dtype=np.int64)
    plan = plan_batch(table, page_size=page_size, namespaces=namespaces, group_order=group_order)
    plan.validate(table, namespaces)
    return plan


def _pages(row: tuple[list[int], int], page_size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Each full page of a prompt, named by its namespace and all tokens up to its end."""
    tokens, namespace = row
    return [(namespace, tuple(tokens[:end])) for end in range(page_size, len(tokens) + 1, page_size)]


def _fewest_tokens(workload: Workload, page_size: int) -> int:
    """Optimum of a page trie: a page once, or once for every prompt that ends with it."""
    distinct = {page for row in workload for page in _pages(row, page_size)}
    ends = Counter((s, tuple(tokens)) for tokens, s in workload)
    return page_size * sum(max(1, ends[page]) for page in distinct) + sum(
        len(tokens) % page_size for tokens, _ in workload
    )


def _run_with_unlimited_cache(workload: Workload, page_size: int) -> int:
    """Tokens computed if the prompts run as listed and no page is ever forgotten."""
    cached: set[tuple[int, tuple[int, ...]]] = set()
    computed = 0
    for tokens, namespace in workload:
        pages = _pages((tokens, namespace), page_size)
        usable = [page for page in pages if len(page[1]) < len(tokens)]
        computed += len(tokens) - page_size * sum(page in cached for page in usable)
        cached.update(pages)
    return computed


@untimed
@given(workloads, page_sizes)
def test_the_stated_optimum_is_that_of_a_page_trie(workload: Workload, page_size: int) -> None:
    assert _plan(workload, page_size).optimal_prefill_tokens == _fewest_tokens(workload, page_size)


@untimed
@given(few_prompts, page_sizes)
def test_no_order_with_an_unlimited_cache_computes_less(workload: Workload, page_size: int) -> None:
    best = min(_run_with_unlimited_cache(list(p), page_size) for p in permutations(workload))
    assert _plan(workload, page_size).optimal_prefill_tokens == best


@untimed
@given(workloads, page_sizes, group_orders)
def test_carrying_the_plan_out_attains_the_optimum(workload: Workload, page_size: int, group_order: GroupOrder) -> None:
    """A leader computes its prefixes, followers read them, a prefix goes with its last consumer."""
    plan = _plan(workload, page_size, group_order)
    resident: dict[int, tuple[int, list[int]]] = {}
    computed = []
    for position in range(plan.num_requests):
        tokens, namespace = workload[plan.order[position]]
        chain = []
        prefix = int(plan.request_prefix[position])
        while prefix >= 0:
            chain.append(prefix)
            prefix = int(plan.parent[prefix])
        found = next((p for p in chain if p in resident), None)
        reused = 0
        if found is not None:
            assert resident[found] == (namespace, tokens[: plan.end_len[found]])
            reused = page_floor(min(int(plan.end_len[found]), len(tokens) - 1), page_size)
        computed.append(len(tokens) - reused)
        for p in chain:
            resident[p] = (namespace, tokens[: plan.end_len[p]])
            assert len(resident[p][1]) == plan.end_len[p]
        for p in list(resident):
            if position == plan.first[p] + plan.num_consumers[p] - 1:
                del resident[p]
    assert not resident
    assert sum(computed) == plan.optimal_prefill_tokens
    assert computed == plan.computed_lens().tolist()


@untimed
@given(workloads, page_sizes, group_orders)
def test_the_planned_prefixes_are_those_of_the_contract(
    workload: Workload, page_size: int, group_order: GroupOrder
) -> None:
    """Nodes floored to pages, one token earlier if all are duplicates; no empty ones."""
    shared: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for tokens, namespace in workload:
        for end in range(1, len(tokens) + 1):
            shared.setdefault((namespace, tuple(tokens[:end])), [])
    for i, (tokens, namespace) in enumerate(workload):
        for end in range(1, len(tokens) + 1):
            shared[namespace, tuple(tokens[:end])].append(i)
    expected: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    # Shorter first: a node with no page beyond its parent's leaves its consumers to the parent.
    for (namespace, prefix), rows in sorted(shared.items(), key=lambda item: len(item[0][1])):
        longer = [i for i in rows if len(workload[i][0]) > len(prefix)]
        branches = {workload[i][0][len(prefix)] for i in longer}
        is_node = len(rows) > 1 and len(branches) + (len(rows) - len(longer)) > 1
        end = page_floor(len(prefix) - (not longer), page_size)
        if is_node and end > 0:
            expected.setdefault((namespace, prefix[:end]), rows)
    plan = _plan(workload, page_size, group_order)
    actual = {}
    for p in range(plan.num_prefixes):
        rows = plan.order[plan.first[p] : plan.first[p] + plan.num_consumers[p]].tolist()
        tokens, namespace = workload[rows[0]]
        actual[namespace, tuple(tokens[: plan.end_len[p]])] = sorted(rows)
    assert len(actual) == plan.num_prefixes
    assert actual == expected


@untimed
@given(workloads, page_sizes, st.randoms())
def test_the_order_of_the_input_does_not_change_the_optimum(workload: Workload, page_size: int, random: Random) -> None:
    shuffled = list(workload)
    random.shuffle(shuffled)
    one, other = _plan(workload, page_size), _plan(shuffled, page_size)
    assert one.optimal_prefill_tokens == other.optimal_prefill_tokens
    assert one.end_len.tolist() == other.end_len.tolist()
    assert one.prompt_lens.tolist() == other.prompt_lens.tolist()


@untimed
@given(workloads, page_sizes)
def test_the_same_input_gives_the_same_bytes(workload: Workload, page_size: int) -> None:
    one, other = _plan(workload, page_size), _plan(workload, page_size)
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() == other.fingerprint()


def test_prompts_that_end_at_a_prefix_come_before_those_that_go_on() -> None:
    plan = _plan([([1, 2, 9], 0), ([1, 2], 0), ([1, 2], 0)])
    assert plan.order.tolist() == [1, 2, 0]
    assert plan.end_len.tolist() == [2]
    assert plan.computed_lens().tolist() == [2, 1, 1]


def test_duplicates_share_all_but_the_page_of_their_last_token() -> None:
    plan = _plan([([7] * 8, 0)] * 3, page_size=4)
    assert plan.end_len.tolist() == [4]
    assert plan.computed_lens().tolist() == [8, 4, 4]


def test_prefixes_that_end_in_the_same_page_are_one() -> None:
    deep = [[0] * 5 + [i] for i in (1, 2)] + [[0] * 7 + [i] for i in (1, 2)]
    plan = _plan([(tokens, 0) for tokens in deep], page_size=4)
    assert plan.end_len.tolist() == [4]
    assert plan.num_consumers.tolist() == [4]


def test_a_prefix_shorter_than_a_page_is_not_planned() -> None:
    plan = _plan([([1, 2, 3], 0), ([1, 2, 4], 0)], page_size=4)
    assert plan.num_prefixes == 0
    assert plan.request_prefix.tolist() == [-1, -1]
    assert plan.optimal_reuse == 0.0


def test_namespaces_share_nothing() -> None:
    plan = _plan([([1, 2, 3], 5), ([1, 2, 3], 4)])
    assert plan.num_prefixes == 0
    assert plan.order.tolist() == [1, 0]


def test_an_empty_table_gives_an_empty_plan() -> None:
    plan = _plan([])
    assert (plan.num_requests, plan.num_prefixes, plan.optimal_prefill_tokens) == (0, 0, 0)
    assert plan.optimal_reuse == 0.0


def test_an_empty_prompt_is_refused_by_row() -> None:
    with pytest.raises(WorkloadError, match="row 1 is an empty prompt"):
        plan_batch(TokenTable.from_lists([[1], []]))


def test_a_page_of_no_tokens_is_refused() -> None:
    with pytest.raises(WorkloadError, match="page_size must be at least 1, not 0"):
        plan_batch(TokenTable.from_lists([[1]]), page_size=0)
