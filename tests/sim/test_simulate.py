"""What each scheduler is held to on any workload, and what ours and the baselines are known for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import ConfigError
from batchllm.perf_model import CostModel, get_device, get_model
from batchllm.planner import GROUP_ORDERS, exact_cut, greedy_cut, plan_batch
from batchllm.sim import SCHEDULERS, OutputDraw, SimResult, SimWorkload, parse_workload, shared, simulate
from batchllm.sim.kv_pool import Columns
from batchllm.tokens import TokenTable
from tests.sizes import sized

_COST_MODEL = CostModel.with_defaults(get_device("A100-80GB"), get_model("Llama-3.1-8B"))

_quick = settings(deadline=None, max_examples=sized(40, 120), database=None)


@st.composite
def _prompts(draw: st.DrawFn) -> list[list[int]]:
    """Prompts that begin as others do: grown from earlier ones, repeated, cut, or new."""
    found: list[list[int]] = []
    for _ in range(draw(st.integers(1, 24))):
        kind = draw(st.sampled_from(["grow", "grow", "repeat", "cut", "new"])) if found else "new"
        base = list(draw(st.sampled_from(found))) if kind != "new" else []
        if kind == "cut":
            base = base[: draw(st.integers(1, len(base)))]
        if kind in ("grow", "new"):
            base += [draw(st.integers(0, 2))] * draw(st.integers(1, 20))
            base += draw(st.lists(st.integers(0, 2), max_size=5))
        found.append(base)
    return found


@st.composite
def _workloads(draw: st.DrawFn, *, is_known: bool | None = None) -> SimWorkload:
    """Any small workload; ``is_known`` None leaves some lengths to be learned."""
    rows = draw(_prompts())
    n = len(rows)
    max_new = draw(st.lists(st.integers(1, 14), min_size=n, max_size=n))
    output = [draw(st.integers(1, limit)) for limit in max_new]
    tells = [draw(st.booleans()) if is_known is None else is_known for _ in rows]
    return SimWorkload.from_lengths(
        "drawn",
        TokenTable.from_lists(rows),
        np.array(output, np.int64),
        max_new_len=np.array(max_new, np.int64),
        known_len=np.array([length if told else 0 for length, told in zip(output, tells, strict=True)], np.int64),
        task=np.array([draw(st.integers(-1, 1)) for _ in rows], np.int32),
    )


def _longest(workload: SimWorkload) -> int:
    return int((workload.table.lengths + workload.max_new_len).max())


def _capacity(workload: SimWorkload, page_size: int, spare: int) -> int:
    """A pool in which the longest request just runs under every scheduler, and ``spare`` more."""
    return -(-_longest(workload) // page_size) * page_size + 3 * page_size + spare


def _run(workload: SimWorkload, scheduler: Any, **arguments: Any) -> SimResult:
    return simulate(workload, scheduler=scheduler, cost_model=_COST_MODEL, **arguments)


def _check_accounts(result: SimResult, *, has_overlap: bool = False) -> None:
    """What holds of every run."""
    steps = result.trace.steps
    used = steps["kv_pinned_tokens"] + steps["kv_private_tokens"]
    assert (used + steps["kv_free_tokens"] == result.trace.kv_capacity_tokens).all()
    assert (steps["num_prefill_tokens"] + steps["num_decode_tokens"] > 0).all()
    np.testing.assert_allclose(steps["start_s"][1:], np.cumsum(steps["duration_s"])[:-1])
    # Each request samples its first token at the end of a prefill: once, and once more for each time it lost its KV.
    # With overlap a row that ends by itself decodes once too often, and one that is retracted loses a token in flight.
    num_late = result.num_requests + result.num_retractions if has_overlap else 0
    num_decoded = result.num_output_tokens - result.num_requests
    assert num_decoded - result.num_retractions <= steps["num_decode_tokens"].sum() <= num_decoded + num_late
    assert steps["num_prefill_tokens"].sum() >= result.num_computed_prompt_tokens
    assert result.elapsed_s >= result.lower_bound_s > 0
    assert 0 < result.bound_ratio <= 1


@given(_workloads(is_known=True), st.sampled_from([1, 4, 16]), st.integers(0, 300), st.booleans(), st.data())
@_quick
def test_ours_computes_the_optimum_within_the_limit_and_retracts_nothing_where_lengths_are_known(
    workload: SimWorkload, page_size: int, spare: int, is_mixed: bool, data: st.DataObject
) -> None:
    limit = _capacity(workload, page_size, spare)
    result = _run(
        workload,
        "batchllm",
        kv_limit_tokens=limit,
        kv_capacity_tokens=limit + data.draw(st.integers(0, 50)),
        chunk_tokens=page_size * data.draw(st.integers(1, 40)),
        page_size=page_size,
        is_mixed=is_mixed,
        group_order=data.draw(st.sampled_from(GROUP_ORDERS)),
        shares_reads=data.draw(st.booleans()),
        has_overlap=(has_overlap := data.draw(st.booleans())),
    )
    assert result.num_computed_prompt_tokens == result.num_optimal_prompt_tokens
    assert result.num_retractions == 0
    assert result.trace.occupancy.max() <= 1
    _check_accounts(result, has_overlap=has_overlap)


@given(_workloads(), st.sampled_from([1, 16]), st.integers(0, 300), st.booleans(), st.booleans())
@_quick
def test_ours_ends_where_lengths_are_learned_and_never_holds_more_than_there_is(
    workload: SimWorkload, page_size: int, spare: int, is_mixed: bool, has_overlap: bool
) -> None:
    result = _run(
        workload,
        "batchllm",
        kv_capacity_tokens=_capacity(workload, page_size, spare),
        chunk_tokens=64,
        page_size=page_size,
        is_mixed=is_mixed,
        has_overlap=has_overlap,
    )
    assert result.num_computed_prompt_tokens >= result.num_optimal_prompt_tokens
    _check_accounts(result, has_overlap=has_overlap)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@given(workload=_workloads(), spare=st.integers(0, 400), chunk_pages=st.integers(1, 8), max_running=st.integers(1, 30))
@settings(deadline=None, max_examples=sized(25, 60), database=None)
def test_every_request_ends_once_under_every_scheduler(
    scheduler: str, workload: SimWorkload, spare: int, chunk_pages: int, max_running: int
) -> None:
    """`simulate` raises where one did not; and none runs beside more than may."""
    result = _run(
        workload,
        scheduler,
        kv_capacity_tokens=_capacity(workload, 16, spare),
        chunk_tokens=16 * chunk_pages,
        max_running=max_running,
    )
    assert result.num_requests == workload.num_requests
    assert (result.trace.steps["num_running"] <= max_running).all()
    assert result.trace.steps["num_waiting"][-1] == 0
    _check_accounts(result)


@pytest.mark.parametrize("scheduler", ["sglang-fcfs", "sglang-sorted", "vllm-fcfs", "vllm-sorted"])
@given(workload=_workloads(), spare=st.integers(0, 400))
@settings(deadline=None, max_examples=sized(25, 60), database=None)
def test_lru_never_computes_less_than_the_optimum(scheduler: str, workload: SimWorkload, spare: int) -> None:
    result = _run(workload, scheduler, kv_capacity_tokens=_capacity(workload, 16, spare), chunk_tokens=64)
    assert result.num_computed_prompt_tokens >= result.num_optimal_prompt_tokens


@pytest.mark.parametrize("scheduler", ["sglang-fcfs", "sglang-sorted", "vllm-fcfs", "vllm-sorted"])
@given(workload=_workloads())
@settings(deadline=None, max_examples=sized(25, 60), database=None)
def test_lru_computes_the_optimum_with_one_request_at_a_time_in_a_pool_without_end(
    scheduler: str, workload: SimWorkload
) -> None:
    """But for prompts that are nothing but a prefix of another: behind it, each computes its last page again."""
    result = _run(workload, scheduler, kv_capacity_tokens=10**6, chunk_tokens=4096, max_running=1)
    page_size = 16 if scheduler.startswith("vllm") else 1
    plan = plan_batch(workload.table, page_size=page_size)
    num_whole = int((plan.prompt_lens == plan.end_len_of(plan.request_prefix)).sum())
    excess = result.num_computed_prompt_tokens - result.num_optimal_prompt_tokens
    assert 0 <= excess <= (0 if scheduler.endswith("sorted") else num_whole * page_size)
    assert result.num_retractions == 0


@pytest.mark.parametrize("is_exact_cut", [True, False])
@given(workload=_workloads())
@settings(deadline=None, max_examples=sized(25, 60), database=None)
def test_the_papers_method_saves_what_its_groups_save_in_a_pool_without_end(
    is_exact_cut: bool, workload: SimWorkload
) -> None:
    plan = plan_batch(workload.table)
    cut = exact_cut(plan) if is_exact_cut else greedy_cut(plan)
    result = _run(workload, "one-level", kv_capacity_tokens=10**6, is_exact_cut=is_exact_cut)
    saved = result.num_prompt_tokens - result.num_computed_prompt_tokens
    # A member that is its prefix and nothing more computes a token again, which the leader of a plan need not.
    num_whole = len(plan.order)
    assert cut.saved_tokens - num_whole <= saved <= cut.saved_tokens
    assert result.num_retractions == 0


@given(_workloads(), st.sampled_from(SCHEDULERS))
@_quick
def test_the_same_arguments_give_the_same_result(workload: SimWorkload, scheduler: str) -> None:
    capacity = _capacity(workload, 16, 40)
    one, two = (_run(workload, scheduler, kv_capacity_tokens=capacity, chunk_tokens=32) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    assert (one.trace.steps == two.trace.steps).all()


@given(_workloads(is_known=True))
@_quick
def test_reading_shared_kv_once_never_takes_longer(workload: SimWorkload) -> None:
    for scheduler in ("batchllm", "one-level"):
        once = _run(workload, scheduler, kv_capacity_tokens=10**6, shares_reads=True)
        each = _run(workload, scheduler, kv_capacity_tokens=10**6)
        assert once.elapsed_s <= each.elapsed_s
        assert once.trace.num_steps == each.trace.num_steps


# What they are known for

_GROUPS = shared(prefix_len=400, private_len=40, sharing=8, num_requests=400, output=OutputDraw(median_len=20), seed=3)


def test_order_decides_where_prefixes_are_evicted_before_they_are_read_again() -> None:
    results = {name: _run(_GROUPS, name, kv_capacity_tokens=6000, chunk_tokens=512) for name in SCHEDULERS}
    ours = results["batchllm"]
    assert ours.saving == ours.optimal_saving
    for engine in ("vllm", "sglang"):
        assert results[f"{engine}-fcfs"].saving < results[f"{engine}-sorted"].saving <= ours.saving
        assert results[f"{engine}-fcfs"].requests_per_s < ours.requests_per_s
    assert results["vllm-sorted"].saving > ours.optimal_saving - 0.02  # of neighbours in one step both compute
    assert results["one-level"].saving == pytest.approx(ours.saving, abs=0.01)


def test_siblings_admitted_in_one_pass_all_compute_their_prefix_under_sglang() -> None:
    siblings = shared(prefix_len=100, private_len=1, sharing=8, num_requests=8, output=OutputDraw(median_len=2))
    assert _run(siblings, "sglang-sorted", kv_capacity_tokens=10_000).saving == 0
    assert _run(siblings, "batchllm", kv_capacity_tokens=10_000).saving == pytest.approx(700 / 808)


def test_a_pool_that_fills_up_retracts_and_still_ends() -> None:
    """All are told to end early and go on: more KV than was expected."""
    workload = parse_workload("unshared:prompt=20,requests=40,output=200")
    lying = replace(workload, known_len=np.full(40, 10, np.int64))
    result = _run(lying, "batchllm", kv_capacity_tokens=1000)
    assert result.num_retractions > 0
    _check_accounts(result)


def test_learned_lengths_fill_the_pool_without_retractions() -> None:
    workload = parse_workload("lognormal:prefix=300,private=40,requests=2500,output=30,max_new=500")
    result = _run(workload, "batchllm", kv_capacity_tokens=30_000)
    assert result.retraction_share <= 0.005
    assert result.trace.saturated_occupancy >= 0.9
    assert result.predictions.num_requests == 2500
    assert result.prediction_error > 0


def test_the_result_is_told_in_numbers_and_as_a_table() -> None:
    result = _run(_GROUPS, "batchllm", kv_capacity_tokens=6000)
    told = result.to_dict()
    assert told["saving"] == result.saving
    assert told["trace_num_steps"] == result.trace.num_steps
    assert "saving 79.5%" in result.render()
    assert "batchllm: shared: 400 + 40 tokens, sharing 8" in result.render()
    assert "output lengths" not in result.render()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scheduler": "tgi"}, "scheduler 'tgi' is not known. Known: batchllm, one-level"),
        ({"kv_capacity_tokens": 400}, "a request needs up to 460 KV tokens"),
        ({"kv_capacity_tokens": 500, "scheduler": "sglang-fcfs", "chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"kv_capacity_tokens": 500, "kv_limit_tokens": 501}, "kv_limit_tokens 501 is more than the 500"),
        ({"kv_capacity_tokens": 400, "scheduler": "vllm-fcfs"}, "a request needs up to"),
        ({"kv_capacity_tokens": 400, "scheduler": "sglang-fcfs"}, "a request needs up to"),
        ({"kv_capacity_tokens": 400, "scheduler": "one-level"}, "a request needs up to"),
        ({"scheduler": "vllm-fcfs", "chunk_tokens": 15}, "smaller than a block of 16"),
        ({"page_size": 16, "chunk_tokens": 15}, "smaller than a page of 16"),
        ({"max_running": 0}, "max_running must be at least 1"),
    ],
)
def test_what_cannot_run_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(_GROUPS, cost_model=_COST_MODEL, **arguments)


class _Counted(np.ndarray):
    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += np.size(found)
        return found


def test_the_end_of_a_step_looks_at_what_runs_only() -> None:
    """A baseline's step costs what runs in it, not what there is: of 100,000 requests, the three that run are read."""
    lens = np.full(100_000, 2)
    columns = Columns(lens, lens.view(_Counted), lens, np.zeros_like(lens), lens.copy().view(_Counted))
    columns.num_generated[500] = 1
    assert columns.finish_ended([99_999, 500, 7]) == ([99_999, 7], [500])
    assert columns.finished == [99_999, 7]
    assert (columns.num_generated.num_read, columns.output_len.num_read) == (3, 3)
