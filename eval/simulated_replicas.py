"""Several engines that share one workload: by our partition of the plan, or by what routers do as rows arrive.

Knows: which engine runs which rows, and each one's clock. Must not know: how an engine schedules what it has; it is
ours in every case, so that what differs is the distribution alone.
Invariant: each row runs once, and an engine's clock is never behind another's when it takes something.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from batchllm.errors import ConfigError
from batchllm.perf_model import CostModel
from batchllm.planner import BatchPlan, expected_work, partition, plan_batch
from batchllm.planner.planner import RunCutter
from batchllm.scheduler.replica_feed import ReplicaFeed
from batchllm.sim.kv_pool import Columns, StepRecorder
from batchllm.sim.planned import PlannedScheduler
from batchllm.sim.simulate import simulate
from batchllm.sim.window import PlanWindow
from batchllm.sim.workload import OutputDraw, SimWorkload
from batchllm.tokens import Int64Array, TokenTable

Distribution = Literal["units", "rows", "groups", "cache-aware"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
"""How rows come to engines.

* ``units``: ours: the plan in units, taken as there is room.
* ``rows``: one after the other, round robin.
* ``groups``: whole groups of the plan, round robin in the order in which their first rows arrive.
* ``cache-aware``: as they arrive, to the engine that has computed most of the prompt before; to the least loaded one
  where that is less than half of it, or where loads are too far apart (SGLang's router, with its default thresholds).
"""

_STEPS_AT_ONCE = 2048
_CACHE_THRESHOLD = 0.5
_BALANCE_ABS, _BALANCE_REL = 32, 1.1


def zipf(
    *,
    prefix_len: int,
    private_len: int,
    exponent: float,
    largest_share: float,
    num_requests: int,
    output: OutputDraw,
    seed: int = 0,
) -> SimWorkload:
    """Groups whose sizes are drawn from a Zipf distribution, a prefix each, in random order.

    Args:
        prefix_len: Tokens of each prefix.
        private_len: Tokens of each row behind it.
        exponent: Of the distribution, above 1: a group of n rows is n ** -exponent as likely as one of a single row.
        largest_share: Part of all rows that a group has at most.
        num_requests: Rows.
        output: How long outputs are.
        seed: Seed of everything random.
    """
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.zipf(exponent, num_requests), max(1, int(largest_share * num_requests)))
    sizes = sizes[: int(np.searchsorted(sizes.cumsum(), num_requests)) + 1]
    group = np.repeat(np.arange(len(sizes)), sizes)[:num_requests]
    group = group[rng.permutation(num_requests)]
    tokens = np.zeros((num_requests, prefix_len + private_len), np.int32)
    tokens[:, 0] = group
    tokens[:, prefix_len] = np.arange(num_requests)  # no token too much is shared
    offsets = np.arange(num_requests + 1, dtype=np.int64) * (prefix_len + private_len)
    name = f"zipf: {prefix_len} + {private_len} tokens, exponent {exponent:g}"
    output_len = output.draw(num_requests, rng)
    return SimWorkload.from_lengths(
        name,
        TokenTable(tokens=tokens.reshape(-1), offsets=offsets),
        output_len,
        max_new_len=np.full(num_requests, output.limit, np.int64),
        known_len=output_len if output.is_known else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasResult:
    """What a simulated run of several engines came to.

    Attributes:
        distribution: How rows came to engines.
        ended_s: When each engine had nothing more to do, in seconds from the start.
        num_requests: Rows of each engine.
        num_computed_prompt_tokens: Prompt tokens computed, of all engines.
        num_optimal_prompt_tokens: The fewest that one engine computes.
        num_cut_tokens: What the plan says that its cuts cost.
    """

    distribution: Distribution
    ended_s: tuple[float, ...]
    num_requests: tuple[int, ...]
    num_computed_prompt_tokens: int
    num_optimal_prompt_tokens: int
    num_cut_tokens: int

    @property
    def elapsed_s(self) -> float:
        """From the start to the end of the last."""
        return max(self.ended_s)

    @property
    def alone_share(self) -> float:
        """Part of the time in which the last engine is the only one that still runs."""
        ends = sorted(self.ended_s)
        return (ends[-1] - ends[-2]) / ends[-1] if len(ends) > 1 and ends[-1] else 0.0


class _ReplicaWindow:
    """What one engine sees of a feed for several: a `batchllm.scheduler.feed_window.Feed`."""

    def __init__(self, feed: ReplicaFeed, replica: int) -> None:
        self._feed, self._replica = feed, replica
        self.num_requests = 0

    @property
    def is_done(self) -> bool:
        return not self._feed.has_work(self._replica)

    def take_next(self) -> tuple[int, int] | None:
        taken = self._feed.take(self._replica)
        self.num_requests += 0 if taken is None else taken[1] - taken[0]
        return taken

    def finish(self, positions: Sequence[int]) -> None:
        self._feed.finish(positions)


class ReplicasRun(Protocol):
    """A simulated run under way. It can be pickled between two calls, for one of a million rows takes minutes."""

    def advance(self) -> bool:
        """Go on for about a second of this machine's time, or an engine's whole part; False at the end."""

    def result(self) -> ReplicasResult:
        """What it came to, at the end."""


def start_replicas(
    workload: SimWorkload,
    num_replicas: int,
    *,
    distribution: Distribution = "units",
    cost_model: CostModel,
    speeds: tuple[float, ...] | None = None,
    chunk_tokens: int = 2048,
    max_running: int | None = None,
    kv_capacity_tokens: int | None = None,
) -> ReplicasRun:
    """Plan a workload and give its rows to several engines.

    Args:
        workload: Prompts, in order of arrival, and output lengths.
        num_replicas: Engines, at least 1.
        distribution: One of `DISTRIBUTIONS`.
        cost_model: The clock of each, and the size of its KV pool.
        speeds: How fast each is, 1.0 for as the cost model says; only with ``units``. None: all as it says.
        chunk_tokens: Tokens of a full step.
        max_running: Requests that run at once in an engine. None: no limit but KV.
        kv_capacity_tokens: Slots of each KV pool. None: what fits the cost model's device.

    Raises:
        ConfigError: No such distribution, too few engines, or a request that does not fit the KV pool.
        WorkloadError: The workload cannot be planned.
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"distribution {distribution!r} is not known. Known: {', '.join(DISTRIBUTIONS)}")
    if num_replicas < 1:
        raise ConfigError(f"num_replicas must be at least 1, not {num_replicas}")
    plan = plan_batch(
        workload.table, decode_lens=workload.expected_len, group_order="balanced", share_lens=workload.share_lens
    )
    capacity = cost_model.kv_capacity_tokens() if kv_capacity_tokens is None else kv_capacity_tokens
    engine: dict[str, Any] = {"chunk_tokens": chunk_tokens, "max_running": max_running}
    if distribution == "units":
        return _UnitsRun(workload, plan, cost_model, capacity, speeds or (1.0,) * num_replicas, engine)
    engine["kv_capacity_tokens"] = capacity
    owner = _ROUTERS[distribution](workload, plan, num_replicas)
    return _ApartRun(workload, plan.optimal_prefill_tokens, owner, num_replicas, distribution, cost_model, engine)


