"""The exact cut is the best one level can do; the paper's rule is never better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchllm.planner import BatchPlan, GroupCut, exact_cut, greedy_cut, plan_batch
from batchllm.tokens import TokenTable
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(50, 100))

_RUNS = [[0], [1], [0, 1, 2], [4] * 4, [4] * 9]


def _joined(runs: list[list[int]]) -> list[int]:
    return [token for run in runs for token in run]


prompt = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=6).map(_joined)
prompts = st.lists(prompt, max_size=25)
page_sizes = st.sampled_from([1, 2, 4])


def _plan(rows: list[list[int]], page_size: int = 1) -> BatchPlan:
    return plan_batch(TokenTable.from_lists(rows), page_size=page_size)


def _saved_by_running(plan: BatchPlan, request_group: list[int]) -> int:
    """Tokens not computed if the first of each group computes its prefix and the others read it."""
    begun: set[int] = set()
    saved = 0
    for position, group in enumerate(request_group):
        if group in begun:
            usable = min(int(plan.end_len[group]), int(plan.prompt_lens[position]) - 1)
            saved += usable - usable % plan.page_size
        elif group >= 0:
            begun.add(group)
    return saved


def _deepest_of(plan: BatchPlan, chosen: set[int]) -> list[int]:
    groups = []
    for deepest in plan.request_prefix.tolist():
        prefix = deepest
        while prefix >= 0 and prefix not in chosen:
            prefix = int(plan.parent[prefix])
        groups.append(prefix)
    return groups


def _by_recurrence(plan: BatchPlan) -> int:
    """The recurrence of `exact_cut`, written down naively, with what an exact duplicate loses."""
    children: dict[int, list[int]] = {p: [] for p in range(-1, plan.num_prefixes)}
    for p, parent in enumerate(plan.parent.tolist()):
        children[parent].append(p)

    def best(u: int, above_len: int) -> int:
        end = int(plan.end_len[u])
        direct = np.flatnonzero(plan.request_prefix == u)
        num_whole = int((plan.prompt_lens[direct] == end).sum())
        skip = len(direct) * above_len + sum(best(c, above_len) for c in children[u])
        cost = end + max(0, num_whole - 1) * plan.page_size
        return max(skip, len(direct) * end + sum(best(c, end) for c in children[u]) - cost)

    return sum(best(root, 0) for root in children[-1])


@dataclass(eq=False)
class _Node:
    """A node of the paper's tree; a prompt is a leaf."""

    end_len: int
    prefix: int = -1
    position: int = -1
    children: list[_Node] = field(default_factory=list)

    def positions(self) -> list[int]:
        if self.position >= 0:
            return [self.position]
        return [position for child in self.children for position in child.positions()]


def _maximize_reuse(node: _Node) -> None:
    """Algorithm 1 as printed, and a child with one branch left gives way to it."""
    for child in list(node.children):
        _maximize_reuse(child)
        for grandchild in list(child.children):
            gain = (len(grandchild.positions()) - 1) * (grandchild.end_len - child.end_len)
            if len(child.children) > 1 and gain > child.end_len - node.end_len:
                child.children.remove(grandchild)
                node.children.append(grandchild)
        if len(child.children) == 1:
            node.children[node.children.index(child)] = child.children[0]


def _by_the_papers_rule(plan: BatchPlan) -> list[int]:
    root = _Node(0)
    nodes = [_Node(int(end), prefix=p) for p, end in enumerate(plan.end_len)] + [root]
    for p, parent in enumerate(plan.parent):
        nodes[parent].children.append(nodes[p])
    for position, prefix in enumerate(plan.request_prefix):
        length = int(plan.prompt_lens[position])
        nodes[prefix].children.append(_Node(length, position=position))
    _maximize_reuse(root)
    groups = [-1] * plan.num_requests
    for node in root.children:
        for position in node.positions():
            groups[position] = node.prefix
    return groups


def _check_cut(plan: BatchPlan, cut: GroupCut) -> None:
    """A cut's groups are its prefixes, above their members, and save what it says."""
    groups = cut.request_group.tolist()
    assert sorted(set(groups) - {-1}) == cut.prefixes.tolist()
    for position, group in enumerate(groups):
        if group >= 0:
            assert 0 <= position - plan.first[group] < plan.num_consumers[group]
    assert _saved_by_running(plan, groups) == cut.saved_tokens


@untimed
@given(prompts, page_sizes)
def test_cuts_are_consistent_and_ordered(rows: list[list[int]], page_size: int) -> None:
    """greedy <= exact <= every level shared, and each saves what carrying it out saves."""
    plan = _plan(rows, page_size)
    exact, greedy = exact_cut(plan), greedy_cut(plan)
    _check_cut(plan, exact)
    _check_cut(plan, greedy)
    assert 0 <= greedy.saved_tokens <= exact.saved_tokens
    assert exact.saved_tokens <= plan.num_prompt_tokens - plan.optimal_prefill_tokens


