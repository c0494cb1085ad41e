"""Siblings run in the order asked for, at every level, and what is shared stays the same."""

from __future__ import annotations

from collections import deque
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.planner import GROUP_ORDERS, BatchPlan, GroupOrder, order_groups, plan_batch
from batchllm.planner.planner import _whole_pages
from batchllm.planner.prefix_tree import PrefixTree, _lcp_intervals, build_prefix_tree, enclosing_interval
from batchllm.tokens import TokenTable
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(50, 100))


class _Row(NamedTuple):
    tokens: list[int]
    namespace: int
    decode_len: int


# Few tokens and few lengths, so that prompts end inside others, repeat, and tie.
_RUNS = [[0], [1], [2], [0, 1, 2], [4] * 4, [4] * 17]


def _joined(runs: list[list[int]]) -> list[int]:
    return [token for run in runs for token in run]


prompt = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=5).map(_joined)
rows = st.builds(_Row, prompt, st.integers(0, 1), st.sampled_from([1, 1, 2, 7, 500]))
workloads = st.lists(rows, max_size=40)
page_sizes = st.sampled_from([1, 4, 16])
group_orders = st.sampled_from(GROUP_ORDERS)


def _workload_of(prompts: list[list[int]], decode_lens: list[int] | None = None) -> list[_Row]:
    lens = decode_lens or [1] * len(prompts)
    return [_Row(tokens, 0, decode_len) for tokens, decode_len in zip(prompts, lens, strict=True)]


def _arrays(workload: list[_Row]) -> tuple[TokenTable, Any, Any]:
    """The table, the namespaces and the expected output lengths."""
    table = TokenTable.from_lists([row.tokens for row in workload])
    namespaces = np.array([row.namespace for row in workload], np.int64)
    return table, namespaces, np.array([row.decode_len for row in workload], np.int64)


def _plan(workload: list[_Row], group_order: GroupOrder, page_size: int = 1) -> BatchPlan:
    """Plan and validate against the prompts."""
    table, namespaces, decode_lens = _arrays(workload)
    plan = plan_batch(
        table, page_size=page_size, namespaces=namespaces, decode_lens=decode_lens, group_order=group_order
    )
    plan.validate(table, namespaces)
    return plan


def _ordered(workload: list[_Row], group_order: GroupOrder) -> PrefixTree:
    table, namespaces, decode_lens = _arrays(workload)
    return order_groups(build_prefix_tree(table, namespaces), table.lengths, decode_lens, group_order)


def _shared_len(a: _Row, b: _Row) -> int:
    if a.namespace != b.namespace:
        return 0
    pairs = zip(a.tokens, b.tokens, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)))


class _ByHand:
    """The rules as they are stated, on lists of input rows. A group is all rows below one sibling."""

    def __init__(self, workload: list[_Row], group_order: GroupOrder) -> None:
        self.workload = workload
        self.group_order = group_order

    def order(self, members: list[int], depth: int = 0) -> list[int]:
        """Rows that agree on ``depth`` tokens, in the order they should run."""
        ended = [r for r in members if len(self.workload[r].tokens) == depth]
        longer = [r for r in members if len(self.workload[r].tokens) > depth]
        branch = {r: (self.workload[r].namespace, self.workload[r].tokens[depth]) for r in longer}
        by_branch = groupby(sorted(longer, key=branch.__getitem__), key=branch.__getitem__)
        groups = [sorted(group) for _, group in by_branch]
        if len(groups) > 1:
            groups = self.sorted_groups(groups, depth)
        return sorted(ended) + [row for group in groups for row in self.order(group, depth + 1)]

    def decode(self, group: list[int]) -> int:
        return sum(self.workload[r].decode_len for r in group)

    def prefill(self, group: list[int], depth: int) -> int:
        """Distinct tokens after the first ``depth``."""
        prompts = [self.workload[r].tokens for r in group]
        return len({tuple(p[:end]) for p in prompts for end in range(depth + 1, len(p) + 1)})

    def sorted_groups(self, groups: list[list[int]], depth: int) -> list[list[int]]:
        def ratio(group: list[int]) -> tuple[float, int]:
            return -self.decode(group) / self.prefill(group, depth), group[0]

        match self.group_order:
            case "lexicographic":
                return groups
            case "input":
                return sorted(groups, key=lambda group: group[0])
            case "paper":
                return sorted(groups, key=lambda group: (self.prefill(group, depth), group[0]))
            case "ratio":
                return sorted(groups, key=ratio)
            case "balanced":
                return self.balanced(deque(sorted(groups, key=ratio)), depth)

    def balanced(self, ranked: deque[list[int]], depth: int) -> list[list[int]]:
        overall = self.mix(list(ranked), depth)
        taken = [ranked.popleft()]
        while ranked:
            off = [abs(self.mix([*taken, group], depth) - overall) for group in (ranked[0], ranked[-1])]
            taken.append(ranked.popleft() if off[0] <= off[1] else ranked.pop())
        return taken

    def mix(self, groups: list[list[int]], depth: int) -> float:
        return sum(self.decode(g) for g in groups) / sum(self.prefill(g, depth) for g in groups)


