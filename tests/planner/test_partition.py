"""A plan in units: whole groups, the most work first, cut only where that is fair, and what a cut costs is counted."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.planner import (
    GROUP_ORDERS,
    BatchPlan,
    GroupOrder,
    Partition,
    cut_in_ranges,
    expected_work,
    partition,
    plan_batch,
)
from batchllm.tokens import TokenTable, lcp, page_floor
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(80, 300))

_RUNS = [[0], [1], [0, 1, 2], [4] * 4, [4] * 16, [5] * 40]


class _Row(NamedTuple):
    tokens: list[int]
    namespace: int
    decode_len: int


prompts = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=5).map(lambda runs: [t for run in runs for t in run])
workloads = st.lists(
    st.builds(_Row, prompts, st.integers(0, 1), st.sampled_from([1, 2, 30])), min_size=1, max_size=60
).flatmap(lambda rows: st.integers(1, 8).map(lambda times: rows * times))
page_sizes = st.sampled_from([1, 2, 16])
group_orders = st.sampled_from(GROUP_ORDERS)
engines = st.integers(1, 9)


def _table(workload: list[_Row]) -> TokenTable:
    return TokenTable.from_lists([row.tokens for row in workload])


def _namespaces(workload: list[_Row]) -> npt.NDArray[np.int64]:
    return np.array([row.namespace for row in workload])


def _planned(
    workload: list[_Row], num_engines: int, page_size: int = 1, group_order: GroupOrder = "lexicographic"
) -> tuple[BatchPlan, Partition]:
    best = plan_batch(_table(workload), page_size=page_size, namespaces=_namespaces(workload), group_order=group_order)
    decode_lens = np.array([row.decode_len for row in workload])
    return best, partition(best, expected_work(best, decode_lens), num_engines)


def _computed(workload: list[_Row], parts: Partition, page_size: int) -> int:
    """Tokens computed where a prompt reads what it has in common with the one before it in its unit."""
    num_computed, order = 0, parts.plan.order.tolist()
    for first, end in zip(parts.bounds[:-1].tolist(), parts.bounds[1:].tolist(), strict=True):
        for i in range(first, end):
            row, shared = workload[order[i]], 0
            before = workload[order[i - 1]]
            if i > first and before.namespace == row.namespace:
                shared = lcp(np.array(before.tokens, np.int32), np.array(row.tokens, np.int32))
            num_computed += len(row.tokens) - page_floor(min(shared, len(row.tokens) - 1), page_size)
    return num_computed


def _groups(plan: BatchPlan) -> list[set[int]]:
    """Rows of each planned prefix without a parent, and each row that has none by itself."""
    roots = np.flatnonzero(plan.parent == -1)
    ranges = [range(plan.first[r], plan.first[r] + plan.num_consumers[r]) for r in roots.tolist()]
    ranges += [range(i, i + 1) for i in np.flatnonzero(plan.request_prefix == -1).tolist()]
    return [{int(plan.order[i]) for i in positions} for positions in ranges]


def _units(parts: Partition) -> list[set[int]]:
    return [set(rows.tolist()) for rows in np.split(parts.plan.order, parts.bounds[1:-1])]


def _ends(work: list[float], num_engines: int) -> list[float]:
    """When each engine ends, if it takes the next unit whenever it has ended one."""
    free_at = [0.0] * num_engines
    for unit in work:
        heapq.heappush(free_at, heapq.heappop(free_at) + unit)
    return free_at


@untimed
@given(workloads, engines, page_sizes, group_orders)
def test_the_plan_is_sound_and_what_the_cuts_cost_is_counted(
    workload: list[_Row], num_engines: int, page_size: int, group_order: GroupOrder
) -> None:
    """The same requests once each; a unit reads nothing of another; the optimum stays what it was."""
    best, parts = _planned(workload, num_engines, page_size, group_order)
    parts.plan.validate(_table(workload), _namespaces(workload))
    assert parts.plan.optimal_prefill_tokens == best.optimal_prefill_tokens
    num_computed = _computed(workload, parts, page_size)
    assert parts.plan.optimal_prefill_tokens + parts.plan.num_lost_tokens == num_computed
    unit_of = np.repeat(np.arange(parts.num_units), np.diff(parts.bounds))
    last = parts.plan.first + parts.plan.num_consumers - 1
    assert (unit_of[parts.plan.first] == unit_of[last]).all()


@untimed
@given(workloads, engines, page_sizes)
def test_a_group_that_is_no_larger_than_is_fair_is_one_unit(
    workload: list[_Row], num_engines: int, page_size: int
) -> None:
    """Units are groups or pieces of one, and only groups with more than a 64th of an engine's share are in pieces."""
    best, parts = _planned(workload, num_engines, page_size)
    if num_engines == 1:
        assert parts.plan is best and parts.num_units == 1
        return
    units, num_cut = _units(parts), 0
    work = dict(zip(best.order.tolist(), expected_work(best, np.array([r.decode_len for r in workload])), strict=True))
    smallest = sum(work.values()) / num_engines / 64
    for group in _groups(best):
        pieces = [unit for unit in units if unit & group]
        assert set().union(*pieces) == group
        assert len(pieces) == 1 or sum(work[row] for row in group) > smallest
        num_cut += len(pieces) > 1
    assert parts.num_cut_groups == num_cut


