"""One workload, one scheduler, one device: how long does it take, and what is computed?

Knows: which scheduler is made how. Must not know: how any of them works.
Invariant: the same arguments give the same result.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from batchllm.errors import ConfigError
from batchllm.perf_model import CostModel, StepWork
from batchllm.planner import DEFAULT_GROUP_ORDER, BatchPlan, GroupOrder, plan_batch
from batchllm.planner.planner import RunCutter, max_over_ranges
from batchllm.scheduler.feed_window import FeedWindow
from batchllm.sim.kv_pool import Columns, Outcome, StepRecorder
from batchllm.sim.lru_tree import LruTree
from batchllm.sim.one_level import OneLevelScheduler
from batchllm.sim.planned import PlannedScheduler
from batchllm.sim.result import SimResult
from batchllm.sim.sglang_fcfs import SglangScheduler
from batchllm.sim.vllm_fcfs import VllmScheduler
from batchllm.sim.window import PlanWindow
from batchllm.sim.workload import SimWorkload

SchedulerName = Literal["batchllm", "one-level", "sglang-fcfs", "sglang-sorted", "vllm-fcfs", "vllm-sorted"]
SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)
"""Schedulers that can be simulated.

* ``batchllm``: ours, the real policy.
* ``one-level``: the paper's method: one-level groups, a prefix pinned while its group lives.
* ``sglang-fcfs``, ``vllm-fcfs``: LRU prefix caches, first come first served.
* ``sglang-sorted``, ``vllm-sorted``: the same on prompts in lexicographic order.
"""

_VLLM_PAGE_SIZE = 16
_MOST_TOKENS = 10**15
"""More than any pool has; counts of tokens are held in 64 bits."""


def simulate(
    workload: SimWorkload,
    *,
    scheduler: SchedulerName = "batchllm",
    cost_model: CostModel,
    kv_limit_tokens: int | None = None,
    kv_capacity_tokens: int | None = None,
    chunk_tokens: int = 2048,
    group_order: GroupOrder = DEFAULT_GROUP_ORDER,
    is_mixed: bool = True,
    page_size: int = 1,
    max_running: int | None = None,
    is_exact_cut: bool = True,
    shares_reads: bool = False,
    has_overlap: bool = False,
) -> SimResult:
    """Run a workload to its end.

    Args:
        workload: Prompts and output lengths.
        scheduler: One of `SCHEDULERS`.
        cost_model: The clock, and the size of the KV pool.
        kv_limit_tokens: Slots that ours may use. None: the whole pool. Other schedulers have no such limit.
        kv_capacity_tokens: Slots of the KV pool. None: what fits the cost model's device.
        chunk_tokens: Tokens of a full step. For SGLang prompt tokens of a step, since it does not mix.
        group_order: Order of sibling groups, of ours.
        is_mixed: Whether decoding rows are part of our steps that prefill.
        page_size: Tokens of a page. vLLM's have 16 whatever is said here.
        max_running: Requests that run at once. None: the scheduler's own limit; 256 for vLLM, 256 + 100 for the
            paper's method, what SGLang takes for long contexts (4096), none for ours.
        is_exact_cut: For ``one-level``: the best one-level groups, or the paper's greedy ones.
        shares_reads: Whether attention reads KV that rows share once a step; for ``batchllm`` and ``one-level``.
        has_overlap: Whether our steps start before the results of the one before are known, as on a GPU.

    Raises:
        ConfigError: No such scheduler, a number below 1, or a request that cannot fit the KV pool.
        WorkloadError: The workload cannot be planned.
    """
    if scheduler not in SCHEDULERS:
        raise ConfigError(f"scheduler {scheduler!r} is not known. Known: {', '.join(SCHEDULERS)}")
    capacity = cost_model.kv_capacity_tokens() if kv_capacity_tokens is None else kv_capacity_tokens
    limit = capacity if kv_limit_tokens is None else kv_limit_tokens
    _check_numbers(capacity, limit, chunk_tokens, max_running)
    recorder = StepRecorder(cost_model, capacity, limit)
    if scheduler == "batchllm":
        plan = plan_batch(
            workload.table,
            page_size=page_size,
            decode_lens=workload.expected_len,
            group_order=group_order,
            share_lens=workload.share_lens,
        )
        cutter = RunCutter(plan, workload.table, workload.max_new_len, workload.known_len, workload.task)
        planned = PlannedScheduler(
            PlanWindow(plan, cutter, FeedWindow(cutter.kv_cost, capacity)),
            Columns.of(workload, plan.order),
            recorder,
            page_size=page_size,
            chunk_tokens=chunk_tokens,
            is_mixed=is_mixed,
            max_running=max_running,
            shares_reads=shares_reads,
            has_overlap=has_overlap,
        )
        return _result(scheduler, workload, plan, cost_model, planned.run())
    plan = plan_batch(
        workload.table,
        page_size=_VLLM_PAGE_SIZE if scheduler.startswith("vllm") else page_size,
        share_lens=workload.share_lens,
    )
    if scheduler == "one-level":
        one_level = OneLevelScheduler(
            workload,
            plan,
            recorder,
            chunk_tokens=chunk_tokens,
            max_running=max_running,
            is_exact_cut=is_exact_cut,
            shares_reads=shares_reads,
        )
        return _result(scheduler, workload, plan, cost_model, one_level.run())
    arrival = plan.order if scheduler.endswith("sorted") else np.arange(workload.num_requests)
    is_sglang = scheduler.startswith("sglang")
    tree = LruTree(plan, capacity, evicts_whole_nodes=is_sglang)
    kind = SglangScheduler if is_sglang else VllmScheduler
    lru = kind(workload, tree, recorder, arrival, chunk_tokens=chunk_tokens, max_running=max_running)
    return _result(scheduler, workload, plan, cost_model, lru.run())


def _check_numbers(capacity: int, limit: int, chunk_tokens: int, max_running: int | None) -> None:
    numbers = {"kv_capacity_tokens": capacity, "kv_limit_tokens": limit, "chunk_tokens": chunk_tokens}
    if max_running is not None:
        numbers["max_running"] = max_running
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")
        if number > _MOST_TOKENS:
            raise ConfigError(f"{name} must be at most {_MOST_TOKENS}, not {number}")
    if limit > capacity:
        raise ConfigError(f"kv_limit_tokens {limit} is more than the {capacity} there are")


def _result(
    scheduler: str, workload: SimWorkload, plan: BatchPlan, cost_model: CostModel, outcome: Outcome
) -> SimResult:
    if sorted(outcome.columns.finished) != list(range(workload.num_requests)):
        raise RuntimeError(f"{scheduler} did not end every request once")
    trace = outcome.recorder.trace(f"{scheduler}: {workload.name}")
    totals = least_work(workload, plan)
    return SimResult(
        scheduler=scheduler,
        num_requests=workload.num_requests,
        num_prompt_tokens=plan.num_prompt_tokens,
        num_computed_prompt_tokens=outcome.columns.num_computed,
        num_optimal_prompt_tokens=plan.optimal_prefill_tokens,
        num_output_tokens=int(workload.output_len.sum()),
        num_retractions=int(trace.steps["num_retracted"].sum(dtype=np.int64)),
        lower_bound_s=cost_model.lower_bound_s(totals, num_steps=int(workload.output_len.max(initial=1))),
        predictions=outcome.predictions,
        trace=trace,
    )


def least_work(workload: SimWorkload, plan: BatchPlan) -> StepWork:
    """The least that any schedule of the workload has to do.

    The optimum is computed; private KV is read once for each token that its request decodes, and shared KV no more
    often than the longest output under it makes necessary, as if all its consumers always decoded together.
    """
    if not plan.num_requests:
        return StepWork()
    prompt_len, computed = plan.prompt_lens.astype(np.int64), plan.computed_lens().astype(np.int64)
    num_decoded = workload.output_len[plan.order] - 1
    # The i-th decode step attends to the prompt and the i tokens generated before it.
    growth = num_decoded * (num_decoded + 1) // 2
    private_len = prompt_len - plan.end_len_of(plan.request_prefix)
    shared_reads = (plan.end_len - plan.start_len) * max_over_ranges(num_decoded, plan.first, plan.num_consumers)
    return StepWork(
        num_prefill_tokens=plan.optimal_prefill_tokens,
        num_decode_tokens=int(num_decoded.sum()),
        num_sampled=int(workload.output_len.sum()),
        prefill_pairs=int(((prompt_len - computed) * computed + computed * (computed + 1) // 2).sum()),
        decode_kv_tokens=int((prompt_len * num_decoded + growth).sum()),
        kv_read_tokens=int((private_len * num_decoded + growth).sum() + shared_reads.sum()),
    )
