"""Jobs as a runner sees them where several are in progress on one runtime.

Knows samples, their states and results; not how jobs are planned together, or what they are fed by.

INVARIANT: a sample is waiting, or in flight, or done; done is what was delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from batchllm.offline.job import NOTHING, TICK_S, FinishedSamples, Job
from batchllm.offline.job_rows import Int64Array, JobRows
from batchllm.offline.joint_leg import Delivery
from batchllm.offline.joint_plan import Part
from batchllm.offline.runtime import Runtime
from batchllm.offline.stats import JobStats
from batchllm.planner import PrefixSummary
from batchllm.trace.steps import StepArray

if TYPE_CHECKING:
    from batchllm.offline.joint_jobs import JointJobs

_MAX_UNREAD = 100_000
"""Finished samples that nobody has taken yet; with more of them in one job, nothing more is submitted."""

_WAITING, _IN_FLIGHT, _DONE = 0, 1, 2
"""States of a sample."""


class JointJob:
    """Rows of a job that are planned together with those of others; what a runner needs of a `Job`.

    Made by `JointJobs.make_job`. `run` is driven on the event loop of the runtime; there is everything called that is
    not said to be called from anywhere.

    Attributes:
        stats: Counts and times so far: its share, where something is counted for all jobs together.
        steps: What each forward step was like while it ran, whoever else was in it, where that is kept.
        is_stopping: Nothing more is admitted.
        has_left: It wants no more results.
        num_left: Samples that are not done.
        service: Tokens computed and decoded for it, beginning where it joined.
        largest_prefixes: Of the first plan that it is in, those that save it most; ``example_row`` is a row's place in
            the input. Empty before that.
    """

    def __init__(self, joint: JointJobs, rows: JobRows, *, subset: Int64Array | None, keep_steps: bool) -> None:
        self._joint = joint
        self._rows = rows
        self._samples, self._table = rows.sample_table(subset)
        self._state = np.full(len(self._table), _WAITING, np.int8)
        self._num_in_flight = 0
        self._is_given_up = False
        # Results, and an error where no more will come.
        self._outbox: asyncio.Queue[FinishedSamples | Exception] = asyncio.Queue()
        self._num_unread = 0
        self.num_left = len(self._table)
        self.service = 0
        self.largest_prefixes: Sequence[PrefixSummary] = ()
        self.has_left = False
        self.is_stopping = False
        self.stats = JobStats()
        self.steps: list[StepArray] | None = [] if keep_steps else None

    async def run(self) -> AsyncGenerator[FinishedSamples, None]:
        """Run the job.

        Yields:
            Samples as they finish, in no particular order; none of them every `TICK_S` in which nothing happens.

        Raises:
            EngineDiedError: The runtime is gone.
        """
        started = time.perf_counter()
        self._joint.join(self)
        try:
            while not self._is_given_up:
                if self.is_stopping:
                    self._joint.leave(self)
                if self._outbox.empty() and self._is_over:
                    return
                try:
                    finished = await asyncio.wait_for(self._outbox.get(), TICK_S)
                except TimeoutError:
                    yield NOTHING
                    continue
                if isinstance(finished, Exception):
                    raise finished
                self.stats.run_s = time.perf_counter() - started
                was_behind = self.is_behind
                self._num_unread -= len(finished.completions)
                if was_behind and not self.is_behind:
                    self._joint.feed()
                yield finished
        finally:
            self.has_left = True
            self._joint.leave(self)
            self._joint.feed()  # nothing waits for it any more

    def stop_admitting(self) -> None:
        """Nothing more is submitted, and what has not started is withdrawn; what runs goes on. Called from anywhere."""
        self.is_stopping = True  # seen by `run` within `TICK_S`

    def give_up(self) -> None:
        """End `run` when it goes on; results that come later are dropped. Called from anywhere."""
        self._is_given_up = True

    def rows_in_flight(self) -> Int64Array:
        """Rows with samples that have been submitted and have not finished, ascending. Called from anywhere."""
        return np.unique(self._samples.rows(np.flatnonzero(self._state == _IN_FLIGHT)))

    @property
    def _is_over(self) -> bool:
        return self.num_left == 0 or (self.is_stopping and self._num_in_flight == 0)

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
        waiting = np.flatnonzero(self._state == _WAITING)
        return Part(
            rows=self._rows,
            samples=self._samples,
            table=self._table,
            left=waiting,
            service=self.service,
            wants_prefixes=not self.largest_prefixes,
        )

    def submit(self, samples: Int64Array) -> None:
        """These are in flight."""
        self._state[samples] = _IN_FLIGHT
        self._num_in_flight += len(samples)

    def deliver(self, delivery: Delivery) -> None:
        """These have come back, answered or withdrawn."""
        samples = delivery.samples
        self._state[samples] = _DONE
        self._state[delivery.withdrawn] = _WAITING
        self._num_in_flight -= len(samples) + len(delivery.withdrawn)
        self.num_left -= len(samples)
        stats = delivery.stats
        self.service += stats.num_optimal_prompt_tokens + stats.num_output_tokens
        self.stats += stats
        if self.has_left:
            return
        self._num_unread += len(delivery.completions)
        self._outbox.put_nowait(
            FinishedSamples(
                rows=self._samples.rows(samples).tolist(),
                samples=self._samples.samples(samples).tolist(),
                completions=delivery.completions,
                optimal_lens=delivery.optimal_lens,
                num_prompt_tokens=stats.num_prompt_tokens,
                num_output_tokens=stats.num_output_tokens,
                num_computed_prompt_tokens=stats.num_computed_prompt_tokens,
            )
        )

    def keep_steps(self, steps: StepArray) -> None:
        """These have run while it was in the plan. Does nothing where they are not kept."""
        if self.steps is not None:
            self.steps.append(steps)

    def fail(self, error: Exception) -> None:
        """No more results come."""
        self._outbox.put_nowait(error)


class JobAlone(Job):
    """A job that runs while no other does. Made by `JointJobs.make_job`."""

    def __init__(self, joint: JointJobs, runtime: Runtime, rows: JobRows, **options: Any) -> None:
        super().__init__(runtime, rows, **options)
        self._joint = joint

    async def run(self) -> AsyncGenerator[FinishedSamples, None]:
        """Wait for the others, then run."""
        async with contextlib.AsyncExitStack() as stack:
            entering = asyncio.create_task(stack.enter_async_context(self._joint.alone()))
            try:
                while not entering.done():
                    if self.is_stopping or self._is_given_up:
                        return
                    await asyncio.wait([entering], timeout=TICK_S)
                    yield NOTHING
                await entering
            finally:
                if not entering.done():
                    entering.cancel()
                    await asyncio.wait([entering])
            async for finished in super().run():
                yield finished
