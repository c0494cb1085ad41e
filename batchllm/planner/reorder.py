"""The positions of a plan in another order: what is parted there is planned again, as prefixes of its own.

Knows: a plan, an order, places where nothing is read across. Must not know: why the order is another one.
Invariant: the result is a sound plan of the same requests, and what it computes beyond the optimum is its
``num_lost_tokens``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.planner.plan import BatchPlan, deepest_prefix
from batchllm.tokens import Int32Array, Int64Array

BoolArray = npt.NDArray[np.bool_]


def reordered(plan: BatchPlan, turn: Int64Array, is_cut: BoolArray | None = None) -> BatchPlan:
    """The plan with its positions in another order, and a prefix for each run of its consumers. Not validated.

    Args:
        plan: The plan.
        turn: Place in the new order -> position, a permutation, int64[num_requests].
        is_cut: Places where nothing may be read that was computed before, bool[num_requests]. None: nowhere.

    Returns:
        A plan whose ``num_lost_tokens`` is what it computes beyond the optimum.
    """
    request_prefix = plan.request_prefix[turn]
    if is_cut is None:
        is_cut = np.zeros(plan.num_requests, np.bool_)
    num_openings = _num_openings(request_prefix, plan.parent, is_cut)
    runs = _runs_of_prefixes(request_prefix, plan.parent, is_cut, num_openings)
    parent, start_len, end_len, first, num_consumers = _as_prefixes(*runs, plan.end_len)
    ordered = BatchPlan(
        num_requests=plan.num_requests,
        page_size=plan.page_size,
        order=plan.order[turn],
        prompt_lens=plan.prompt_lens[turn],
        request_prefix=deepest_prefix(parent, first, num_consumers, plan.num_requests),
        parent=parent,
        start_len=start_len,
        end_len=end_len,
        first=first,
        num_consumers=num_consumers,
        num_prompt_tokens=plan.num_prompt_tokens,
        optimal_prefill_tokens=plan.optimal_prefill_tokens,
        share_lens=None if plan.share_lens is None else plan.share_lens[turn],
    )
    num_computed = int(ordered.computed_lens().sum(dtype=np.int64))
    return replace(ordered, num_lost_tokens=num_computed - plan.optimal_prefill_tokens)


@njit(nogil=True)
def _num_openings(request_prefix: Int32Array, parent: Int32Array, is_cut: BoolArray) -> int:
    """How often a position has a prefix that the one before it has not, or from which a cut parts it."""
    count, before = 0, np.int32(-1)
    for i in range(len(request_prefix)):
        prefix = request_prefix[i]
        a, b = before, prefix
        if is_cut[i]:
            a = np.int32(-1)
        while a != b:  # a parent's number is the smaller one
            if a > b:
                a = parent[a]
            else:
                b = parent[b]
                count += 1
        before = prefix
    return count


@njit(nogil=True)
def _runs_of_prefixes(
    request_prefix: Int32Array, parent: Int32Array, is_cut: BoolArray, num_openings: int
) -> tuple[Int32Array, Int32Array, Int64Array, Int64Array]:
    """Every longest run of positions that have a prefix in common: its prefix, the run around it, first, number."""
    prefix_of, above = np.empty(num_openings, np.int32), np.empty(num_openings, np.int32)
    first, num = np.empty(num_openings, np.int64), np.empty(num_openings, np.int64)
    run_of = np.full(len(parent), -1, np.int32)
    count, before, n = 0, np.int32(-1), len(request_prefix)
    for i in range(n + 1):
        prefix = request_prefix[i] if i < n else np.int32(-1)
        a, b, num_new = before, prefix, 0
        if i < n and is_cut[i]:
            while a >= 0:
                num[run_of[a]] = i - first[run_of[a]]
                a = parent[a]
        while a != b:
            if a > b:
                num[run_of[a]] = i - first[run_of[a]]
                a = parent[a]
            else:
                b = parent[b]
                num_new += 1
        before = prefix
        k, count = count + num_new, count + num_new
        while prefix != b:  # the outermost gets the smallest number
            k -= 1
            prefix_of[k], first[k], run_of[prefix] = prefix, i, k
            above[k] = np.int32(k - 1)
            prefix = parent[prefix]
        if num_new > 0:
            above[k] = run_of[b] if b >= 0 else np.int32(-1)
    return prefix_of, above, first, num


@njit(nogil=True)
def _as_prefixes(
    prefix_of: Int32Array, above: Int32Array, first: Int64Array, num: Int64Array, end_len: Int32Array
) -> tuple[Int32Array, Int32Array, Int32Array, Int64Array, Int64Array]:
    """Parents, starts, ends, first and number of consumers of the runs as prefixes, with new numbers.

    A run of one shares nothing, and of two prefixes with the same run the longer stands for both.
    """
    num_runs, count = len(first), 0
    parent, start, end = np.empty(num_runs, np.int32), np.empty(num_runs, np.int32), np.empty(num_runs, np.int32)
    # The run that stays and has what this one has: itself, or the nearest above it.
    stand_in = np.empty(num_runs, np.int32)
    for k in range(num_runs):
        outer = stand_in[above[k]] if above[k] >= 0 else np.int32(-1)
        stand_in[k] = outer
        is_doubled = k + 1 < num_runs and first[k + 1] == first[k] and num[k + 1] == num[k]
        if num[k] >= 2 and not is_doubled:
            parent[count], start[count] = outer, end[outer] if outer >= 0 else 0
            end[count] = end_len[prefix_of[k]]
            first[count], num[count] = first[k], num[k]
            stand_in[k] = count
            count += 1
    return parent[:count].copy(), start[:count].copy(), end[:count].copy(), first[:count].copy(), num[:count].copy()
