"""The prefix tree holds exactly what prompts share, whatever their shape, order or number."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.planner import prefix_tree
from batchllm.planner.prefix_tree import PrefixTree, build_prefix_tree, enclosing_interval
from batchllm.tokens import TokenTable
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(50, 100))

# Runs that share starts with each other, shorter and longer than the windows of the sort.
_RUNS = [[0], [1], [0, 1, 2], [0, 1, 3], [5] * 7, [5] * 40, [2**31 - 1]]


def _joined(runs: list[list[int]]) -> list[int]:
    return [token for run in runs for token in run]


prompt = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=6).map(_joined)
prompts_with_namespaces = st.lists(st.tuples(prompt, st.integers(-1, 1)), min_size=1, max_size=40)


def _tree(prompts: list[list[int]], namespaces: list[int] | None = None) -> PrefixTree:
    return build_prefix_tree(
        TokenTable.from_lists(prompts),
        None if namespaces is None else np.array(namespaces, dtype=np.int64),
    )


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@untimed
@given(prompts_with_namespaces)
def test_prompts_are_sorted_by_namespace_then_tokens_then_input_row(
    workload: list[tuple[list[int], int]],
) -> None:
    prompts, namespaces = [p for p, _ in workload], [s for _, s in workload]
    tree = _tree(prompts, namespaces)
    expected = sorted(range(len(prompts)), key=lambda i: (namespaces[i], prompts[i], i))
    assert tree.order.tolist() == expected
    assert tree.lcp.tolist() == [0] + [
        _shared(prompts[a], prompts[b]) if namespaces[a] == namespaces[b] else 0 for a, b in pairwise(expected)
    ]


@untimed
@given(prompts_with_namespaces)
def test_there_is_one_node_for_every_longest_common_prefix_of_two_prompts(
    workload: list[tuple[list[int], int]],
) -> None:
    prompts, namespaces = [p for p, _ in workload], [s for _, s in workload]
    tree = _tree(prompts, namespaces)
    expected = {
        (namespaces[a], tuple(prompts[a][: _shared(prompts[a], prompts[b])]))
        for a, b in combinations(range(len(prompts)), 2)
        if namespaces[a] == namespaces[b] and _shared(prompts[a], prompts[b])
    }
    nodes = []
    for v in range(len(tree.depth)):
        leader = tree.order[tree.first[v]]
        nodes.append((namespaces[leader], tuple(prompts[leader][: tree.depth[v]])))
        covered = tree.order[tree.first[v] : tree.first[v] + tree.num_prompts[v]].tolist()
        assert sorted(covered) == [
            i for i, (p, s) in enumerate(workload) if s == nodes[v][0] and tuple(p[: tree.depth[v]]) == nodes[v][1]
        ]
    assert len(nodes) == len(expected)
    assert set(nodes) == expected


@untimed
@given(prompts_with_namespaces)
def test_nodes_come_in_preorder_and_a_parent_is_the_next_shorter_node(
    workload: list[tuple[list[int], int]],
) -> None:
    tree = _tree([p for p, _ in workload], [s for _, s in workload])
    spans = [(int(f), int(f + k)) for f, k in zip(tree.first, tree.num_prompts, strict=True)]
    for v, (lo, hi) in enumerate(spans):
        around = [u for u, (a, b) in enumerate(spans) if u != v and a <= lo and hi <= b]
        assert tree.parent[v] == max(around, key=lambda u: tree.depth[u], default=-1)
    assert spans == sorted(spans, key=lambda span: (span[0], -span[1]))


@untimed
@given(prompts_with_namespaces, st.integers(1, 5))
def test_threads_do_not_change_the_tree(workload: list[tuple[list[int], int]], num_cpus: int) -> None:
    prompts, namespaces = [p for p, _ in workload], [s for _, s in workload]
    alone = _tree(prompts, namespaces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "_num_cpus", lambda: num_cpus)
        patch.setattr(prefix_tree, "_MIN_PROMPTS_PER_THREAD", 2)
        together = _tree(prompts, namespaces)
    assert together.order.tolist() == alone.order.tolist()
    assert together.lcp.tolist() == alone.lcp.tolist()


def test_large_random_buckets_are_sorted() -> None:
    """Quicksort, its partitions and its insertion sort agree with numpy on many distinct keys."""
    tokens = np.random.default_rng(7).integers(0, 500, size=(20_000, 3), dtype=np.int32)
    table = TokenTable(tokens=tokens.ravel(), offsets=np.arange(0, 60_001, 3))
    expected = np.lexsort((np.arange(20_000), tokens[:, 2], tokens[:, 1], tokens[:, 0]))
    assert build_prefix_tree(table).order.tolist() == expected.tolist()


def test_identical_prompts_keep_input_order_in_one_node() -> None:
    tree = _tree([[3] * 50] * 1000)
    assert tree.order.tolist() == list(range(1000))
    assert (tree.depth.tolist(), tree.num_prompts.tolist()) == ([50], [1000])


@pytest.mark.parametrize("step", [1, -1])
def test_a_staircase_of_prefixes_is_a_chain_of_nodes(step: int) -> None:
    """Each prompt is a prefix of the next: as deep a tree as there is, without recursion."""
    prompts = [list(range(n)) for n in range(1, 1500)][::step]
    tree = _tree(prompts)
    assert tree.depth.tolist() == list(range(1, 1499))
    assert tree.parent.tolist() == list(range(-1, 1497))
    assert [len(prompts[row]) for row in tree.order] == list(range(1, 1500))


def test_an_empty_table_gives_an_empty_tree() -> None:
    tree = _tree([], [])
    assert (len(tree.order), len(tree.lcp), len(tree.depth)) == (0, 0, 0)


def test_an_empty_prompt_is_refused_by_row() -> None:
    with pytest.raises(WorkloadError, match="row 2 is an empty prompt"):
        _tree([[1], [2], [], []])


@pytest.mark.parametrize("namespaces", [np.zeros(3, np.int64), np.zeros(2)])
def test_namespaces_that_do_not_fit_are_refused(namespaces: np.ndarray) -> None:
    with pytest.raises(WorkloadError, match="namespaces must be 2 integers"):
        build_prefix_tree(TokenTable.from_lists([[1], [1]]), namespaces)


def test_an_interval_that_overlaps_another_in_part_is_marked() -> None:
    assert enclosing_interval(np.array([0, 2]), np.array([3, 3])).tolist() == [-1, -2]
