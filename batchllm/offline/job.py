"""One batch on a runtime: rows in, completions out. Plan, feed, collect."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batchllm.offline.feeder import MAX_RUN_REQUESTS, Feeder
from batchllm.offline.job_rows import Int64Array, JobRows, Samples
from batchllm.offline.namespaces import adapter_numbers
from batchllm.offline.runtime import FinishedRequests, RunRequests, Runtime
from batchllm.offline.stats import JobStats
from batchllm.offline.warm_up import largest_step, warm_up
from batchllm.planner import (
    DEFAULT_GROUP_ORDER,
    BatchPlan,
    GroupOrder,
    PrefixSummary,
    largest_prefixes,
    plan_batch,
)
from batchllm.planner.run import PlannedRun, RunCutter
from batchllm.request import Completion
from batchllm.trace.steps import StepArray

TICK_S = 0.1
"""A job that hears nothing for so long says so, for whoever has something else to do meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSamples:
    """Samples that have finished together; item i of each list is of the same sample.

    Attributes:
        rows: Row numbers.
        samples: Which of its row's samples each is, from 0.
        completions: Their ``index`` and ``sample`` are still 0.
        optimal_lens: Prompt tokens that an optimal schedule computes for each.
        num_prompt_tokens: Of these samples.
        num_output_tokens: Of these samples.
        num_computed_prompt_tokens: Prompt tokens computed since the last of these, counted in the scheduler.
    """

    rows: list[int]
    samples: list[int]
    completions: list[Completion]
    optimal_lens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_computed_prompt_tokens: int = 0


NOTHING = FinishedSamples(rows=[], samples=[], completions=[])
"""What is said every `TICK_S`."""


class RunningJob(Protocol):
    """What a runner needs of a job: `Job`, or one that is planned together with others."""

    is_stopping: bool

    @property
    def stats(self) -> JobStats: ...

    @property
    def steps(self) -> list[StepArray] | None: ...

    @property
    def largest_prefixes(self) -> Sequence[PrefixSummary]: ...

    def run(self) -> AsyncGenerator[FinishedSamples, None]: ...

    def stop_admitting(self) -> None: ...

    def give_up(self) -> None: ...

    def rows_in_flight(self) -> Int64Array: ...


class JobMaker(Protocol):
    """Makes a job of some rows on a runtime; the arguments are those of `Job`."""

    def __call__(
        self,
        runtime: Runtime,
        rows: JobRows,
        *,
        subset: Int64Array | None = None,
        group_order: GroupOrder = DEFAULT_GROUP_ORDER,
        max_in_flight: int | None = None,
        keep_steps: bool = False,
    ) -> RunningJob: ...


