"""A plan in units, for several engines that take them one by one: whole groups, the most work first.

A group is what starts at the root of the prefix tree: a planned prefix with all its consumers, or a request that shares
nothing. Two groups share nothing, so it does not matter which engine gets which. A group larger than is fair, a share
of the work that is left when it is its turn, is cut in pieces; these shrink as the work runs out, so that all engines
end together. A cut costs what the request behind it would have read: the prompt tokens down to the level at which the
two neighbours part. It is made where that is least, in the last quarter of a piece.

Knows: a plan, the work that each request is, how many engines there are. Must not know: engines, KV slots, time.
Invariant: units are consecutive ranges of a sound plan of the same requests; none reads what another computes; what the
cuts cost is the plan's ``num_lost_tokens``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm.errors import WorkloadError
from batchllm.planner.plan import BatchPlan
from batchllm.planner.reorder import reordered
from batchllm.tokens import Int64Array, starts_of

_PIECES_PER_SHARE = 2
"""A unit is at most one engine's share of the work that is left, divided by this (Hummel et al., *Factoring*, 1992)."""
_MIN_PIECES_PER_ENGINE = 64
"""No piece is made smaller than one engine's share of all work, divided by this."""
_FEW_PIECES_PER_ENGINE = 8
"""A job that is small in all is cut in no fewer."""
_MIN_WORK_PER_LOSS = 16
"""A piece is at least so many times the work that its cut adds."""

DECODE_WORK = 2.0
"""Prompt tokens that are as much work as a token decoded among many."""
KV_PER_WORK = 1024.0
"""Tokens of KV that are read in the time in which one prompt token is computed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """A plan in units.

    Attributes:
        plan: The plan, unit by unit; its ``num_lost_tokens`` has what the cuts cost, beside what was lost before.
        bounds: First position of each unit, and the end, int64[num_units + 1].
        work: Expected work of each position, in prompt tokens, with what cuts add, float64[num_requests].
        num_cut_groups: Groups that are in more than one unit.
    """

    plan: BatchPlan
    bounds: Int64Array
    work: npt.NDArray[np.float64]
    num_cut_groups: int

    @property
    def num_units(self) -> int:
        """Units there are."""
        return len(self.bounds) - 1

    @property
    def unit_work(self) -> npt.NDArray[np.float64]:
        """Expected work of each unit, float64[num_units]. It never rises, unless the order was kept."""
        return np.add.reduceat(self.work, self.bounds[:-1]) if self.num_units else np.zeros(0)


def expected_work(plan: BatchPlan, decode_lens: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Work that each position is expected to be: prompt tokens to compute, tokens to decode, KV that these read.

    Args:
        plan: The plan.
        decode_lens: Tokens each row is expected to generate, int[num_requests].

    Returns:
        In prompt tokens, float64[num_requests].
    """
    return request_work(plan.computed_lens(), plan.prompt_lens, decode_lens[plan.order])


