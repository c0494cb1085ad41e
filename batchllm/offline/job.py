"""A job as whoever runs it sees it: rows in, completions out, alone on a runtime or planned together with other jobs.

Knows samples, their states and results; not how they are planned, or what they are fed by.

INVARIANT: a sample is waiting, or in flight, or done; done is what was delivered, as an answer or as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from batchllm.offline.job_rows import JobRows
from batchllm.offline.joint_plan import Part
from batchllm.offline.runtime import Runtime
from batchllm.offline.stats import JobStats
from batchllm.planner import PrefixSummary
from batchllm.request import Completion
from batchllm.tokens import Int64Array
from batchllm.trace.steps import StepArray

if TYPE_CHECKING:
    from batchllm.offline.jobs import Jobs
    from batchllm.offline.running_plan import Delivery

TICK_S = 0.1
"""A job that hears nothing for so long yields nothing once, so that its caller can do something else."""

_MAX_UNREAD = 16_384
"""Finished samples of a job that nobody has taken yet; beyond it nothing more is submitted of any job in its plan."""

_WAITING, _IN_FLIGHT, _DONE = 0, 1, 2
"""States of a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSamples:
    """Samples that have finished together; item i of each list is of the same sample.

    Attributes:
        rows: Row numbers.
        samples: Which of its row's samples each is, from 0.
        completions: Their ``index`` and ``sample`` are still 0.
        optimal_lens: Prompt tokens that an optimal schedule computes for each.
        num_prompt_tokens: Prompt tokens of these samples.
        num_output_tokens: Output tokens of these samples.
        num_computed_prompt_tokens: Prompt tokens computed since the last of these, counted in the scheduler.
    """

    rows: list[int]
    samples: list[int]
    completions: list[Completion]
    optimal_lens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_computed_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRows:
    """Rows all of whose samples have finished; item i of each list is of the same row.

    Attributes:
        rows: Row numbers.
        completions: The samples of each, in their order and with their number.
        optimal_lens: Prompt tokens that an optimal schedule computes for each.
        of_samples: What has come: the last samples of these rows, and samples of others.
    """

    rows: list[int]
    completions: list[list[Completion]]
    optimal_lens: list[int]
    of_samples: FinishedSamples


NOTHING = FinishedSamples(rows=[], samples=[], completions=[])
"""What is said every `TICK_S`."""


