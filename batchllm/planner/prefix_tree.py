"""The prefix tree of a whole workload: every run of tokens that two or more prompts start with.

Knows: token rows and namespaces. Must not know: pages, KV, schedules, or what sharing is worth.
Invariant: the tree is exact. ``order`` sorts the prompts lexicographically (namespace first, input
row last), and there is one node for every distinct longest common prefix of two prompts.

Sorting is a most-significant-first radix quicksort (Bentley and Sedgewick 1997) in which a bucket
first skips, in growing windows, the tokens all its prompts agree on, and then sorts by the next two
tokens held as one integer beside the row number. Every token is so compared a constant number of
times while its prompt is not alone, and neighbours' common prefix lengths fall out of the splits.
The tree is that of BatchLLM section 4.2 (arXiv 2412.03594), built in linear time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import WorkloadError
from batchllm.tokens import Int32Array, Int64Array, TokenTable, check_integers, common_len

UInt64Array = npt.NDArray[np.uint64]
_Scalar = TypeVar("_Scalar", bound=np.generic)

# Below this many prompts threads cost more than they save.
_MIN_PROMPTS_PER_THREAD = 16_384
# Buckets this small are sorted by insertion.
_INSERTION_SIZE = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixTree:
    """Prompts in depth-first order (lexicographic as built) and the inner nodes of their tree, parents before children.

    Node ``v`` covers the positions ``first[v] .. first[v] + num_prompts[v] - 1`` of ``order``.
    Prompts that end at a node come first among those it covers. The root (no tokens) is not a node.

    Attributes:
        order: Position -> row of the table, int64[num_prompts].
        lcp: Tokens a position shares with the one before it (0 for the first), int32[num_prompts].
        parent: Node that encloses this one, or -1, int32[num_nodes].
        depth: Tokens from the start of the prompt to the node's end, int32[num_nodes].
        first: First position covered, int64[num_nodes].
        num_prompts: Positions covered, at least 2, int64[num_nodes].
    """

    order: Int64Array
    lcp: Int32Array
    parent: Int32Array
    depth: Int32Array
    first: Int64Array
    num_prompts: Int64Array


class _Sorting(NamedTuple):
    """A sort under way, for the kernels. A bucket is a slice of positions, known to agree so far.

    Its end and depth are kept at its first position, so no stack is needed however deep the tree.
    """

    tokens: Int32Array
    offsets: Int64Array
    order: Int64Array
    """Position -> row."""
    keys: UInt64Array
    """Per position, what its bucket is being sorted by."""
    lcp: Int32Array
    bucket_end: Int64Array
    bucket_depth: Int32Array
    """Leading tokens on which the prompts of the bucket agree."""


def build_prefix_tree(table: TokenTable, namespaces: Int64Array | None = None) -> PrefixTree:
    """Sort the prompts and find everything they share.

    Args:
        table: The prompts; none may be empty.
        namespaces: int[num_prompts]; prompts of different namespaces share nothing. None: one for
            all.

    Raises:
        WorkloadError: A prompt has no tokens, or ``namespaces`` does not fit the table.
    """
    empty = np.flatnonzero(table.lengths == 0)
    if len(empty):
        raise WorkloadError(f"row {empty[0]} is an empty prompt: it has no token to compute")
    order, lcp = _sort_prompts(table, namespaces)
    depth, first, num_prompts = _lcp_intervals(lcp)
    return PrefixTree(
        order=order,
        lcp=lcp,
        parent=enclosing_interval(first, num_prompts),
        depth=depth,
        first=first,
        num_prompts=num_prompts,
    )


def _sort_prompts(table: TokenTable, namespaces: Int64Array | None) -> tuple[Int64Array, Int32Array]:
    """Lexicographic order of the rows, and what each position shares with the one before."""
    n = len(table)
    order = np.arange(n, dtype=np.int64)
    starts = np.zeros(min(n, 1), dtype=np.int64)
    if namespaces is not None:
        check_integers("namespaces", namespaces, n)
        order = np.argsort(namespaces, kind="stable").astype(np.int64, copy=False)
        ranked = namespaces[order]
        starts = np.flatnonzero(np.append(np.ones(min(n, 1), bool), ranked[1:] != ranked[:-1]))
    bucket_end = np.zeros(n, dtype=np.int64)
    bucket_end[starts] = np.append(starts[1:], n)[: len(starts)]
    sorting = _Sorting(
        tokens=_read_only(table.tokens),
        offsets=_read_only(table.offsets),
        order=order,
        keys=np.empty(n, dtype=np.uint64),
        lcp=np.zeros(n, dtype=np.int32),
        bucket_end=bucket_end,
        bucket_depth=np.zeros(n, dtype=np.int32),
    )
    num_threads = min(_num_cpus(), max(1, n // _MIN_PROMPTS_PER_THREAD))
    if num_threads == 1:
        _refine_buckets(sorting, 0, n, 1)
        return order, sorting.lcp
    # Here until every bucket is small, then the rest in threads over disjoint slices. The result is
    # a total order, so it does not depend on who sorted what. Threads and not prange: numba's
    # parallel regions neither survive a fork nor, in its fallback layer, two callers at once.
    share = n // (8 * num_threads)
    _refine_buckets(sorting, 0, n, share)
    cuts = _slice_cuts(bucket_end, share).tolist()
    with ThreadPoolExecutor(num_threads) as pool:
        tasks = [pool.submit(_refine_buckets, sorting, lo, hi, 1) for lo, hi in pairwise(cuts)]
    for task in tasks:
        task.result()
    return order, sorting.lcp


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_only(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """One kernel signature for mapped and for writable tables."""
    view = array.view()
    view.flags.writeable = False
    return view


@njit(nogil=True)
def _slice_cuts(bucket_end: Int64Array, share: int) -> Int64Array:
    """Bucket boundaries, from 0 to the end, that cut the positions in slices of about a share."""
    cuts = [np.int64(0)]
    position = np.int64(0)
    while position < len(bucket_end):
        position = bucket_end[position]
        if position - cuts[-1] >= share or position == len(bucket_end):
            cuts.append(position)
    return np.array(cuts)


@njit(nogil=True)
def _refine_buckets(s: _Sorting, lo: int, hi: int, leave: int) -> None:
    """Sort every bucket of positions ``lo .. hi - 1`` that has more than ``leave`` prompts."""
    stack = np.empty(128, dtype=np.int64)
    start = lo
    while start < hi:
        end = s.bucket_end[start]
        if end - start <= leave:
            start = end
            continue
        depth, is_split = _skip_common(s, start, end)
        if is_split:
            _sort_pairs(s.keys, s.order, start, end, stack)
            _split_bucket(s, start, end, depth)
        else:
            _sort_duplicates(s, start, end, stack)
            start = end


@njit(nogil=True)
def _skip_common(s: _Sorting, start: int, end: int) -> tuple[np.int64, bool]:
    """Advance over tokens the whole bucket shares; leave in ``keys`` the two tokens after them.

    Returns the depth reached, and whether the prompts differ there (else they are duplicates).
    """
    depth = np.int64(s.bucket_depth[start])
    while True:
        differ = _gather_keys(s, start, end, depth)
        if differ or s.keys[start] & np.uint64(0xFFFFFFFF) == 0:
            return depth, differ
        depth += 2
        # Growing windows: what a failed window compares to no use is a few times what the bucket has
        # already agreed on, so the skip is linear even where prompts leave one token at a time.
        window = 8
        while True:
            agreed = _agreed_len(s, start, end, depth, window)
            depth += agreed
            if agreed < window:
                break
            window *= 4


@njit(nogil=True)
def _gather_keys(s: _Sorting, start: int, end: int, depth: int) -> bool:
    """Next two tokens of each prompt as one integer, 0 where it ended; True if any differ."""
    differ = False
    for i in range(start, end):
        at = s.offsets[s.order[i]] + depth
        left = s.offsets[s.order[i] + 1] - at
        key = np.uint64(0)
        if left > 0:
            key = np.uint64(s.tokens[at] + np.int64(1)) << np.uint64(32)
        if left > 1:
            key |= np.uint64(s.tokens[at + 1] + np.int64(1))
        s.keys[i] = key
        differ |= key != s.keys[start]
    return differ


@njit(nogil=True)
def _agreed_len(s: _Sorting, start: int, end: int, depth: int, window: int) -> int:
    """How many of the next ``window`` tokens all prompts of the bucket have in common."""
    leader = s.offsets[s.order[start]] + depth
    agreed: int = min(np.int64(window), s.offsets[s.order[start] + 1] - leader)
    for i in range(start + 1, end):
        at = s.offsets[s.order[i]] + depth
        limit = min(agreed, s.offsets[s.order[i] + 1] - at)
        agreed = common_len(s.tokens, leader, s.tokens, at, limit)
        if agreed == 0:
            break
    return agreed


@njit(nogil=True)
def _split_bucket(s: _Sorting, start: int, end: int, depth: int) -> None:
    """Make every run of equal keys a bucket; two keys that differ say where their prompts part."""
    shift, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    run = start
    for i in range(start + 1, end + 1):
        key = s.keys[run]
        if i < end and s.keys[i] == key:
            continue
        s.bucket_end[run] = i
        s.bucket_depth[run] = depth + (key >> shift != 0) + (key & low != 0)
        if i < end:
            s.lcp[i] = depth + (s.keys[i] >> shift == key >> shift)
        run = i


@njit(nogil=True)
def _sort_duplicates(s: _Sorting, start: int, end: int, stack: Int64Array) -> None:
    """Put a bucket of identical prompts in input order."""
    length = s.offsets[s.order[start] + 1] - s.offsets[s.order[start]]
    is_sorted = True
    for i in range(start, end):
        s.keys[i] = np.uint64(s.order[i])
        is_sorted &= i == start or s.order[i - 1] < s.order[i]
    for i in range(start + 1, end):
        s.lcp[i] = length
    if not is_sorted:
        _sort_pairs(s.keys, s.order, start, end, stack)


@njit(nogil=True)
def _sort_pairs(keys: UInt64Array, order: Int64Array, start: int, end: int, stack: Int64Array) -> None:
    """Sort ``keys[start:end]`` and carry ``order`` along: three-way quicksort, explicit stack."""
    stack[0], stack[1] = start, end
    top = 2
    random = np.uint64(end) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    while top > 0:
        top -= 2
        lo, hi = stack[top], stack[top + 1]
        while hi - lo > _INSERTION_SIZE:
            # Places that do not depend on the keys: no arrangement of a workload is a bad case.
            random ^= random << np.uint64(13)
            random ^= random >> np.uint64(7)
            random ^= random << np.uint64(17)
            step = np.int64(random >> np.uint64(33)) % ((hi - lo) // 3)
            third = (hi - lo) // 3
            a, b, c = keys[lo + step], keys[lo + third + step], keys[lo + 2 * third + step]
            pivot = max(min(a, b), min(max(a, b), c))
            less, greater = _partition(keys, order, lo, hi, pivot)
            # The larger side waits, so the stack holds at most log2(n) pairs.
            if less - lo > hi - greater:
                stack[top], stack[top + 1] = lo, less
                lo = greater
            else:
                stack[top], stack[top + 1] = greater, hi
                hi = less
            top += 2
        for i in range(lo + 1, hi):
            key, row = keys[i], order[i]
            j = i
            while j > lo and keys[j - 1] > key:
                keys[j], order[j] = keys[j - 1], order[j - 1]
                j -= 1
            keys[j], order[j] = key, row


@njit(nogil=True)
def _partition(keys: UInt64Array, order: Int64Array, lo: int, hi: int, pivot: int) -> tuple[int, int]:
    """Arrange ``[lo:hi]`` as below, equal to, above the pivot; returns the two boundaries."""
    less, i, greater = lo, lo, hi
    while i < greater:
        key = keys[i]
        if key < pivot:
            keys[i], keys[less] = keys[less], key
            order[i], order[less] = order[less], order[i]
            less += 1
            i += 1
        elif key > pivot:
            greater -= 1
            keys[i], keys[greater] = keys[greater], key
            order[i], order[greater] = order[greater], order[i]
        else:
            i += 1
    return less, greater


@njit(nogil=True)
def _lcp_intervals(lcp: Int32Array) -> tuple[Int32Array, Int64Array, Int64Array]:
    """Depth, first position and size of every interval of the LCP array, in DFS preorder.

    Walking from the right closes children before parents and right before left: preorder, reversed.
    """
    n = len(lcp)
    depth, first, size = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.int64)
    open_depth, open_end = np.empty(n + 1, np.int32), np.empty(n + 1, np.int64)
    open_depth[0] = 0
    top = count = 0
    for i in range(n - 1, -1, -1):
        value, end = (lcp[i] if i > 0 else 0), i + 1
        while open_depth[top] > value:
            end = open_end[top]
            depth[count], first[count], size[count] = open_depth[top], i, end - i
            count += 1
            top -= 1
        if open_depth[top] < value:
            top += 1
            open_depth[top], open_end[top] = value, end
    return depth[:count][::-1].copy(), first[:count][::-1].copy(), size[:count][::-1].copy()


@njit(nogil=True)
def enclosing_interval(first: Int64Array, size: Int64Array) -> Int32Array:
    """Smallest earlier interval that holds each interval, or -1; intervals are in preorder.

    Args:
        first: First position of each interval, int64[num_intervals].
        size: Positions in each interval, int64[num_intervals].

    Returns:
        int32[num_intervals]; an interval that only partly overlaps an earlier one gets -2.
    """
    parent = np.empty(len(first), np.int32)
    for v in range(len(first)):
        u = v - 1
        # Amortised: an interval that is climbed over is closed, and never climbed again.
        while u >= 0 and first[u] + size[u] <= first[v]:
            u = parent[u]
        inside = u < 0 or (first[u] <= first[v] and first[v] + size[v] <= first[u] + size[u])
        parent[v] = u if inside else -2
    return parent
