"""Jobs that are in progress together, on one runtime: one plan over the rows of all, made anew when that changes.

A job that joins, or leaves early, makes the plan stale. What of it has not started is withdrawn, and all that is left
of all jobs is planned together and goes on at once, as a new job of the runtime; what runs goes on meanwhile, and its
answers are delivered as ever.

Knows jobs, plans and the seam to the runtime; not files, journals or how an engine is started.

INVARIANT: a sample is waiting, or in flight in exactly one job of the runtime, or done; done is what was delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from batchllm.offline.job import RunningJob
from batchllm.offline.job_rows import Int64Array, JobRows
from batchllm.offline.joint_job import JobAlone, JointJob
from batchllm.offline.joint_leg import Leg
from batchllm.offline.joint_plan import JointPlan
from batchllm.offline.runtime import RunRequests, Runtime
from batchllm.offline.stats import JobStats
from batchllm.planner import DEFAULT_GROUP_ORDER, GroupOrder, plan_batch
from batchllm.planner.run import RunCutter
from batchllm.request import SamplingParams
from batchllm.tokens import TokenTable

_JOIN_PAUSE_S = 0.005
"""Jobs that come within so long of each other are planned once."""


class JointJobs:
    """Jobs on a runtime, planned together.

    Args:
        runtime: What runs them. All of its ``iterate`` must drive one event loop.
        group_order: Order of sibling groups in the plan.

    Attributes:
        stats: What all jobs have cost so far; their shares add up to it. Seconds are those of planning only.
        num_plans: Plans made.
        num_lost_tokens: Prompt tokens that these compute for the sake of fairness only.
    """

    def __init__(self, runtime: Runtime, *, group_order: GroupOrder = DEFAULT_GROUP_ORDER) -> None:
        self._runtime = runtime
        self._group_order = group_order
        self._jobs: list[JointJob] = []  # of which more is admitted
        self._legs: dict[Leg, tuple[Sequence[JointJob], asyncio.Task[None]]] = {}
        self._current: Leg | None = None
        self._planning: asyncio.Task[None] | None = None
        self._is_stale = False
        self._turn = asyncio.Lock()
        self._is_held = False
        self._drained = asyncio.Event()
        self.stats = JobStats()
        self.num_plans = 0
        self.num_lost_tokens = 0

    def make_job(
        self,
        runtime: Runtime,
        rows: JobRows,
        *,
        subset: Int64Array | None = None,
        group_order: GroupOrder = DEFAULT_GROUP_ORDER,
        max_in_flight: int | None = None,
        keep_steps: bool = False,
    ) -> RunningJob:
        """A job whose rows are planned together with those of the others. Called from anywhere.

        One that may have only so many requests in flight, rows that are suspected of killing engines, is planned in
        ``group_order``, and runs alone: an engine that dies meanwhile says something of these rows only. The others
        are in the order that all of them have.

        Raises:
            ValueError: This is another runtime.
        """
        if runtime is not self._runtime:
            raise ValueError("jobs that are planned together run on one runtime")
        if max_in_flight is None:
            return JointJob(self, rows, subset=subset, keep_steps=keep_steps)
        options: dict[str, Any] = {"group_order": group_order, "max_in_flight": max_in_flight, "keep_steps": keep_steps}
        return JobAlone(self, runtime, rows, subset=subset, **options)

    # Who runs alone

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nothing of any job is in flight in here but what is submitted in here."""
        async with self._turn:
            self._is_held = True
            try:
                self._drained.clear()
                self._note_drained()
                await self._drained.wait()
                yield
            finally:
                self._is_held = False
                self.feed()

    def _note_drained(self) -> None:
        if not any(leg.num_in_flight for leg in self._legs):
            self._drained.set()

    # Who is in

    def join(self, job: JointJob) -> None:
        """Take a job in. It begins level with the one that has been served least."""
        job.service = min((other.service for other in self._jobs), default=0)
        self._jobs.append(job)
        self._make_stale()

    def leave(self, job: JointJob) -> None:
        """Admit no more of a job. Doing it twice does nothing."""
        if job in self._jobs:
            self._jobs.remove(job)
            if job.num_left:
                self._make_stale()
        for leg, (jobs, _) in list(self._legs.items()):
            if all(other.has_left for other in jobs):
                self._close(leg)  # nobody wants what still runs

    def _make_stale(self) -> None:
        self._is_stale = True
        if self._planning is None:
            self._planning = asyncio.create_task(self._plan_while_stale())

    def _fail(self, error: Exception) -> None:
        """Nobody gets anything any more."""
        self._is_stale = False
        if self._planning is not None and self._planning is not asyncio.current_task():
            self._planning.cancel()
            self._planning = None
        failed = {*self._jobs, *(job for jobs, _ in self._legs.values() for job in jobs)}
        self._jobs.clear()
        for leg in list(self._legs):
            self._close(leg)
        for job in failed:
            job.fail(error)

    # What is planned

    async def _plan_while_stale(self) -> None:
        try:
            while self._is_stale:
                await asyncio.sleep(_JOIN_PAUSE_S)
                self._is_stale = False
                await self._withdraw_current()
                await self._plan_what_waits()
        except Exception as error:  # whatever it is: each job raises it, and would wait for ever if it did not
            self._fail(error)
        finally:
            if self._planning is asyncio.current_task():
                self._planning = None

    async def _withdraw_current(self) -> None:
        """Take back what has not started, and wait until all of it is here."""
        leg, self._current = self._current, None
        if leg is None:
            return
        leg.withdraw()
        self._runtime.withdraw(leg.job_id)
        # Messages are handled in the order in which they were sent. When a request that was sent behind the withdrawal,
        # and withdrawn itself, is back, so is everything.
        probe_id = self._runtime.open_job()
        try:
            self._runtime.submit(probe_id, _probe())
            self._runtime.withdraw(probe_id)
            await self._runtime.receive(probe_id)
        finally:
            self._runtime.close_job(probe_id, is_complete=False)
        leg.is_settled = True

    async def _plan_what_waits(self) -> None:
        """Plan it and let it run; again where somebody has left meanwhile, whose rows must not run."""
        while jobs := [job for job in self._jobs if job.has_waiting]:
            started = time.perf_counter()
            parts = [job.part() for job in jobs]
            # Kernels give the event loop its turn.
            plan = await asyncio.to_thread(JointPlan, parts, self._runtime.info, self._group_order)
            plan_s = time.perf_counter() - started
            self.num_plans += 1
            self.stats.plan_s += plan_s
            for job, prefixes in zip(jobs, plan.largest_prefixes, strict=True):
                job.stats.plan_s += plan_s / len(jobs)
                job.largest_prefixes = job.largest_prefixes or prefixes
            if all(job in self._jobs for job in jobs):
                self.num_lost_tokens += plan.num_lost_tokens
                self._start(Leg(self._runtime.open_job(), plan), jobs)
                return

    # What runs

    def _start(self, leg: Leg, jobs: Sequence[JointJob]) -> None:
        self._legs[leg] = jobs, asyncio.create_task(self._read(leg, jobs))
        self._current = leg
        self._feed(leg, jobs)

    def feed(self) -> None:
        """Submit what the window has room for."""
        for leg, (jobs, _) in self._legs.items():
            self._feed(leg, jobs)

    def _feed(self, leg: Leg, jobs: Sequence[JointJob]) -> None:
        while not self._is_held and not any(job.is_behind for job in jobs) and (taken := leg.take_run()) is not None:
            requests, samples_of = taken
            for part, samples in samples_of:
                jobs[part].submit(samples)
            self._runtime.submit(leg.job_id, requests)

    async def _read(self, leg: Leg, jobs: Sequence[JointJob]) -> None:
        """Deliver what comes back, and keep the window full."""
        try:
            while not leg.is_done:
                finished = await self._runtime.receive(leg.job_id)
                for delivery in leg.finish(finished):
                    job = jobs[delivery.part]
                    self.stats += delivery.stats
                    job.deliver(delivery)
                    if leg.is_settled and len(delivery.withdrawn) and job in self._jobs:
                        self._make_stale()  # it came too late for the plan
                for job in jobs:
                    job.keep_steps(finished.steps)
                self._feed(leg, jobs)
                self._note_drained()
        except Exception as error:  # as above
            self._fail(error)
        finally:
            self._close(leg)

    def _close(self, leg: Leg) -> None:
        """Doing it twice does nothing."""
        if leg not in self._legs:
            return
        _, reading = self._legs.pop(leg)
        if reading is not asyncio.current_task():
            reading.cancel()
        if self._current is leg:
            self._current = None
        self._note_drained()
        self._runtime.close_job(leg.job_id, is_complete=leg.is_complete)


def _probe() -> RunRequests:
    """A request that says, by coming back, that all before it has been handled. It costs a token if it runs at all."""
    table = TokenTable.from_lists([[0]])
    cutter = RunCutter(plan_batch(table), table, np.ones(1, np.int32))
    return RunRequests(
        run=cutter.cut(0, 1),
        sampling=(SamplingParams(max_new_tokens=1),),
        sampling_index=[0],
        seeds=[0],
        namespaces=None,
    )