@untimed
@given(prompts, page_sizes)
def test_no_choice_of_prefixes_saves_more_than_the_exact_cut(rows: list[list[int]], page_size: int) -> None:
    plan = _plan(rows, page_size)
    assume(plan.num_prefixes <= 8)
    prefixes = range(plan.num_prefixes)
    choices = chain.from_iterable(combinations(prefixes, k) for k in range(len(prefixes) + 1))
    best = max(_saved_by_running(plan, _deepest_of(plan, set(choice))) for choice in choices)
    exact = exact_cut(plan)
    assert exact.saved_tokens == best
    assert exact.request_group.tolist() == _deepest_of(plan, set(exact.prefixes.tolist()))


@untimed
@given(prompts, page_sizes)
def test_the_exact_cut_attains_the_recurrence(rows: list[list[int]], page_size: int) -> None:
    plan = _plan(rows, page_size)
    assert exact_cut(plan).saved_tokens == _by_recurrence(plan)


def _large_plans() -> Iterator[BatchPlan]:
    random = np.random.default_rng(3)
    for scale in (1, 2, 5):
        runs = [[t] * int(random.integers(1, 4 * scale)) for t in range(3)]
        rows = [[token for r in random.integers(0, 3, random.integers(1, 9)) for token in runs[r]] for _ in range(400)]
        plan = _plan(rows)
        assert plan.num_prefixes > 100
        yield plan


def test_the_exact_cut_attains_the_recurrence_on_large_trees() -> None:
    for plan in _large_plans():
        assert exact_cut(plan).saved_tokens == _by_recurrence(plan)


@untimed
@given(prompts, page_sizes)
def test_the_greedy_cut_is_the_papers_algorithm(rows: list[list[int]], page_size: int) -> None:
    plan = _plan(rows, page_size)
    assert greedy_cut(plan).request_group.tolist() == _by_the_papers_rule(plan)


def test_the_greedy_cut_is_the_papers_algorithm_on_large_trees() -> None:
    for plan in _large_plans():
        assert greedy_cut(plan).request_group.tolist() == _by_the_papers_rule(plan)


def _two_grandchildren() -> BatchPlan:
    """A child of 10 tokens with two grandchildren of 4 tokens and three prompts each."""
    return _plan([[1] * 10 + [branch] * 4 + [i] for branch in (2, 3) for i in (7, 8, 9)])


def test_the_greedy_rule_misses_promotions_that_pay_only_together() -> None:
    plan = _two_grandchildren()
    assert greedy_cut(plan).saved_tokens == 50
    assert exact_cut(plan).saved_tokens == 56
    assert plan.num_prompt_tokens - plan.optimal_prefill_tokens == 66
    assert exact_cut(plan).request_group.tolist() == [1, 1, 1, 2, 2, 2]


def test_the_greedy_rule_promotes_a_grandchild_that_pays_alone() -> None:
    """Three prompts gain (3 - 1) * 6 tokens by a promotion that costs 10."""
    plan = _plan([[1] * 10 + [2] * 6 + [i] for i in (7, 8, 9)] + [[1] * 10 + [i] for i in (3, 4)])
    cut = greedy_cut(plan)
    assert cut.request_group.tolist() == [1, 1, 1, 0, 0]
    assert cut.saved_tokens == 2 * 16 + 10


def test_the_greedy_rule_merges_a_node_left_with_one_branch() -> None:
    """Once one grandchild is promoted, the other takes the child's place at no cost."""
    big = [[1] * 10 + [2] * 20 + [i] for i in (7, 8, 9)]
    small = [[1] * 10 + [3] + [i] for i in (7, 8)]
    plan = _plan(big + small)
    cut = greedy_cut(plan)
    assert cut.request_group.tolist() == [1, 1, 1, 2, 2]
    assert cut.saved_tokens == 2 * 30 + 11


def test_the_greedy_rule_counts_branches_that_came_from_below() -> None:
    """Promoted twice or merged, all three branches end up at the root, even the shortest."""
    branches = [[2] * 20, [3] + [4] * 20, [3] + [5] * 2]
    rows = [[1] * 10 + branch + [i] for branch in branches for i in (7, 8, 9)]
    plan = _plan(rows)
    cut = greedy_cut(plan)
    assert plan.end_len[cut.prefixes].tolist() == [30, 31, 13]
    assert cut.request_group.tolist() == _by_the_papers_rule(plan)


def test_a_prompt_left_alone_by_promotions_is_in_no_group() -> None:
    plan = _plan([[1] * 10 + [2] * 20 + [i] for i in (7, 8, 9)] + [[1] * 10 + [3]])
    cut = greedy_cut(plan)
    assert cut.request_group.tolist() == [1, 1, 1, -1]
    assert cut.prefixes.tolist() == [1]


def test_trees_of_any_depth_are_cut_without_recursion() -> None:
    rows = [list(range(n)) for n in range(1, 3000)]
    plan = _plan(rows)
    exact, greedy = exact_cut(plan), greedy_cut(plan)
    _check_cut(plan, exact)
    _check_cut(plan, greedy)
    assert greedy.saved_tokens <= exact.saved_tokens


def test_a_plan_that_shares_nothing_has_an_empty_cut() -> None:
    for rows in ([], [[1], [2]]):
        for cut in (exact_cut(_plan(rows)), greedy_cut(_plan(rows))):
            assert cut.saved_tokens == 0
            assert cut.prefixes.tolist() == []
            assert cut.request_group.tolist() == [-1] * len(rows)