class _UnitsRun:
    """Engines that take units of one plan as they have room."""

    def __init__(
        self,
        workload: SimWorkload,
        plan: BatchPlan,
        cost_model: CostModel,
        capacity: int,
        speeds: tuple[float, ...],
        engine: dict[str, Any],
    ) -> None:
        parts = partition(plan, expected_work(plan, workload.expected_len), len(speeds))
        cutter = RunCutter(parts.plan, workload.table, workload.max_new_len, workload.known_len, workload.task)
        feed = ReplicaFeed(cutter.kv_cost, parts.work, parts.bounds, dict.fromkeys(range(len(speeds)), capacity))
        self._speeds = speeds
        self._num_optimal, self._num_cut = plan.optimal_prefill_tokens, parts.plan.num_lost_tokens
        self._columns = Columns.of(workload, parts.plan.order)
        self._windows = [_ReplicaWindow(feed, number) for number in range(len(speeds))]
        self._recorders = [StepRecorder(cost_model, capacity, capacity) for _ in speeds]
        self._engines = [
            PlannedScheduler(
                PlanWindow(parts.plan, cutter, window),
                self._columns,
                recorder,
                page_size=plan.page_size,
                is_mixed=True,
                shares_reads=True,
                **engine,
            )
            for window, recorder in zip(self._windows, self._recorders, strict=True)
        ]
        self._clocks = [(0.0, number) for number in range(len(speeds))]

    def advance(self) -> bool:
        for _ in range(_STEPS_AT_ONCE):
            if not self._clocks:
                return False
            _, number = heapq.heappop(self._clocks)  # the one that is furthest behind goes on
            if self._engines[number].advance():
                now = self._recorders[number].elapsed_s / self._speeds[number]
                heapq.heappush(self._clocks, (now, number))
        return True

    def result(self) -> ReplicasResult:
        for engine in self._engines:
            engine.outcome()
        if sorted(self._columns.finished) != list(range(len(self._columns.prompt_len))):
            raise RuntimeError("a row did not end once")
        return ReplicasResult(
            distribution="units",
            ended_s=tuple(r.elapsed_s / speed for r, speed in zip(self._recorders, self._speeds, strict=True)),
            num_requests=tuple(window.num_requests for window in self._windows),
            num_computed_prompt_tokens=self._columns.num_computed,
            num_optimal_prompt_tokens=self._num_optimal,
            num_cut_tokens=self._num_cut,
        )


