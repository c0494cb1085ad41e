"""Runs, however a plan is cut, carry every prompt: shared prefixes once, the rest with its request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner import BatchPlan, plan_batch
from batchllm.planner.planner import PlannedRun, RunCutter
from batchllm.tokens import TokenTable
from tests.sizes import sized


@dataclass(frozen=True)
class _Workload:
    prompts: list[list[int]]
    max_new_lens: list[int]
    page_size: int

    def plan(self) -> tuple[BatchPlan, RunCutter]:
        table = TokenTable.from_lists(self.prompts)
        plan = plan_batch(table, page_size=self.page_size)
        return plan, RunCutter(plan, table, np.array(self.max_new_lens, np.int64))


@st.composite
def _workloads(draw: st.DrawFn, min_size: int = 1) -> _Workload:
    page_size = draw(st.sampled_from([1, 2, 4]))
    stems = draw(st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=4))
    prompt = st.tuples(st.sampled_from(stems), st.lists(st.integers(0, 2), min_size=1, max_size=5))
    pairs = draw(st.lists(prompt, min_size=min_size, max_size=20))
    num = len(pairs)
    max_new_lens = draw(st.lists(st.integers(1, 30), min_size=num, max_size=num))
    return _Workload([stem + tail for stem, tail in pairs], max_new_lens, page_size)


def _cut_all(cutter: RunCutter, num_requests: int, cuts: list[int]) -> list[PlannedRun]:
    bounds = [0, *sorted(c for c in cuts if c <= num_requests), num_requests]
    return [cutter.cut(first, last) for first, last in pairwise(bounds)]


_CUTS = st.lists(st.integers(0, 20), max_size=6)
_SETTINGS = settings(deadline=None, max_examples=sized(50, 100), database=None)


def _example() -> tuple[BatchPlan, RunCutter]:
    """In plan order: [1 1], [1 1 2], [1 1 2 3], [4]; prefixes [1 1] of three and [2] of two."""
    prompts = [[4], [1, 1, 2], [1, 1], [1, 1, 2, 3]]
    return _Workload(prompts, max_new_lens=[9, 5, 1, 2], page_size=1).plan()


def test_a_run_names_its_requests_in_plan_order() -> None:
    _, cutter = _example()
    run = cutter.cut(1, 4)
    assert len(run) == 3
    assert run.first_position == 1
    assert run.request_row.tolist() == [1, 3, 0]
    assert run.request_max_new_len.tolist() == [5, 2, 9]
    assert run.request_prefix.tolist() == [1, 1, -1]


def test_a_run_has_the_prefixes_first_consumed_in_it() -> None:
    _, cutter = _example()
    first, second = cutter.cut(0, 1), cutter.cut(1, 4)
    assert (first.first_prefix, second.first_prefix) == (0, 1)
    assert (first.prefix_end_len.tolist(), first.prefix_tokens.tolist()) == ([2], [1, 1])
    assert (second.prefix_end_len.tolist(), second.prefix_tokens.tolist()) == ([3], [2])
    assert second.prefix_parent.tolist() == [0]
    assert second.prefix_start_len.tolist() == [2]
    assert first.prefix_num_consumers.tolist() == [3]


def test_private_tokens_follow_the_deepest_prefix() -> None:
    _, cutter = _example()
    run = cutter.cut(0, 4)
    assert run.private_len.tolist() == [0, 0, 1, 1]
    assert run.private_tokens.tolist() == [3, 4]


def test_the_longest_consumer_counts_its_output() -> None:
    _, cutter = _example()
    assert cutter.cut(0, 4).prefix_longest_consumer_len.tolist() == [8, 8]  # [1 1 2] and 5 new


def test_a_run_of_nothing_is_empty() -> None:
    _, cutter = _example()
    run = cutter.cut(2, 2)
    assert len(run) == 0
    assert len(run.prefix_parent) == len(run.prefix_tokens) == len(run.private_tokens) == 0


def test_a_plan_without_prefixes_can_be_cut() -> None:
    _, cutter = _Workload([[1], [2], [3]], [1, 1, 1], page_size=1).plan()
    run = cutter.cut(0, 3)
    assert run.request_prefix.tolist() == [-1, -1, -1]
    assert run.private_tokens.tolist() == [1, 2, 3]


def test_an_empty_plan_makes_a_cutter_with_nothing_to_cut() -> None:
    _, cutter = _Workload([], [], page_size=1).plan()
    assert len(cutter.kv_cost) == 0


def test_a_run_is_made_of_arrays_and_numbers_only() -> None:
    run = _example()[1].cut(0, 4)
    values = [getattr(run, field.name) for field in fields(run)]
    assert all(isinstance(value, int | np.ndarray) for value in values)


@given(_workloads(), _CUTS)
@_SETTINGS
def test_prefixes_and_private_tokens_give_every_prompt_back(workload: _Workload, cuts: list[int]) -> None:
    plan, cutter = workload.plan()
    paths: dict[int, list[int]] = {-1: []}
    prompts: dict[int, list[int]] = {}
    for run in _cut_all(cutter, plan.num_requests, cuts):
        lens = run.prefix_end_len - run.prefix_start_len
        pieces = np.split(run.prefix_tokens, np.cumsum(lens)[:-1]) if len(lens) else []
        for i, piece in enumerate(pieces):
            parent = paths[int(run.prefix_parent[i])]  # it came before, or in this very run
            assert len(parent) == run.prefix_start_len[i]
            paths[run.first_prefix + i] = parent + piece.tolist()
        private = np.split(run.private_tokens, np.cumsum(run.private_len)[:-1]) if len(run) else []
        for i, piece in enumerate(private):
            prompts[int(run.request_row[i])] = paths[int(run.request_prefix[i])] + piece.tolist()
    assert [prompts[row] for row in range(len(workload.prompts))] == workload.prompts


@given(_workloads(), _CUTS)
@_SETTINGS
def test_each_prefix_and_each_request_travels_once(workload: _Workload, cuts: list[int]) -> None:
    plan, cutter = workload.plan()
    runs = _cut_all(cutter, plan.num_requests, cuts)
    prefixes = [run.first_prefix + i for run in runs for i in range(len(run.prefix_parent))]
    assert prefixes == list(range(plan.num_prefixes))
    positions = [run.first_position + i for run in runs for i in range(len(run))]
    assert positions == list(range(plan.num_requests))
    num_sent = sum(len(run.prefix_tokens) + len(run.private_tokens) for run in runs)
    num_prefix_tokens = int((plan.end_len - plan.start_len).sum())
    num_read = int(plan.end_len_of(plan.request_prefix).sum())
    assert num_sent == num_prefix_tokens + plan.num_prompt_tokens - num_read


@given(_workloads())
@_SETTINGS
def test_longest_consumer_is_the_longest_of_all_that_start_with_the_prefix(workload: _Workload) -> None:
    plan, cutter = workload.plan()
    run = cutter.cut(0, plan.num_requests)
    for prefix in range(plan.num_prefixes):
        consumers = []
        for position, row in enumerate(plan.order.tolist()):
            above = int(plan.request_prefix[position])
            while above not in (prefix, -1):
                above = int(plan.parent[above])
            if above == prefix:
                consumers.append(len(workload.prompts[row]) + workload.max_new_lens[row])
        assert run.prefix_longest_consumer_len[prefix] == max(consumers)
        assert run.prefix_num_consumers[prefix] == len(consumers)


@given(_workloads())
@_SETTINGS
def test_kv_cost_is_the_optimum_plus_every_output_that_is_known(workload: _Workload) -> None:
    plan, _ = workload.plan()
    table = TokenTable.from_lists(workload.prompts)
    max_new_len = np.array(workload.max_new_lens, np.int64)
    num_rows = len(workload.prompts)
    known = RunCutter(plan, table, max_new_len, max_new_len)
    assert known.kv_cost.sum() == plan.optimal_prefill_tokens + sum(workload.max_new_lens)
    assert RunCutter(plan, table, max_new_len).kv_cost.sum() == plan.optimal_prefill_tokens + num_rows


def test_known_lengths_and_tasks_travel_in_plan_order_and_default_to_unknown() -> None:
    table = TokenTable.from_lists([[2], [1], [3]])
    plan = plan_batch(table)
    limits = np.array([9, 9, 9], np.int64)
    run = RunCutter(plan, table, limits, np.array([5, 0, 7]), np.array([-1, 4, 2], np.int32)).cut(0, 3)
    assert (run.request_known_len.tolist(), run.request_task.tolist()) == ([0, 5, 7], [4, -1, 2])
    run = RunCutter(plan, table, limits).cut(0, 3)
    assert (run.request_known_len.tolist(), run.request_task.tolist()) == ([0, 0, 0], [-1, -1, -1])


def test_a_prefix_ends_behind_its_last_consumer() -> None:
    plan, cutter = _example()
    ends = cutter.cut(0, plan.num_requests).prefix_end_position
    for prefix, end in enumerate(ends.tolist()):
        assert end == plan.first[prefix] + plan.num_consumers[prefix]
