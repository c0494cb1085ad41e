"""In which order the requests of several owners run, planned together: each gets its share while it has work.

A plan's order serves reuse: a document's ten thousand questions come in one piece, whoever waits. Here
the order is walked again and again, and an owner that is a *quantum* of service ahead of another one that
still has work is passed over until it is ahead of nobody. So the order stays what it was while owners
keep pace (a document that several share is still computed once, for all of them), and is cut only
where one would starve: what was passed over is planned again, its prefixes as prefixes of their own.

Knows: a plan, who owns each request, what each costs. Must not know: tokens, KV slots, time, jobs.
Invariant: at any position, an owner that has work left is less than the quantum and one request behind
any other that has; and what the cuts cost, ``num_lost_tokens``, is at most `MAX_LOST_SHARE` of the
cost of all requests, for which the quantum is doubled as often as that takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import WorkloadError
from batchllm.planner.plan import BatchPlan
from batchllm.planner.reorder import reordered
from batchllm.tokens import Int64Array, check_integers

Integers = npt.NDArray[np.integer]

MAX_LOST_SHARE = 0.05
"""Of the cost of all requests; what is computed again for the sake of fairness stays below."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FairPlan:
    """A plan in fair order.

    Attributes:
        plan: The plan; what its cuts cost is its ``num_lost_tokens``.
        quantum: What an owner may be behind another, in units of the costs: at least the value that the caller gave.
    """

    plan: BatchPlan
    quantum: int


def fair_order(
    plan: BatchPlan,
    owners: Integers,
    costs: Integers,
    *,
    quantum: int,
    service: Integers | None = None,
) -> FairPlan:
    """The same requests, so ordered that no owner is left far behind. Validated.

    Takes time in proportion to requests x owners for each quantum tried; at most log2(cost of all / quantum) + 2 are.

    Args:
        plan: In the order that serves reuse; returned itself where one owner has all, or nothing is to move.
        owners: Number of the owner of each row, from 0, int[num_requests].
        costs: Service that each row is, such as tokens computed and decoded, at least 1, int[num_requests].
        quantum: How far behind an owner may fall, at least 1.
        service: What each owner has had before, int[num_owners]. None: nothing. Owners that begin further apart
            than the quantum come nearer, and never further apart.

    Raises:
        WorkloadError: The arrays do not fit the plan, or a number is too small.
    """
    num_owners = _num_owners(plan, owners, costs, quantum, service)
    if num_owners < 2:
        return FairPlan(plan=plan, quantum=quantum)
    owner_at = owners[plan.order].astype(np.int64)
    cost_at = costs[plan.order].astype(np.int64)
    served = np.zeros(num_owners, np.int64) if service is None else service.astype(np.int64)
    may_lose = int(cost_at.sum() * MAX_LOST_SHARE)
    in_order = np.arange(plan.num_requests)
    while True:
        turn = _take_turns(owner_at, cost_at, quantum, served.copy())
        if np.array_equal(turn, in_order):
            return FairPlan(plan=plan, quantum=quantum)
        ordered = reordered(plan, turn)
        if ordered.num_lost_tokens <= may_lose:
            ordered.validate()
            return FairPlan(plan=ordered, quantum=quantum)
        quantum *= 2


def _num_owners(plan: BatchPlan, owners: Integers, costs: Integers, quantum: int, service: Integers | None) -> int:
    """Number of owners."""
    n = plan.num_requests
    check_integers("owners", owners, n)
    check_integers("costs", costs, n)
    for name, array, lowest in (("owner", owners, 0), ("cost", costs, 1)):
        if n and array.min() < lowest:
            row = int(array.argmin())
            raise WorkloadError(f"row {row} has the {name} {array[row]}; it must be at least {lowest}")
    if quantum < 1:
        raise WorkloadError(f"quantum must be at least 1, not {quantum}")
    num_owners = int(owners.max()) + 1 if n else 0
    if service is None or num_owners == 0:
        return num_owners
    if service.ndim != 1 or len(service) < num_owners or not np.issubdtype(service.dtype, np.integer):
        raise WorkloadError(
            f"service must be {num_owners} or more integers, not {service.dtype} of shape {service.shape}"
        )
    return len(service)


@njit(nogil=True)
def _take_turns(owner: Int64Array, cost: Int64Array, quantum: int, service: Int64Array) -> Int64Array:
    """Place in the fair order -> position. ``service`` is counted on."""
    n, num_owners = len(owner), len(service)
    # The positions of each owner, ascending, are places[start[o] : start[o + 1]].
    start = np.zeros(num_owners + 1, np.int64)
    for o in owner:
        start[o + 1] += 1
    num_left = start[1:].copy()
    start = start.cumsum()
    places, end = np.empty(n, np.int64), start[:-1].copy()
    for position in range(n):
        places[end[owner[position]]] = position
        end[owner[position]] += 1
    # left[k] leads to the first of places[k:] that is not taken.
    left = np.arange(n + 1)
    upcoming = start[:-1].copy()
    is_passed_over = np.zeros(num_owners, np.bool_)
    turn, cursor = np.empty(n, np.int64), np.int64(0)
    for i in range(n):
        least = np.int64(np.iinfo(np.int64).max)
        for o in range(num_owners):
            if num_left[o] > 0:
                least = min(least, service[o])
        best = _first_in_order(num_left, service, least, quantum, start, places, left, upcoming, is_passed_over, cursor)
        if best < 0:  # the end of the order: once more from its start
            for o in range(num_owners):
                upcoming[o] = _find(left, start[o])
            cursor = np.int64(0)
            best = _first_in_order(
                num_left, service, least, quantum, start, places, left, upcoming, is_passed_over, cursor
            )
        k = upcoming[best]
        turn[i] = places[k]
        cursor = places[k] + 1
        left[k] = k + 1
        upcoming[best] = _find(left, k + 1)
        num_left[best] -= 1
        service[best] += cost[places[k]]
    return turn


@njit(nogil=True)
def _first_in_order(
    num_left: Int64Array,
    service: Int64Array,
    least: int,
    quantum: int,
    start: Int64Array,
    places: Int64Array,
    left: Int64Array,
    upcoming: Int64Array,
    is_passed_over: npt.NDArray[np.bool_],
    cursor: int,
) -> int:
    """Owner of the first position from ``cursor`` on that may run, or -1. Says who is passed over from here on."""
    best = -1
    for o in range(len(num_left)):
        if num_left[o] == 0:
            continue
        if is_passed_over[o]:
            if service[o] > least:
                continue
            # Not sooner: it would take a request here and there, and cut every group on its way.
            is_passed_over[o] = False
            behind = start[o] + np.searchsorted(places[start[o] : start[o + 1]], cursor)
            upcoming[o] = _find(left, behind)
        elif service[o] >= least + quantum:
            is_passed_over[o] = True
            continue
        # Beyond its own slice: nothing of it is left up to the end of the order.
        if upcoming[o] < start[o + 1] and (best < 0 or places[upcoming[o]] < places[upcoming[best]]):
            best = o
    return best


@njit(nogil=True)
def _find(left: Int64Array, k: int) -> int:
    """First index from ``k`` on that is not taken; shortens the way there."""
    while left[k] != k:
        left[k] = left[left[k]]
        k = left[k]
    return k