@untimed
@given(workloads, engines)
def test_the_most_work_comes_first_and_none_is_forgotten(workload: list[_Row], num_engines: int) -> None:
    best, parts = _planned(workload, num_engines)
    assert (np.diff(parts.unit_work) <= 1e-9 * parts.work.sum()).all()
    total = expected_work(best, np.array([row.decode_len for row in workload])).sum()
    assert parts.work.sum() == pytest.approx(total + parts.plan.num_lost_tokens)


@untimed
@given(workloads, engines, page_sizes)
def test_an_order_that_is_a_promise_stays_and_units_are_as_sound(
    workload: list[_Row], num_engines: int, page_size: int
) -> None:
    best, by_work = _planned(workload, num_engines, page_size)
    work = expected_work(best, np.array([row.decode_len for row in workload]))
    parts = partition(best, work, num_engines, keeps_order=True)
    assert parts.plan.order.tolist() == best.order.tolist()
    parts.plan.validate(_table(workload), _namespaces(workload))
    assert parts.plan.optimal_prefill_tokens + parts.plan.num_lost_tokens == _computed(workload, parts, page_size)
    assert sorted(map(sorted, _units(parts))) == sorted(map(sorted, _units(by_work)))


@untimed
@given(workloads, engines, page_sizes)
@example([_Row([0], 0, 1), _Row([0, 0, 0, 1, 2, 0, 1, 2], 0, 30)] * 3, 2, 1)
def test_cuts_cost_a_sixteenth_of_the_work_at_most(workload: list[_Row], num_engines: int, page_size: int) -> None:
    _, parts = _planned(workload, num_engines, page_size)
    assert parts.plan.num_lost_tokens <= parts.work.sum() / 16


@untimed
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.integers(2, 8), st.integers(1, 64))
def test_engines_that_take_the_next_unit_end_together(sizes: list[int], num_engines: int, prefix_len: int) -> None:
    """Whatever the sizes of the groups: within a 20th of the work and two requests of each other."""
    prompts = [[g, *[7] * prefix_len, 8, g, r] for g, size in enumerate(sizes) for r in range(size)]
    plan = plan_batch(TokenTable.from_lists(prompts))
    decode_len = 64 * prefix_len
    work = expected_work(plan, np.full(len(prompts), decode_len))
    parts = partition(plan, work, num_engines)
    ends = _ends(parts.unit_work.tolist(), num_engines)
    assert max(ends) <= 1.05 * parts.work.sum() / num_engines + 2 * work.max()


def test_a_cut_is_made_at_the_level_that_costs_least() -> None:
    """A system prompt over documents, two questions each: pieces end between documents, not within one."""
    prompts = [[1] * 50 + [100 + d] * 40 + [10 + q] * 30 for d in range(100) for q in range(2)]
    plan = plan_batch(TokenTable.from_lists(prompts))
    parts = partition(plan, expected_work(plan, np.ones(200, np.int64)), 2)
    assert parts.num_units > 2 and parts.num_cut_groups == 1
    assert all(len(unit) % 2 == 0 for unit in _units(parts))
    assert parts.plan.num_lost_tokens == 50 * (parts.num_units - 1)


