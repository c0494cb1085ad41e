"""In which order siblings run: at every level of the prefix tree, tree in, tree out.

What starts at one node, subtrees and single prompts alike, may run in any order: each still reads all
of the node, so the reuse is the same. The order decides what runs together, groups that decode much
or groups that prefill much. The rule "paper" is that of BatchLLM section 4.3.2, "ratio" its idea with members
counted.

Knows: a `PrefixTree`, lengths of prompts and expected lengths of outputs. Must not know: tokens,
pages, KV, time, how lengths were guessed.
Invariant: the result is a `PrefixTree` of the same prompts with the same nodes, in preorder. Prompts
that end at a node stay first in it, for they compute it, and in input order.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import WorkloadError
from batchllm.planner.plan import deepest_prefix
from batchllm.planner.prefix_tree import PrefixTree
from batchllm.tokens import Int32Array, Int64Array, check_integers

GroupOrder = Literal["lexicographic", "input", "ratio", "paper", "balanced"]
"""How siblings are ordered; ties go to the smallest input row.

* ``lexicographic``: by their tokens, as the tree comes.
* ``input``: by the smallest input row among their prompts.
* ``ratio``: most decode tokens of all members per prompt token to compute first. A run of tokens that
  several members share is computed once, and what the parent holds is not computed.
* ``paper``: the same with the decode tokens of every sibling taken as 1, however many members it has:
  fewest prompt tokens to compute first.
* ``balanced``: drawn from both ends of ``ratio``, so that decode per prefill token stays as close as
  possible to that of all siblings together; the decode-heavy end begins, and wins ties.
"""
GROUP_ORDERS: tuple[GroupOrder, ...] = get_args(GroupOrder)
DEFAULT_GROUP_ORDER: GroupOrder = "balanced"

Float64Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]

# In the kernels an *element* is a node, by its number, or the prompt at old position i, as number
# num_nodes + i. The siblings below node v are siblings[start[v + 1] : start[v + 2]], so the root,
# -1, has the first slice. Prompts that end at a node are no siblings: they stay where they are.


def order_groups(
    tree: PrefixTree,
    prompt_lens: Integers,
    decode_lens: Integers,
    order: GroupOrder,
    partitions: Int64Array | None = None,
) -> PrefixTree:
    """The same tree with the siblings of every node in another order.

    Linear in prompts and nodes, plus sorting each node's siblings; any depth. Ratios are compared as
    float64.

    Args:
        tree: A prefix tree; it is not changed, and returned itself if nothing is to move.
        prompt_lens: Tokens of each row's prompt, int[num_prompts].
        decode_lens: Tokens each row is expected to generate, at least 1, int[num_prompts].
        order: One of `GROUP_ORDERS`.
        partitions: int[num_prompts]; prompts of one partition come together, the lowest number first, and in
            ``order`` among themselves. They share nothing with others. None: one for all.

    Raises:
        WorkloadError: There is no such order, or ``decode_lens`` does not fit the prompts or has a
            value below 1 (the message names the row).
    """
    if order not in GROUP_ORDERS:
        raise WorkloadError(f"group_order must be one of {', '.join(GROUP_ORDERS)}, not {order!r}")
    _check_decode_lens(decode_lens, len(tree.order))
    if order == "lexicographic" and partitions is None:
        return tree
    owner = np.concatenate([tree.parent, deepest_prefix(tree.parent, tree.first, tree.num_prompts, len(tree.order))])
    start, siblings = _ordered_siblings(tree, owner, prompt_lens, decode_lens, order)
    if partitions is not None:  # what shares nothing begins at the root
        first = np.concatenate([tree.first, np.arange(len(tree.order))])
        roots = siblings[: start[1]]
        roots[:] = roots[np.argsort(partitions[tree.order[first[roots]]], kind="stable")]
    return _rearranged(tree, owner, start, siblings)


def _ordered_siblings(
    tree: PrefixTree, owner: Int32Array, prompt_lens: Integers, decode_lens: Integers, order: GroupOrder
) -> tuple[Int64Array, Int32Array]:
    """Where each node's siblings start, and the siblings in order. What this needs is large, and freed at its end."""
    own_tokens = np.concatenate([tree.depth, prompt_lens.astype(np.int32, copy=False)[tree.order]])
    # -1 as an index is the zero at the end: the root has no tokens.
    own_tokens -= np.append(tree.depth, np.int32(0))[owner]
    # A prompt with no token of its own ends at its node.
    start, siblings = _siblings(owner, own_tokens > 0, tree)
    if order == "lexicographic":
        _sort_siblings(start, siblings, np.concatenate([tree.first, np.arange(len(tree.order))]).astype(np.float64))
    elif order != "input":
        own_decode = np.append(np.zeros(len(tree.depth), np.int64), decode_lens[tree.order])
        tokens = _subtree_sums(owner, own_tokens.astype(np.int64))
        del own_tokens
        _sort(start, siblings, tokens, _subtree_sums(owner, own_decode), order)
    return start, siblings


