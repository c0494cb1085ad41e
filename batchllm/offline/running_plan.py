"""A joint plan while it runs, as one job of the runtime: what of it goes out, and whose it is when it comes back.

Knows positions of a plan and numbers of parts and samples; not the jobs behind them, or why the plan is given up.

INVARIANT: what the runtime has counted is divided among the parts so that their shares add up to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from batchllm.offline.joint_plan import JointPlan, by_part
from batchllm.offline.runtime import FinishedRequests, LostEngine, RunRequests
from batchllm.offline.stats import JobStats
from batchllm.request import Completion
from batchllm.scheduler.counters import JobCounters
from batchllm.scheduler.feed_window import Feed
from batchllm.tokens import Int64Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delivery:
    """What of one message is one part's.

    Attributes:
        part: Number of the part.
        samples: Samples answered, by their number in the job. int64[num_answers].
        completions: Answers of these samples.
        optimal_lens: Prompt tokens that an optimal schedule computes for each.
        withdrawn: Samples that have not run.
        lost: Samples that were in flight in an engine that is gone.
        left_over: Samples that only that engine could have had next.
        death: Why it has died; None where none has, or one has ended as it was asked to.
        stats: What the message says that the part has cost.
    """

    part: int
    samples: Int64Array
    completions: list[Completion]
    optimal_lens: list[int]
    withdrawn: Int64Array
    stats: JobStats
    lost: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    left_over: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    death: str | None = None


class Window(Feed, Protocol):
    """Says what of a plan goes out next, and to which engine: `FeedWindow` and `ReplicaFeed`."""

    @property
    def engine(self) -> int:
        """The engine that what was taken last is for."""

    def lose(self, engine: int) -> tuple[int, int]:
        """An engine is gone: positions ``[first, last)`` that nobody else can have."""


class RunningPlan:
    """A plan as a job of the runtime.

    Args:
        job_id: Number of that job.
        plan: The plan; let go when the rest of it is withdrawn.
        window: Says how much of it goes out.

    Attributes:
        job_id: As given.
        num_in_flight: Requests that have been submitted and have not come back.
        is_settled: What was withdrawn is back.
    """

    def __init__(self, job_id: int, plan: JointPlan, window: Window) -> None:
        self.job_id = job_id
        self.is_settled = False
        self._plan: JointPlan | None = plan
        self._window: Window | None = window  # None with the plan
        self._engine_at = np.full(len(plan.part_at), -1, np.int32)  # where each position is in flight, -1: it is not
        self._part_at, self._sample_at, self._optimal_at = plan.part_at, plan.sample_at, plan.optimal_at
        self._kept: Int64Array | None = None  # positions that the arrays are of, once they are not of all
        self.num_in_flight = 0
        self._counted = JobCounters()

    @property
    def is_withdrawn(self) -> bool:
        """Nothing more of it goes out."""
        return self._window is None

    @property
    def is_complete(self) -> bool:
        """All of the plan has run."""
        return self._window is not None and self._window.is_done

    @property
    def is_done(self) -> bool:
        """Nothing more will come back, or go out."""
        return self.num_in_flight == 0 and (self._window is None or self._window.is_done)

    def take_run(self) -> tuple[RunRequests, list[tuple[int, Int64Array]]] | None:
        """The next run to submit, and which samples of which parts are in it; None while the window is full."""
        if self._plan is None or self._window is None or (bounds := self._window.take_next()) is None:
            return None
        positions = slice(*bounds)
        self.num_in_flight += bounds[1] - bounds[0]
        engine = self._window.engine
        self._engine_at[positions] = engine
        samples = self._sample_at[positions]
        requests = self._plan.requests(self._plan.cutter.cut(*bounds), engine)
        return requests, [(part, samples[own]) for part, own in by_part(self._part_at[positions])]

    def withdraw(self) -> None:
        """Nothing more goes out. What is needed of the plan is where its requests in flight belong."""
        self._kept = np.flatnonzero(self._engine_at >= 0)
        self._part_at, self._sample_at = self._part_at[self._kept], self._sample_at[self._kept]
        self._optimal_at = self._optimal_at[self._kept]
        self._plan = self._window = None
        self._engine_at = self._engine_at[self._kept]

    def finish(self, finished: FinishedRequests) -> list[Delivery]:
        """These have come back, or an engine is gone."""
        if finished.lost is not None:
            return self._lose(finished.lost)
        self.num_in_flight -= len(finished.positions)
        if self._window is not None:
            self._window.finish(finished.positions)
        places = np.array(finished.positions, np.int64)
        if self._kept is not None:
            places = np.searchsorted(self._kept, places)
        self._engine_at[places] = -1
        groups = [
            (part, places[own], [finished.completions[i] for i in np.arange(len(places))[own].tolist()])
            for part, own in by_part(self._part_at[places])
        ]
        if not groups:
            return []
        # Counters are of the whole job of the runtime. Computed tokens are divided by what the answers of the message
        # had to compute; what cannot be divided goes to the part with the most of them.
        counted, self._counted = finished.counters - self._counted, finished.counters
        shares = [counted.num_computed_prompt_tokens]
        if len(groups) > 1:
            weights = [
                sum([1 + c.prompt_tokens - c.cached_tokens for c in completions]) for _, _, completions in groups
            ]
            shares = divide(counted.num_computed_prompt_tokens, weights)
        largest = max(groups, key=lambda group: len(group[1]))
        deliveries = []
        for group, share in zip(groups, shares, strict=True):
            own = counted if group is largest else JobCounters(peak_kv_tokens=counted.peak_kv_tokens)
            stats = JobStats.of(own)
            stats.num_computed_prompt_tokens = share
            deliveries.append(self._delivery(*group, stats))
        return deliveries

    def _lose(self, engine: LostEngine) -> list[Delivery]:
        lost = np.flatnonzero(self._engine_at == engine.number)
        self._engine_at[lost] = -1
        self.num_in_flight -= len(lost)
        left_over = lost[:0]
        if self._window is not None:
            self._window.finish(lost.tolist())
            left_over = np.arange(*self._window.lose(engine.number))
        deliveries = []
        for part in np.unique(self._part_at[np.append(lost, left_over)]).tolist() or [0]:
            places, others = (p[self._part_at[p] == part] for p in (lost, left_over))
            deliveries.append(
                Delivery(
                    part=part,
                    samples=lost[:0],
                    completions=[],
                    optimal_lens=[],
                    withdrawn=lost[:0],
                    stats=JobStats(),
                    lost=self._sample_at[places],
                    left_over=self._sample_at[others],
                    death=None if engine.is_clean else engine.reason,
                )
            )
        return deliveries

    def _delivery(self, part: int, places: Int64Array, completions: list[Completion], stats: JobStats) -> Delivery:
        withdrawn: Int64Array = np.zeros(0, np.int64)
        if self.is_withdrawn:  # what was withdrawn has not been answered
            is_answer = np.array([completion.finish_reason != "abort" for completion in completions])
            completions = [completion for completion in completions if completion.finish_reason != "abort"]
            withdrawn, places = self._sample_at[places[~is_answer]], places[is_answer]
        stats.num_prompt_tokens = sum([completion.prompt_tokens for completion in completions])
        stats.num_output_tokens = sum([completion.completion_tokens for completion in completions])
        optimal_lens = self._optimal_at[places].tolist()
        stats.num_optimal_prompt_tokens = sum(optimal_lens)
        return Delivery(
            part=part,
            samples=self._sample_at[places],
            completions=completions,
            optimal_lens=optimal_lens,
            withdrawn=withdrawn,
            stats=stats,
        )


def divide(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` in shares that are nearly as the weights are, and add up to it. One weight at least."""
    ends = np.cumsum(np.array(weights, np.float64))
    shares: list[int] = np.diff(np.rint(ends / ends[-1] * total).astype(np.int64), prepend=0).tolist()
    return shares