def request_work(
    computed_lens: npt.NDArray[Any], prompt_lens: npt.NDArray[Any], decode_lens: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """As `expected_work`, of requests in any order.

    Args:
        computed_lens: Prompt tokens to compute for each, shape ``[num_requests]``.
        prompt_lens: Prompt tokens of each.
        decode_lens: Tokens that each is expected to generate.
    """
    decode = decode_lens.astype(np.float64)
    kv_reads = decode * (prompt_lens + decode / 2)
    return computed_lens + DECODE_WORK * decode + kv_reads / KV_PER_WORK


def partition(
    plan: BatchPlan, work: npt.NDArray[np.float64], num_engines: int, *, keeps_order: bool = False
) -> Partition:
    """Cut a plan in units and put those with the most work first. Validated.

    Takes time in proportion to the requests, plus sorting the groups.

    Args:
        plan: The plan.
        work: Work that each position is, in prompt tokens, above 0, float64[num_requests]; `expected_work` tells.
        num_engines: Engines that are to end together, at least 1. For one the order stays as it is, in one unit.
        keeps_order: The order of the plan is a promise: it stays, though engines may then end further apart.

    Raises:
        WorkloadError: ``work`` does not fit the plan, or is not above 0, or ``num_engines`` is below 1.
    """
    if num_engines < 1:
        raise WorkloadError(f"num_engines must be at least 1, not {num_engines}")
    if work.shape != (plan.num_requests,):
        raise WorkloadError(f"work must be {plan.num_requests} numbers, not {work.dtype} of shape {work.shape}")
    if not (np.isfinite(work) & (work > 0)).all():
        position = int(np.argmin(np.isfinite(work) & (work > 0)))
        raise WorkloadError(f"position {position} has the work {work[position]}; it must be above 0")
    if num_engines == 1 or plan.num_requests == 0:
        num_units = min(1, plan.num_requests)
        bounds = np.array([0, plan.num_requests][: num_units + 1], np.int64)
        return Partition(plan=plan, bounds=bounds, work=work.astype(np.float64), num_cut_groups=0)
    first = np.flatnonzero(_begins_group(plan))
    first, unit_work, num_cut_groups = _cut_large_groups(plan, first, work, num_engines)
    turn_of_units = np.arange(len(first)) if keeps_order else np.argsort(-unit_work, kind="stable")
    sizes = np.diff(np.append(first, plan.num_requests))[turn_of_units]
    bounds = starts_of(sizes)
    turn = np.repeat(first[turn_of_units] - bounds[:-1], sizes) + np.arange(plan.num_requests)
    is_cut = np.zeros(plan.num_requests, np.bool_)
    is_cut[bounds[:-1]] = True
    units = reordered(plan, turn, is_cut)
    units.validate()
    work_at = work[turn]
    work_at[bounds[:-1]] += (plan.prompt_lens - plan.computed_lens())[turn[bounds[:-1]]]
    return Partition(plan=units, bounds=bounds, work=work_at, num_cut_groups=num_cut_groups)


def cut_in_ranges(
    work: npt.NDArray[np.float64],
    loss: npt.NDArray[np.float64],
    num_engines: int,
    *,
    min_work: float,
    sizes: npt.NDArray[np.float64],
    max_size: float,
) -> Int64Array:
    """Cut requests in prefix order, of which there is no plan, in ranges that several engines take one by one.

    Groups stay whole as far as that leaves every engine its share; ranges shrink as the work runs out.

    Args:
        work: Work that each request is beside the one before it, above 0, float64[num_requests].
        loss: Work that a cut before each request adds, float64[num_requests].
        num_engines: Engines that are to end together, at least 1.
        min_work: Work up to which a range is not cut for its work, as long as each engine has a few.
        sizes: What each request takes of the largest size, float64[num_requests].
        max_size: The most that a range may have, as long as it is more than one request.

    Returns:
        First request of each range, ascending, int64[num_ranges].
    """
    num_requests = len(work)
    before, size_before = (np.concatenate([[0.0], values.cumsum()]) for values in (work, sizes))
    share = before[-1] / num_engines
    smallest = max(share / _MIN_PIECES_PER_ENGINE, min(share / _FEW_PIECES_PER_ENGINE, min_work))
    firsts: list[int] = []
    start = 0
    while start < num_requests:
        firsts.append(start)
        limit = max((before[-1] - before[start]) / (num_engines * _PIECES_PER_SHARE), smallest)
        cut = _cheapest_cut(before, loss, start, num_requests, limit)
        full = int(np.searchsorted(size_before, size_before[start] + max_size, "right")) - 1
        start = max(min(cut, full), start + 1)
    return np.array(firsts, np.int64)


def _begins_group(plan: BatchPlan) -> npt.NDArray[np.bool_]:
    """Whether each position is the first of its group."""
    roots = plan.parent == -1
    inside = np.zeros(plan.num_requests + 1, np.int64)
    inside[plan.first[roots] + 1] += 1
    inside[plan.first[roots] + plan.num_consumers[roots]] -= 1
    begins: npt.NDArray[np.bool_] = inside.cumsum()[:-1] == 0
    return begins


def _cut_large_groups(
    plan: BatchPlan, first: Int64Array, work: npt.NDArray[np.float64], num_engines: int
) -> tuple[Int64Array, npt.NDArray[np.float64], int]:
    """Where each unit begins, ascending, its work, and how many groups are cut."""
    ends = np.append(first[1:], plan.num_requests)
    group_work = np.add.reduceat(work, first)
    before = np.concatenate([[0.0], work.cumsum()])
    # What a request would compute anew if nothing in front of it could be read.
    loss = (plan.prompt_lens - plan.computed_lens()).astype(np.float64)
    left = float(work.sum())
    smallest = left / (num_engines * _MIN_PIECES_PER_ENGINE)
    large = np.flatnonzero(group_work > smallest)
    heap = [(-float(group_work[g]), int(first[g]), int(ends[g])) for g in large]
    heapq.heapify(heap)
    pieces: list[tuple[int, float]] = []
    num_cuts = Counter[int]()  # by where the group ends
    while heap:
        negative, start, end = heapq.heappop(heap)
        limit = max(left / (num_engines * _PIECES_PER_SHARE), smallest)
        size = -negative
        extra = size - (before[end] - before[start])  # what it computes anew, from an earlier cut
        cut = _cheapest_cut(before, loss, start, end, limit - extra) if size > limit else end
        if cut == end:
            taken = size
        else:
            taken = float(before[cut] - before[start]) + extra
            heapq.heappush(heap, (-float(before[end] - before[cut] + loss[cut]), cut, end))
            num_cuts[end] += 1
            left += float(loss[cut])
        pieces.append((start, taken))
        left -= taken
    small = np.delete(np.arange(len(first)), large)
    starts = np.concatenate([first[small], np.array([start for start, _ in pieces], np.int64)])
    unit_work = np.concatenate([group_work[small], np.array([taken for _, taken in pieces], np.float64)])
    in_order = np.argsort(starts, kind="stable")
    return starts[in_order], unit_work[in_order], len(num_cuts)


def _cheapest_cut(
    before: npt.NDArray[np.float64], loss: npt.NDArray[np.float64], start: int, end: int, limit: float
) -> int:
    """Position before which to end a piece that begins at ``start``; ``end`` where no cut is worth its cost."""
    while end - start > 1 and before[end] - before[start] > limit:
        latest = int(np.searchsorted(before, before[start] + limit, "right")) - 1
        latest = min(max(latest, start + 1), end - 1)
        earliest = int(np.searchsorted(before, before[start] + 0.75 * limit))
        earliest = max(start + 1, min(earliest, latest))
        # The last of those that cost least: fewer pieces.
        cut = latest - int(np.argmin(loss[earliest : latest + 1][::-1]))
        # A piece ends before the limit where requests are large: what counts is the piece itself.
        if _MIN_WORK_PER_LOSS * loss[cut] <= before[cut] - before[start]:
            return cut
        limit = max(_MIN_WORK_PER_LOSS * float(loss[cut]), 1.25 * limit)
    return end