def _sort(start: Int64Array, siblings: Int32Array, tokens: Int64Array, decode: Int64Array, order: GroupOrder) -> None:
    """Put each node's siblings in order.

    Args:
        start: Where each node's siblings start.
        siblings: The siblings.
        tokens: Prompt tokens of each element and all below it.
        decode: Tokens that these will generate.
        order: Not one of those that look at neither.
    """
    # Ended prompts are never compared; they only must not divide by zero.
    rank = tokens.astype(np.float64)
    if order != "paper":
        np.maximum(rank, 1.0, out=rank)
        np.divide(decode, rank, out=rank)
        np.negative(rank, out=rank)
    _sort_siblings(start, siblings, rank)
    if order == "balanced":
        _balance_siblings(start, siblings, tokens, decode)


def _check_decode_lens(decode_lens: Integers, num_prompts: int) -> None:
    check_integers("decode_lens", decode_lens, num_prompts)
    too_small = np.flatnonzero(decode_lens < 1)
    if len(too_small):
        row = too_small[0]
        raise WorkloadError(f"row {row} has a decode_lens of {decode_lens[row]}; it must be at least 1")


def _siblings(owner: Int32Array, is_free: npt.NDArray[np.bool_], tree: PrefixTree) -> tuple[Int64Array, Int32Array]:
    """Where each node's siblings start, and the siblings, those with the smallest input row first."""
    num_siblings = np.bincount(owner[is_free] + 1, minlength=len(tree.depth) + 1)
    start = np.zeros(len(tree.depth) + 2, np.int64)
    np.cumsum(num_siblings, out=start[1:])
    position_of_row = np.empty(len(tree.order), np.int64)
    position_of_row[tree.order] = np.arange(len(tree.order))
    return start, _siblings_by_row(owner, is_free, start, position_of_row)


@njit(nogil=True)
def _siblings_by_row(
    owner: Int32Array, is_free: npt.NDArray[np.bool_], start: Int64Array, position_of_row: Int64Array
) -> Int32Array:
    """A counting sort: rows ascend, so a node is first met from its smallest row, and filed then."""
    num_nodes = len(owner) - len(position_of_row)
    siblings = np.empty(start[-1], np.int32)
    end = start[:-1].copy()
    is_filed = np.zeros(num_nodes, np.bool_)
    for position in position_of_row:
        element = num_nodes + position
        while True:
            above = owner[element]
            if is_free[element]:
                siblings[end[above + 1]] = element
                end[above + 1] += 1
            # Above a node that is filed all are: every node is climbed over once.
            if above < 0 or is_filed[above]:
                break
            is_filed[above] = True
            element = np.int64(above)
    return siblings


@njit(nogil=True)
def _subtree_sums(owner: Int32Array, values: Int64Array) -> Int64Array:
    """Sum of ``values`` over each element and all below it, in their place. Parents come before children."""
    for element in range(len(values) - 1, -1, -1):
        if owner[element] >= 0:
            values[owner[element]] += values[element]
    return values