@settings(untimed, max_examples=sized(120, 400))
@given(workloads, group_orders)
def test_the_order_is_the_stated_rule_at_every_level(workload: list[_Row], group_order: GroupOrder) -> None:
    expected = _ByHand(workload, group_order).order(list(range(len(workload))))
    assert _ordered(workload, group_order).order.tolist() == expected


@untimed
@given(workloads, page_sizes)
def test_no_order_changes_what_is_shared(workload: list[_Row], page_size: int) -> None:
    """The same optimum, and the same prefixes with the same consumers."""
    expected = None
    for group_order in GROUP_ORDERS:
        plan = _plan(workload, group_order, page_size)
        prefixes = []
        for p in range(plan.num_prefixes):
            consumers = plan.order[plan.first[p] : plan.first[p] + plan.num_consumers[p]]
            prefixes.append((sorted(consumers.tolist()), int(plan.start_len[p]), int(plan.end_len[p])))
        shared = (plan.optimal_prefill_tokens, sorted(prefixes))
        expected = expected or shared
        assert shared == expected


@untimed
@given(workloads, group_orders)
def test_the_result_is_a_prefix_tree(workload: list[_Row], group_order: GroupOrder) -> None:
    """LCPs are those of the tokens, nodes are their intervals in preorder, shorter prompts lead."""
    tree = _ordered(workload, group_order)
    ordered = [workload[row] for row in tree.order]
    assert sorted(tree.order.tolist()) == list(range(len(workload)))
    assert tree.lcp.tolist() == [0][: len(ordered)] + [_shared_len(a, b) for a, b in pairwise(ordered)]
    depth, first, num_prompts = _lcp_intervals(tree.lcp)
    assert tree.depth.tolist() == depth.tolist()
    assert tree.first.tolist() == first.tolist()
    assert tree.num_prompts.tolist() == num_prompts.tolist()
    arrays = (tree.order, tree.lcp, tree.parent, tree.depth, tree.first, tree.num_prompts)
    assert [array.dtype for array in arrays] == [np.int64, np.int32, np.int32, np.int32, np.int64, np.int64]
    assert tree.parent.tolist() == enclosing_interval(tree.first, tree.num_prompts).tolist()
    for v in range(len(tree.depth)):
        goes_on = [len(row.tokens) > tree.depth[v] for row in ordered[tree.first[v] :][: tree.num_prompts[v]]]
        assert goes_on == sorted(goes_on)


@untimed
@given(workloads, group_orders, page_sizes)
def test_the_same_input_gives_the_same_bytes(workload: list[_Row], group_order: GroupOrder, page_size: int) -> None:
    plans = [_plan(workload, group_order, page_size) for _ in range(2)]
    assert plans[0].fingerprint() == plans[1].fingerprint()