def test_a_group_whose_every_cut_would_cost_too_much_stays_whole() -> None:
    """A prefix of ten thousand tokens over twenty short rows: two engines that compute it both win nothing."""
    plan = plan_batch(TokenTable.from_lists([[1] * 10_000 + [q] for q in range(20)]))
    parts = partition(plan, expected_work(plan, np.ones(20, np.int64)), 2)
    assert parts.num_units == 1 and parts.plan.num_lost_tokens == 0


def test_the_same_plan_gives_the_same_units() -> None:
    prompts = [[g, 1, 2, r % 7, r] for g in range(5) for r in range(40)]
    plan = plan_batch(TokenTable.from_lists(prompts))
    work = expected_work(plan, np.full(200, 9))
    one, other = partition(plan, work, 3), partition(plan, work, 3)
    assert one.plan.fingerprint() == other.plan.fingerprint() and one.bounds.tolist() == other.bounds.tolist()


def test_nothing_to_run_is_no_unit() -> None:
    plan = plan_batch(TokenTable.from_lists([]))
    assert partition(plan, np.zeros(0), 4).num_units == 0


@pytest.mark.parametrize(
    ("work", "num_engines", "words"),
    [
        ([1.0, 1.0], 0, "num_engines must be at least 1, not 0"),
        ([1.0], 2, r"work must be 2 numbers"),
        ([1.0, 0.0], 2, "position 1 has the work 0.0; it must be above 0"),
        ([float("nan"), 1.0], 2, "position 0 has the work nan"),
    ],
)
def test_what_is_wrong_is_named(work: list[float], num_engines: int, words: str) -> None:
    plan = plan_batch(TokenTable.from_lists([[1], [2]]))
    with pytest.raises(WorkloadError, match=words):
        partition(plan, np.array(work), num_engines)


def _ranges(loss: list[float], num_engines: int, max_size: float = 1e9) -> list[int]:
    """First request of each range of requests that are a unit of work each."""
    ones = np.ones(len(loss))
    return cut_in_ranges(ones, np.array(loss), num_engines, min_work=0.0, sizes=ones, max_size=max_size).tolist()


def test_ranges_shrink_as_the_work_runs_out() -> None:
    sizes = np.diff(_ranges([0.0] * 1000, 4))
    assert sizes[0] == 125 and (np.diff(sizes) <= 0).all() and sizes[-1] <= 4


def test_ranges_are_no_smaller_than_is_worth_while_but_for_the_last() -> None:
    """A job that is small in all is cut in some ranges for each engine."""
    ones = np.ones(1600)
    sizes = np.diff(cut_in_ranges(ones, 0 * ones, 4, min_work=30.0, sizes=ones, max_size=1e9))
    assert sizes[0] == 200 and min(sizes[:-1]) == 30
    assert np.array_equal(
        cut_in_ranges(ones, 0 * ones, 4, min_work=1e6, sizes=ones, max_size=1e9),
        cut_in_ranges(ones, 0 * ones, 4, min_work=50.0, sizes=ones, max_size=1e9),
    )


def test_ranges_end_where_a_cut_costs_least() -> None:
    """Groups of forty, between which nothing is lost: none is parted as long as ranges are longer."""
    loss = [0.0 if i % 40 == 0 else 30.0 for i in range(4000)]
    assert all(first % 40 == 0 for first in _ranges(loss, 2))


def test_a_group_that_is_too_much_for_an_engine_is_cut_in_pieces_worth_their_cost() -> None:
    firsts = _ranges([0.0] + [3.0] * 999, 2)
    assert len(firsts) > 4 and min(np.diff(firsts)) >= 48


def test_no_range_is_larger_than_it_may_be_unless_it_is_one_request() -> None:
    sizes = np.array([5.0, 5.0, 50.0, 5.0, 5.0, 5.0])
    firsts = cut_in_ranges(np.ones(6), np.zeros(6), 1, min_work=0.0, sizes=sizes, max_size=10.0)
    assert firsts.tolist() == [0, 2, 3, 4, 5]


def test_there_are_no_ranges_of_nothing() -> None:
    assert _ranges([], 3) == []