class Job:
    """Rows of a job on a runtime. Made by `Jobs.make_job` or `single_job`.

    `run` is driven on the event loop of the runtime; there is everything called that is not said to be called from
    anywhere.

    Args:
        jobs: Plans it, alone or with others.
        rows: The rows.
        subset: Row numbers to run; None for all.
        max_in_flight: Most requests submitted and not finished, while those of no other job are; None for as many as
            serve throughput.
        keep_steps: Keep what each forward step was like, in ``steps``.
        on_submit: Told which rows are submitted, by their places in the input, and the number of the engine.

    Attributes:
        max_in_flight: As given.
        stats: Counts and times so far: its share, where something is counted for all jobs together.
        steps: Arrays of `batchllm.trace.STEP_DTYPE`: each forward step while it ran, whoever else was in it; None where
            that is not kept.
        is_stopping: Nothing more is admitted.
        has_left: It wants no more results.
        num_left: Samples that are not done.
        service: Tokens computed and decoded for it, beginning where it joined.
        deaths: Why engines have died while others went on.
        has_given_back: Samples will have no answer in this job, since their engine is gone.
        largest_prefixes: Prefixes of its first plan that save it most; ``example_row`` is a row's place in
            the input. Empty before that.
    """

    def __init__(
        self,
        jobs: Jobs,
        rows: JobRows,
        *,
        subset: Int64Array | None = None,
        max_in_flight: int | None = None,
        keep_steps: bool = False,
        on_submit: Callable[[Int64Array, int], None] | None = None,
    ) -> None:
        started = time.perf_counter()
        self._jobs = jobs
        self._rows = rows
        self._samples, self._table = rows.sample_table(subset)
        self._state = np.full(len(self._table), _WAITING, np.int8)
        self._num_in_flight = 0
        self._began_at: float | None = None
        # Results, and an error where no more will come.
        self._outbox: deque[FinishedSamples | Exception] = deque()
        self._news = asyncio.Event()
        self._num_unread = 0
        self.max_in_flight = max_in_flight
        self.num_left = len(self._table)
        self.service = 0
        self.largest_prefixes: Sequence[PrefixSummary] = ()
        self.has_left = False
        self.is_stopping = False
        self.deaths: list[str] = []
        self.has_given_back = False
        self._lost: list[Int64Array] = []
        self._on_submit = on_submit
        self.steps: list[StepArray] | None = [] if keep_steps else None
        self.stats = JobStats(plan_s=time.perf_counter() - started)

    async def run(self) -> AsyncGenerator[FinishedSamples, None]:
        """Run the job.

        Yields:
            Samples as they finish, in no particular order; none of them every `TICK_S` in which nothing happens.

        Raises:
            EngineDiedError: The runtime is gone.
            EngineError: It cannot run the largest step of the plan.
        """
        self._jobs.join(self)
        try:
            while self._outbox or not self._is_over:
                if self.is_stopping or self.has_left:
                    self._jobs.leave(self)
                if not self._outbox:
                    self._news.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TICK_S):
                            await self._news.wait()
                yield self._take() if self._outbox else NOTHING
        finally:
            self.has_left = True
            self._jobs.leave(self)
            await self._jobs.settle()

    async def run_rows(self) -> AsyncGenerator[FinishedRows, None]:
        """Run the job, as `run` does.

        Yields:
            Whole rows as they finish; no row where none has. Samples of a row that does not become whole are dropped.
        """
        is_single = self._rows.has_one_sample()
        unfinished: dict[int, list[tuple[Completion, int]]] = {}
        async with contextlib.aclosing(self.run()) as stream:
            async for samples in stream:
                if is_single:
                    completions = [[completion] for completion in samples.completions]
                    whole = samples.rows, completions, list(samples.optimal_lens)
                else:
                    whole = self._whole_rows(samples, unfinished)
                rows, completions, optimal_lens = whole
                yield FinishedRows(rows=rows, completions=completions, optimal_lens=optimal_lens, of_samples=samples)

    def _whole_rows(
        self, finished: FinishedSamples, unfinished: dict[int, list[tuple[Completion, int]]]
    ) -> tuple[list[int], list[list[Completion]], list[int]]:
        whole: tuple[list[int], list[list[Completion]], list[int]] = [], [], []
        num_samples = self._rows.num_samples(np.array(finished.rows, np.int64)).tolist()
        for row, sample, completion, optimal_len, num in zip(
            finished.rows, finished.samples, finished.completions, finished.optimal_lens, num_samples, strict=True
        ):
            samples = unfinished.setdefault(row, [])
            samples.append((msgspec.structs.replace(completion, sample=sample), optimal_len))
            if len(samples) == num:
                del unfinished[row]
                samples.sort(key=lambda item: item[0].sample)
                whole[0].append(row)
                whole[1].append([completion for completion, _ in samples])
                whole[2].append(sum([optimal_len for _, optimal_len in samples]))
        return whole

    def _take(self) -> FinishedSamples:
        finished = self._outbox.popleft()
        if isinstance(finished, Exception):
            raise finished
        was_behind = self.is_behind
        self._num_unread -= len(finished.completions)
        if was_behind and not self.is_behind:
            self._jobs.feed()
        return finished

    def stop_admitting(self) -> None:
        """Nothing more is submitted, and what has not started is withdrawn; what runs goes on. Called from anywhere."""
        self.is_stopping = True  # seen by `run` within `TICK_S`

    def give_up(self) -> None:
        """End `run` when what has come has been taken; results that come later are dropped. Called from anywhere."""
        self.has_left = True

    def rows_in_flight(self) -> Int64Array:
        """Rows with samples that have been submitted and have not finished, ascending. Called from anywhere."""
        return np.unique(self._samples.rows(np.flatnonzero(self._state == _IN_FLIGHT)))

    def rows_lost(self) -> Int64Array:
        """Rows with samples that were in flight in an engine that died while others went on, ascending."""
        return np.unique(self._samples.rows(np.concatenate([np.zeros(0, np.int64), *self._lost])))

    @property
    def _is_over(self) -> bool:
        return self.has_left or self.num_left == 0 or (self.is_stopping and self._num_in_flight == 0)

    @property
    def is_admitting(self) -> bool:
        """More of it may be planned and submitted."""
        return not self.is_stopping and not self.has_left

    @property
    def is_behind(self) -> bool:
        """Results come faster than they are taken."""
        return self._num_unread > _MAX_UNREAD and not self.has_left

    @property
    def has_waiting(self) -> bool:
        """Something of it is neither in flight nor done."""
        return self.num_left > self._num_in_flight

    def part(self) -> Part:
        """What of it waits, to be planned."""
        is_whole = self.num_left == len(self._table) and not self._num_in_flight
        waiting = None if is_whole else np.flatnonzero(self._state == _WAITING)
        return Part(
            rows=self._rows,
            samples=self._samples,
            table=self._table,
            left=waiting,
            service=self.service,
            wants_prefixes=not self.largest_prefixes,
        )

    def submit(self, samples: Int64Array, engine: int) -> None:
        """These are in flight."""
        self._began_at = self._began_at or time.perf_counter()
        if self._on_submit is not None:
            self._on_submit(self._rows.places(self._samples.rows(samples)), engine)
        self._state[samples] = _IN_FLIGHT
        self._num_in_flight += len(samples)

    def deliver(self, delivery: Delivery) -> None:
        """These have come back, answered or withdrawn."""
        samples = delivery.samples
        self._state[samples] = _DONE
        self._state[delivery.withdrawn] = _WAITING
        self._num_in_flight -= len(samples) + len(delivery.withdrawn)
        self.num_left -= len(samples)
        if delivery.death is not None or len(delivery.lost) or len(delivery.left_over):
            self._lose(delivery)
            return
        stats = delivery.stats
        self.service += stats.num_optimal_prompt_tokens + stats.num_output_tokens
        self.stats += stats
        if self._began_at is not None:
            self.stats.run_s = time.perf_counter() - self._began_at
        if self.has_left:
            return
        rows = self._samples.rows(samples).tolist()
        completions = delivery.completions
        if self._rows.scores.has_any:
            finish = self._rows.scores.finish
            completions = [finish(row, completion) for row, completion in zip(rows, completions, strict=True)]
        self._num_unread += len(delivery.completions)
        self._put(
            FinishedSamples(
                rows=rows,
                samples=self._samples.samples(samples).tolist(),
                completions=completions,
                optimal_lens=delivery.optimal_lens,
                num_prompt_tokens=stats.num_prompt_tokens,
                num_output_tokens=stats.num_output_tokens,
                num_computed_prompt_tokens=stats.num_computed_prompt_tokens,
            )
        )

    def _lose(self, delivery: Delivery) -> None:
        """Samples that no engine will answer in this job: whoever runs it decides what becomes of them."""
        gone = np.concatenate([delivery.lost, delivery.left_over])
        self._state[gone] = _DONE
        self._num_in_flight -= len(delivery.lost)
        self.num_left -= len(gone)
        self.has_given_back = True
        if delivery.death is not None:
            self._lost.append(delivery.lost)
            self.deaths.append(delivery.death)
        self._news.set()

    def keep_steps(self, steps: StepArray) -> None:
        """These have run while it was in the plan. Does nothing where they are not kept."""
        if self.steps is not None:
            self.steps.append(steps)

    def fail(self, error: Exception) -> None:
        """No more results come."""
        self._put(error)

    def _put(self, finished: FinishedSamples | Exception) -> None:
        self._outbox.append(finished)
        self._news.set()


class JobMaker(Protocol):
    """Makes a job of some rows on a runtime; the arguments are those of `Job`."""

    def __call__(
        self,
        runtime: Runtime,
        rows: JobRows,
        *,
        subset: Int64Array | None = None,
        max_in_flight: int | None = None,
        keep_steps: bool = False,
        on_submit: Callable[[Int64Array, int], None] | None = None,
    ) -> Job: ...