def give_memory_back() -> None:
    """What millions of rows needed for a moment; the C library would keep it for this process."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def sampling_of(
    rows: JobRows, row_numbers: Int64Array, samples: Int64Array
) -> tuple[npt.NDArray[np.int32], list[int], list[str] | None]:
    """How to sample some samples: of each its row's kind, its seed, and what its namespace is called (None: all in
    the default one).

    Args:
        rows: The rows of the job.
        row_numbers: Of which row each is.
        samples: Which of its row's samples each is.
    """
    kinds = rows.kind(row_numbers)
    draws = rows.draws.values[kinds]  # a greedy row needs no seed
    numbers, seed_of = rows.namespace(row_numbers), rows.sample_seed
    seeds = [
        seed_of(row, sample) if draw else 0
        for row, sample, draw in zip(row_numbers.tolist(), samples.tolist(), draws.tolist(), strict=True)
    ]
    return kinds, seeds, [rows.all_namespaces[n].name for n in numbers.tolist()] if numbers.any() else None


def in_input(
    prefixes: Sequence[PrefixSummary], rows: JobRows, samples: Samples, sample_of: Int64Array | None = None
) -> tuple[PrefixSummary, ...]:
    """The prefixes with their ``example_row`` as a row's place in the input.

    Args:
        prefixes: With rows of the planned table.
        rows: The rows of the job.
        samples: The samples of the job.
        sample_of: Of each row of the planned table its sample; None where it is the one of that number.
    """
    planned = np.array([prefix.example_row for prefix in prefixes], np.int64)
    places = rows.index[samples.rows(planned if sample_of is None else sample_of[planned])]
    return tuple(replace(prefix, example_row=place) for prefix, place in zip(prefixes, places.tolist(), strict=True))


class Job:
    """Rows of a job on a runtime, planned together.

    Args:
        runtime: What runs them.
        rows: The rows.
        subset: Row numbers to run; None for all.
        group_order: Order of sibling groups in the plan.
        max_run_requests: Most requests that one message carries.
        max_in_flight: Most requests submitted and not finished; None for as many as serve throughput.
        keep_steps: Keep what each forward step was like, in ``steps``.

    Attributes:
        stats: Counts and times so far.
        steps: Arrays of `batchllm.trace.STEP_DTYPE`, where they are kept.
        is_stopping: Nothing more is admitted.
    """

    def __init__(
        self,
        runtime: Runtime,
        rows: JobRows,
        *,
        subset: Int64Array | None = None,
        group_order: GroupOrder = DEFAULT_GROUP_ORDER,
        max_run_requests: int = MAX_RUN_REQUESTS,
        max_in_flight: int | None = None,
        keep_steps: bool = False,
    ) -> None:
        self._runtime = runtime
        self._rows = rows
        self._max_run_requests = max_run_requests
        self._max_in_flight = max_in_flight
        self._job_id: int | None = None
        self._is_given_up = False
        self.steps: list[StepArray] | None = [] if keep_steps else None
        self.is_stopping = False
        self.stats = JobStats()
        started = time.perf_counter()
        self._samples, self._table = rows.sample_table(subset)
        give_memory_back()
        self._plan = self._make_plan(group_order)
        give_memory_back()
        self.stats.plan_s = time.perf_counter() - started
        self._optimal_lens = self._plan.computed_lens()
        self._feeder = self._make_feeder()

    @cached_property
    def largest_prefixes(self) -> tuple[PrefixSummary, ...]:
        """The prefixes that save most; ``example_row`` is a row's place in the input."""
        return in_input(largest_prefixes(self._plan), self._rows, self._samples)

    def _make_plan(self, group_order: GroupOrder) -> BatchPlan:
        rows = self._rows
        namespaces = rows.namespaces(self._samples)
        known, limit = self._of_samples(rows.known_len), self._of_samples(rows.max_new_len)
        return plan_batch(
            self._table,
            page_size=self._runtime.info.page_size,
            namespaces=namespaces,
            partitions=adapter_numbers(rows.all_namespaces, namespaces),
            decode_lens=np.where(known > 0, known, limit),
            group_order=group_order,
        )

    def _make_feeder(self) -> Feeder:
        rows = self._rows
        cutter = RunCutter(
            self._plan,
            self._table,
            self._of_samples(rows.max_new_len),
            self._of_samples(rows.known_len),
            rows.task(self._samples.all_rows()),
        )
        return Feeder(
            cutter,
            self._runtime.info.kv_limit_tokens,
            self._max_run_requests,
            max_in_flight=self._max_in_flight,
        )

    def _of_samples(self, values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Of each sample the value of its row."""
        row_of = self._samples.row_of
        return values if row_of is None else values[row_of]

    async def run(self) -> AsyncGenerator[FinishedSamples, None]:
        """Run the batch.

        Yields:
            Samples as they finish, in no particular order; none of them every `TICK_S` in which nothing happens.

        Raises:
            EngineDiedError: The runtime is gone.
            EngineError: It cannot run the largest step of the plan.
        """
        feeder, runtime = self._feeder, self._runtime
        await self._warm_up()
        started = time.perf_counter()
        job_id = self._job_id = runtime.open_job()
        receiving: asyncio.Task[FinishedRequests] | None = None
        try:
            while not (feeder.is_done or self._is_given_up or (self.is_stopping and feeder.num_in_flight == 0)):
                while not self.is_stopping and (run := feeder.take_run()) is not None:
                    runtime.submit(job_id, self._with_sampling(run))
                receiving = receiving or asyncio.ensure_future(runtime.receive(job_id))
                await asyncio.wait([receiving], timeout=TICK_S)
                if not receiving.done():
                    yield NOTHING
                    continue
                finished, receiving = receiving.result(), None
                feeder.finish(finished.positions)
                samples = self._collect(finished)
                self.stats.run_s = time.perf_counter() - started
                yield samples
        finally:
            if receiving is not None and not receiving.done():
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await receiving
            runtime.close_job(job_id, is_complete=feeder.is_done)

    async def _warm_up(self) -> None:
        started = time.perf_counter()
        if self._max_in_flight is None and (step := largest_step(self._runtime.info, self._plan)) is not None:
            await warm_up(self._runtime, step)
            self.stats.start_s += time.perf_counter() - started

    def stop_admitting(self) -> None:
        """Nothing more is submitted, and what has not started is withdrawn; what runs goes on."""
        if not self.is_stopping:
            self.is_stopping = True
            if self._job_id is not None:
                self._runtime.withdraw(self._job_id)

    def give_up(self) -> None:
        """End `run` when it goes on; what runs is aborted."""
        self._is_given_up = True

    def rows_in_flight(self) -> Int64Array:
        """Rows with samples that have been submitted and have not finished, ascending."""
        return np.unique(self._samples.rows(self._plan.order[self._feeder.positions_in_flight()]))

    def _with_sampling(self, run: PlannedRun) -> RunRequests:
        """The run with only the sampling parameters that occur in it."""
        samples = self._samples
        kinds, seeds, namespaces = sampling_of(
            self._rows, samples.rows(run.request_row), samples.samples(run.request_row)
        )
        used, place = np.unique(kinds, return_inverse=True)
        return RunRequests(
            run=run,
            sampling=tuple(self._rows.kinds[kind] for kind in used.tolist()),
            sampling_index=place.tolist(),
            seeds=seeds,
            namespaces=namespaces,
        )

    def _collect(self, finished: FinishedRequests) -> FinishedSamples:
        stats = self.stats
        num_computed = finished.num_computed_prompt_tokens - stats.num_computed_prompt_tokens
        stats.num_computed_prompt_tokens = finished.num_computed_prompt_tokens
        stats.num_retractions = finished.num_retractions
        stats.peak_kv_tokens = finished.peak_kv_tokens
        stats.prediction = finished.prediction
        if self.steps is not None:
            self.steps.append(finished.steps)
        table_rows = self._plan.order[finished.positions]
        rows, samples = self._samples.rows(table_rows).tolist(), self._samples.samples(table_rows).tolist()
        optimal_lens = self._optimal_lens[finished.positions].tolist()
        completions = finished.completions
        if self.is_stopping:  # what was withdrawn has not been answered
            kept = [i for i, completion in enumerate(completions) if completion.finish_reason != "abort"]
            rows, samples, completions, optimal_lens = (
                [items[i] for i in kept] for items in (rows, samples, completions, optimal_lens)
            )
        num_prompt_tokens = sum([completion.prompt_tokens for completion in completions])
        num_output_tokens = sum([completion.completion_tokens for completion in completions])
        stats.num_prompt_tokens += num_prompt_tokens
        stats.num_output_tokens += num_output_tokens
        stats.num_optimal_prompt_tokens += sum(optimal_lens)
        return FinishedSamples(
            rows=rows,
            samples=samples,
            completions=completions,
            optimal_lens=optimal_lens,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            num_computed_prompt_tokens=num_computed,
        )