@njit(nogil=True)
def _sort_siblings(start: Int64Array, siblings: Int32Array, rank: Float64Array) -> None:
    """Sort each node's siblings by rank, smallest first; of equals, those in front stay in front."""
    for u in range(len(start) - 1):
        lo, hi = start[u], start[u + 1]
        is_sorted = True
        for i in range(lo + 1, hi):
            if rank[siblings[i]] < rank[siblings[i - 1]]:
                is_sorted = False
                break
        if not is_sorted:
            members = siblings[lo:hi].copy()
            siblings[lo:hi] = members[np.argsort(rank[members], kind="mergesort")]


@njit(nogil=True)
def _balance_siblings(start: Int64Array, siblings: Int32Array, tokens: Int64Array, decode: Int64Array) -> None:
    """Take each node's siblings, sorted by ratio, from the end that keeps the mix nearest the overall one."""
    for u in range(len(start) - 1):
        ranked = siblings[start[u] : start[u + 1]].copy()
        overall = decode[ranked].sum() / max(1, tokens[ranked].sum())
        lo, hi = 0, len(ranked) - 1
        sum_decode, sum_tokens = np.int64(0), np.int64(0)
        for i in range(start[u], start[u + 1]):
            heavy, light = ranked[lo], ranked[hi]
            if_heavy = (sum_decode + decode[heavy]) / (sum_tokens + tokens[heavy])
            if_light = (sum_decode + decode[light]) / (sum_tokens + tokens[light])
            if i == start[u] or abs(if_heavy - overall) <= abs(if_light - overall):
                siblings[i] = heavy
                lo += 1
            else:
                siblings[i] = light
                hi -= 1
            sum_decode += decode[siblings[i]]
            sum_tokens += tokens[siblings[i]]


def _rearranged(tree: PrefixTree, owner: Int32Array, start: Int64Array, siblings: Int32Array) -> PrefixTree:
    """The tree whose nodes have their siblings as listed: positions, numbers and LCPs are computed again."""
    num_below = _subtree_sums(tree.parent, np.ones(len(tree.depth), np.int64))
    source, lcp, first, number = _lay_out(tree.depth, tree.first, tree.num_prompts, owner, num_below, start, siblings)
    node = np.empty(len(number), np.int64)
    node[number] = np.arange(len(number))
    return PrefixTree(
        order=tree.order[source],
        lcp=lcp,
        parent=np.append(number, np.int32(-1))[tree.parent[node]],
        depth=tree.depth[node],
        first=first[node],
        num_prompts=tree.num_prompts[node],
    )


@njit(nogil=True)
def _lay_out(
    depth: Int32Array,
    first: Int64Array,
    num_prompts: Int64Array,
    owner: Int32Array,
    num_below: Int64Array,
    start: Int64Array,
    siblings: Int32Array,
) -> tuple[Int64Array, Int32Array, Int64Array, Int32Array]:
    """New position -> old position, new LCPs, and each old node's new first position and number."""
    num_nodes = len(depth)
    source = np.empty(len(owner) - num_nodes, np.int64)
    lcp = np.zeros(len(source), np.int32)
    new_first, number = np.empty(num_nodes, np.int64), np.empty(num_nodes, np.int32)
    size = np.ones(len(owner), np.int64)
    size[:num_nodes] = num_prompts
    # Parents first: a node's own place is known before it places what is below it.
    for v in range(-1, num_nodes):
        begin, upcoming, here, num_ended = np.int64(0), np.int64(0), np.int32(0), np.int64(len(source))
        if v >= 0:
            begin, upcoming, here, num_ended = new_first[v], np.int64(number[v]) + 1, depth[v], num_prompts[v]
        for i in range(start[v + 1], start[v + 2]):
            num_ended -= size[siblings[i]]
        # A position has this node in common with the one before it, except the first in the node: its
        # LCP is that of a node above.
        for i in range(num_ended):
            source[begin + i] = first[v] + i
            if i > 0:
                lcp[begin + i] = here
        at = begin + num_ended
        for i in range(start[v + 1], start[v + 2]):
            element = siblings[i]
            if at > begin:
                lcp[at] = here
            if element < num_nodes:
                new_first[element], number[element] = at, upcoming
                upcoming += num_below[element]
            else:
                source[at] = element - num_nodes
            at += size[element]
    return source, lcp, new_first, number