@untimed
@given(workloads)
def test_sorted_input_in_input_order_is_the_tree_as_it_comes(workload: list[_Row]) -> None:
    workload = sorted(workload, key=lambda row: (row.namespace, row.tokens))
    one, other = _ordered(workload, "lexicographic"), _ordered(workload, "input")
    for name in ("order", "lcp", "parent", "depth", "first", "num_prompts"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


def test_lexicographic_is_the_default_and_leaves_the_tree_alone() -> None:
    table, _, decode_lens = _arrays(_workload_of([[2], [1, 2], [1, 3]]))
    tree = build_prefix_tree(table)
    assert order_groups(tree, table.lengths, decode_lens, "lexicographic") is tree
    assert plan_batch(table).order.tolist() == tree.order.tolist()


def test_without_lengths_every_prompt_is_expected_to_generate_the_same() -> None:
    table, _, ones = _arrays(_workload_of([[1] * 9, [2] * 3, [2, 2, 1], [3]]))
    for group_order in GROUP_ORDERS:
        stated = plan_batch(table, decode_lens=ones, group_order=group_order)
        assert plan_batch(table, group_order=group_order).fingerprint() == stated.fingerprint()


def test_ratio_puts_decode_heavy_groups_first_at_every_level() -> None:
    prompts = [[1, 1, 5], [1, 1, 6], [2, 2, 5], [2, 2, 6, 5], [2, 2, 6, 6]]
    assert _plan(_workload_of(prompts, [9, 9, 1, 1, 1]), "ratio").order.tolist() == [0, 1, 2, 3, 4]
    assert _plan(_workload_of(prompts, [1, 1, 1, 90, 1]), "ratio").order.tolist() == [3, 4, 2, 0, 1]


def test_the_papers_rule_does_not_count_members_and_ratio_does() -> None:
    """A group of four that decodes four times as much, and one prompt of fewer tokens."""
    workload = _workload_of([[1, 1, i] for i in range(4)] + [[2] * 5])
    assert _plan(workload, "paper").order.tolist() == [4, 0, 1, 2, 3]
    assert _plan(workload, "ratio").order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("group_order", sorted(set(GROUP_ORDERS) - {"lexicographic"}))
def test_of_equal_siblings_the_one_with_the_smallest_input_row_is_first(group_order: GroupOrder) -> None:
    """Single prompts, and groups whose smallest row is not the first by tokens."""
    assert _plan(_workload_of([[i] for i in (4, 9, 1, 7, 3)]), group_order).order.tolist() == [0, 1, 2, 3, 4]
    groups = [[5, 5, 1], [3, 3, 1], [3, 3, 0], [5, 5, 0]]
    assert _plan(_workload_of(groups), group_order).order.tolist() == [0, 3, 1, 2]


def test_prompts_that_end_at_a_prefix_lead_it_in_every_order() -> None:
    """Whatever the others decode: who ends at the node computes it, duplicates by input row."""
    workload = _workload_of([[1, 2, 9], [1, 2], [1, 2, 8], [1, 2]], [1000, 1, 2000, 1])
    for group_order in GROUP_ORDERS:
        plan = _plan(workload, group_order)
        assert plan.order[:2].tolist() == [1, 3]
        assert plan.computed_lens().tolist() == [2, 1, 1, 1]
    assert _plan(workload, "ratio").order.tolist() == [1, 3, 2, 0]


def test_duplicates_alone_keep_input_order() -> None:
    workload = _workload_of([[7] * 8] * 50, list(range(50, 0, -1)))
    for group_order in GROUP_ORDERS:
        assert _plan(workload, group_order).order.tolist() == list(range(50))


def test_balanced_keeps_the_mix_nearer_the_overall_one_than_ratio() -> None:
    """Half the prompts decode a hundred times their tokens, half a hundredth."""
    prompts = [[i] * 100 for i in range(40)]
    decode_lens = [10_000 if i % 2 else 1 for i in range(40)]
    overall = sum(decode_lens) / 4000
    worst = {}
    off: dict[str, list[float]] = {}
    for group_order in ("ratio", "balanced"):
        plan = _plan(_workload_of(prompts, decode_lens), group_order)
        decode = np.cumsum([decode_lens[row] for row in plan.order])
        off[group_order] = np.abs(decode / np.cumsum(plan.computed_lens()) - overall).tolist()
        worst[group_order] = max(off[group_order][4:])
    assert all(b <= r for b, r in zip(off["balanced"], off["ratio"], strict=True))
    assert worst["balanced"] < worst["ratio"] / 4


def _comb(num_levels: int) -> PrefixTree:
    """A prompt leaves the trunk at each of many levels; the last level has two."""
    levels = np.arange(num_levels)
    return PrefixTree(
        order=np.arange(num_levels + 1),
        lcp=np.append(0, levels + 1).astype(np.int32),
        parent=(levels - 1).astype(np.int32),
        depth=(levels + 1).astype(np.int32),
        first=levels.copy(),
        num_prompts=num_levels + 1 - levels,
    )


@pytest.mark.parametrize("group_order", GROUP_ORDERS)
def test_a_comb_of_many_levels_is_ordered_without_recursion(group_order: GroupOrder) -> None:
    num_levels = 16_000
    random = np.random.default_rng(3)
    tail_lens, decode_lens = random.integers(1, 50, num_levels + 1), random.integers(1, 100_000, num_levels + 1)
    prompt_lens = np.minimum(np.arange(num_levels + 1) + 1, num_levels) + tail_lens
    tree = order_groups(_comb(num_levels), prompt_lens, decode_lens, group_order)
    _whole_pages(tree, prompt_lens[tree.order].astype(np.int32), None, 1).validate()
    assert np.array_equal(_lcp_intervals(tree.lcp)[0], tree.depth)
    # From the deepest level up: the prompt that leaves goes before or after all that is below.
    tail, decode = int(tail_lens[-1]), int(decode_lens[-1])
    expected = deque([num_levels])
    for row in range(num_levels - 1, -1, -1):
        ratios = decode_lens[row] / tail_lens[row], decode / tail
        match group_order:
            case "ratio" | "balanced":
                leads = ratios[0] >= ratios[1]
            case "paper":
                leads = tail_lens[row] <= tail
            case _:
                leads = True
        (expected.appendleft if leads else expected.append)(row)
        tail, decode = tail + int(tail_lens[row]) + 1, decode + int(decode_lens[row])
    assert tree.order.tolist() == list(expected)


@pytest.mark.parametrize("group_order", GROUP_ORDERS)
def test_a_staircase_of_many_levels_cannot_be_reordered(group_order: GroupOrder) -> None:
    """Each prompt is the next one without its last token, so each computes a level for the rest."""
    num_levels = 16_000
    prompt_lens = np.append(np.arange(num_levels) + 1, num_levels + 1)
    decode_lens = np.arange(num_levels + 1) + 1
    tree = order_groups(_comb(num_levels), prompt_lens, decode_lens, group_order)
    assert tree.order.tolist() == list(range(num_levels + 1))
    assert tree.depth.tolist() == list(range(1, num_levels + 1))


def test_many_siblings_are_sorted() -> None:
    """Sorting agrees with numpy on many distinct ratios and on many ties."""
    random = np.random.default_rng(4)
    for most in (3, 1_000_000):
        decode_lens = random.integers(1, most, 20_000)
        workload = _workload_of([[i] for i in range(20_000)], decode_lens.tolist())
        expected = np.argsort(-decode_lens, kind="stable")
        assert _ordered(workload, "ratio").order.tolist() == expected.tolist()


@pytest.mark.parametrize("group_order", GROUP_ORDERS)
def test_an_empty_table_gives_an_empty_plan(group_order: GroupOrder) -> None:
    plan = _plan([], group_order)
    assert (plan.num_requests, plan.num_prefixes) == (0, 0)


def test_lengths_of_any_integer_type_are_taken() -> None:
    table, _, decode_lens = _arrays(_workload_of([[1], [2], [3]], [1, 3, 2]))
    for dtype in (np.int32, np.uint64):
        plan = plan_batch(table, decode_lens=decode_lens.astype(dtype), group_order="ratio")
        assert plan.order.tolist() == [1, 2, 0]


@pytest.mark.parametrize("decode_lens", [np.ones(3, np.int64), np.ones((2, 1), np.int64), np.ones(2)])
def test_lengths_that_do_not_fit_are_refused(decode_lens: np.ndarray) -> None:
    with pytest.raises(WorkloadError, match="decode_lens must be 2 integers"):
        plan_batch(TokenTable.from_lists([[1], [1]]), decode_lens=decode_lens)


@pytest.mark.parametrize("decode_len", [0, -1])
def test_a_row_that_generates_nothing_is_refused_by_row(decode_len: int) -> None:
    with pytest.raises(WorkloadError, match=f"row 1 has a decode_lens of {decode_len}; it must be at least 1"):
        plan_batch(TokenTable.from_lists([[1], [1]]), decode_lens=np.array([1, decode_len]))


def test_an_unknown_order_is_refused_with_those_there_are() -> None:
    with pytest.raises(WorkloadError, match="one of lexicographic, input, ratio, paper, balanced, not 'fastest'"):
        plan_batch(TokenTable.from_lists([[1]]), group_order="fastest")


@untimed
@given(workloads, group_orders, st.lists(st.integers(0, 3), min_size=2, max_size=2), page_sizes)
def test_partitions_come_one_after_another_each_in_the_order_asked_for(
    workload: list[_Row], group_order: GroupOrder, partition_of: list[int], page_size: int
) -> None:
    """Nothing else changes: what is shared, and the order within a partition that is alone at the root."""
    table, namespaces, decode_lens = _arrays(workload)
    partitions = np.array([partition_of[namespace] for namespace in namespaces.tolist()], np.int64)
    options: Any = {"page_size": page_size, "namespaces": namespaces, "decode_lens": decode_lens}
    plain = plan_batch(table, group_order=group_order, **options)
    plan = plan_batch(table, group_order=group_order, partitions=partitions, **options)
    plan.validate(table, namespaces)
    assert plan.optimal_prefill_tokens == plain.optimal_prefill_tokens
    planned = partitions[plan.order].tolist()
    assert planned == sorted(planned)
    for partition in set(planned):
        rows_of = [[row for row in p.order.tolist() if partitions[row] == partition] for p in (plan, plain)]
        assert rows_of[0] == rows_of[1]