class _ApartRun:
    """Engines that each plan and run what they were given, all of it known from the start."""

    def __init__(
        self,
        workload: SimWorkload,
        num_optimal: int,
        owner: Int64Array,
        num_replicas: int,
        distribution: Distribution,
        cost_model: CostModel,
        engine: dict[str, Any],
    ) -> None:
        self._workload, self._owner, self._num_replicas = workload, owner, num_replicas
        self._distribution, self._num_optimal = distribution, num_optimal
        self._cost_model, self._engine = cost_model, engine
        self._results: list[tuple[float, int, int]] = []

    def advance(self) -> bool:
        if len(self._results) == self._num_replicas:
            return False
        part = self._workload.of_rows(np.flatnonzero(self._owner == len(self._results)))
        result = simulate(part, cost_model=self._cost_model, shares_reads=True, **self._engine)
        self._results.append((result.elapsed_s, part.num_requests, result.num_computed_prompt_tokens))
        return True

    def result(self) -> ReplicasResult:
        ended_s, num_requests, num_computed = zip(*self._results, strict=True)
        return ReplicasResult(
            distribution=self._distribution,
            ended_s=ended_s,
            num_requests=num_requests,
            num_computed_prompt_tokens=sum(num_computed),
            num_optimal_prompt_tokens=self._num_optimal,
            num_cut_tokens=0,
        )


def _by_row(workload: SimWorkload, plan: BatchPlan, num_replicas: int) -> Int64Array:
    return np.arange(workload.num_requests) % num_replicas


def _by_group(workload: SimWorkload, plan: BatchPlan, num_replicas: int) -> Int64Array:
    group = _group_of_rows(plan)
    first_row = np.full(len(group), len(group), np.int64)
    np.minimum.at(first_row, group, np.arange(len(group)))
    rank = np.empty(len(group), np.int64)
    rank[np.argsort(first_row, kind="stable")] = np.arange(len(group))
    return rank[group] % num_replicas


def _group_of_rows(plan: BatchPlan) -> Int64Array:
    """Number of each row's group, int64[num_requests]: that of its first position."""
    start = np.arange(plan.num_requests)
    roots = np.flatnonzero(plan.parent == -1)
    for first, num in zip(plan.first[roots].tolist(), plan.num_consumers[roots].tolist(), strict=True):
        start[first : first + num] = first
    group = np.empty(plan.num_requests, np.int64)
    group[plan.order] = start
    return group


def _by_cache(workload: SimWorkload, plan: BatchPlan, num_replicas: int) -> Int64Array:
    """What SGLang's router decides if rows arrive one by one and none has finished: loads are rows sent so far.

    It knows prefixes by text that has been sent; here by planned prefixes, which are all that rows have in common.
    """
    prefix_of_row = np.empty(plan.num_requests, np.int64)
    prefix_of_row[plan.order] = plan.request_prefix
    prompt_len = workload.table.lengths
    sent: dict[int, set[int]] = {}
    load = np.zeros(num_replicas, np.int64)
    owner = np.empty(plan.num_requests, np.int64)
    for row in range(plan.num_requests):
        path, prefix = [], int(prefix_of_row[row])
        while prefix >= 0:
            path.append(prefix)
            prefix = int(plan.parent[prefix])
        least, most = int(load.argmin()), int(load.max())
        chosen = least
        if not (most - load[least] > _BALANCE_ABS and most > _BALANCE_REL * load[least]):
            known = next((prefix for prefix in path if prefix in sent), -1)
            if known >= 0 and plan.end_len[known] > _CACHE_THRESHOLD * prompt_len[row]:
                chosen = min(sent[known], key=lambda number: (load[number], number))
        for prefix in path:
            sent.setdefault(prefix, set()).add(chosen)
        load[chosen] += 1
        owner[row] = chosen
    return owner


_ROUTERS: dict[Distribution, Callable[[SimWorkload, BatchPlan, int], Int64Array]] = {
    "rows": _by_row,
    "groups": _by_group,
    "cache-aware": _by_cache,
}
