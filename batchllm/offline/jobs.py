"""Jobs that are in progress on one runtime: one plan over the rows of all, made again when the jobs change.

A job that joins, or leaves early, makes the plan stale. What of it has not started is withdrawn, and all that is left
of all jobs is planned together and goes on at once, as a new job of the runtime; what runs goes on meanwhile, and its
answers are delivered as ever. A job by itself is the same with one part.

Knows jobs, plans and the seam to the runtime; not files, journals or how an engine is started.

INVARIANT: a sample is waiting, or in flight in exactly one job of the runtime, or done; done is what was delivered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchllm.offline.job import Job
from batchllm.offline.job_rows import JobRows
from batchllm.offline.joint_plan import JointPlan, give_memory_back
from batchllm.offline.running_plan import RunningPlan, Window
from batchllm.offline.runtime import RunRequests, Runtime
from batchllm.offline.stats import JobStats
from batchllm.offline.warm_up import largest_step, warm_up
from batchllm.planner import DEFAULT_GROUP_ORDER, GroupOrder, plan_batch
from batchllm.planner.planner import RunCutter
from batchllm.request import SamplingParams
from batchllm.scheduler.feed_window import MAX_IN_FLIGHT, FeedWindow
from batchllm.scheduler.replica_feed import ReplicaFeed
from batchllm.tokens import TokenTable

_JOIN_PAUSE_S = 0.005
"""Jobs that come within so long of each other are planned once."""


class Jobs:
    """Jobs on a runtime, planned together.

    Args:
        runtime: What runs them. All of its ``iterate`` must drive one event loop.
        group_order: Order of sibling groups in the plan.
        max_run_requests: Most requests that one message carries.
        is_for_one: One job and no more: nobody is waited for, and the largest step is tried first.

    Attributes:
        stats: What all jobs have cost so far; their shares add up to it. Seconds are those of planning only.
        num_plans: Plans made.
        num_lost_tokens: Prompt tokens that these compute for the sake of fairness, or of several engines, only.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        group_order: GroupOrder = DEFAULT_GROUP_ORDER,
        max_run_requests: int = MAX_IN_FLIGHT,
        is_for_one: bool = False,
    ) -> None:
        self._runtime = runtime
        self._group_order = group_order
        self._max_run_requests = max_run_requests
        self._is_for_one = is_for_one
        self._jobs: list[Job] = []  # of which more is admitted to the plan of all
        self._plans: dict[RunningPlan, tuple[Sequence[Job], asyncio.Task[None]]] = {}
        self._planning: asyncio.Task[None] | None = None
        self._is_stale = False
        self._apart: dict[Job, asyncio.Task[None]] = {}  # that run alone, or wait for that
        self._alone: Job | None = None
        self._turn = asyncio.Lock()
        self._drained = asyncio.Event()
        self._ending: set[asyncio.Task[None]] = set()
        self.stats = JobStats()
        self.num_plans = 0
        self.num_lost_tokens = 0

    def make_job(self, runtime: Runtime, rows: JobRows, **options: Any) -> Job:
        """A job whose rows are planned together with those of the others. Called from anywhere.

        One that may have only so many requests in flight, rows that are suspected of killing engines, runs alone: an
        engine that dies meanwhile says something of these rows only.

        Args:
            runtime: As given.
            rows: The rows.
            **options: Further keyword arguments of `Job`.

        Raises:
            ValueError: This is another runtime.
        """
        if runtime is not self._runtime:
            raise ValueError("jobs that are planned together run on one runtime")
        return Job(self, rows, **options)

    # Who is in

    def join(self, job: Job) -> None:
        """Take a job in. It begins level with the one that has been served least."""
        if not job.num_left:
            return
        if job.max_in_flight is not None:
            self._apart[job] = asyncio.create_task(self._run_alone(job))
            return
        job.service = min((other.service for other in self._jobs), default=0)
        self._jobs.append(job)
        self._make_stale()

    def leave(self, job: Job) -> None:
        """Admit no more of a job, and take back what has not started. Doing it twice does nothing."""
        if job in self._jobs:
            self._jobs.remove(job)
            if job.num_left and self._jobs:
                self._make_stale()
        if not self._jobs:
            self._stop_planning()
        for plan, (jobs, _) in list(self._plans.items()):
            if all(other.has_left for other in jobs):
                self._close(plan)  # nobody wants what still runs
            elif job in jobs and job.num_left:
                self._withdraw(plan)
        if job in self._apart and not any(job in jobs for jobs, _ in self._plans.values()):
            self._cancel(self._apart[job])

    async def settle(self) -> None:
        """Wait until nothing goes on any more that has been cancelled."""
        if self._ending:
            await asyncio.wait(self._ending)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        if task is not asyncio.current_task() and not task.done():
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _fail(self, error: Exception) -> None:
        """Nobody gets anything any more, but for those that wait to run alone."""
        self._stop_planning()
        failed = {*self._jobs, *(job for jobs, _ in self._plans.values() for job in jobs)}
        self._jobs.clear()
        for plan in list(self._plans):
            self._close(plan)
        for job in failed:
            job.fail(error)

    # What is planned

    def _make_stale(self) -> None:
        self._is_stale = True
        if self._planning is None:
            self._planning = asyncio.create_task(self._plan_while_stale())

    def _stop_planning(self) -> None:
        self._is_stale = False
        if self._planning is not None:
            self._cancel(self._planning)
            self._planning = None

    async def _plan_while_stale(self) -> None:
        try:
            while self._is_stale:
                if not self._is_for_one:
                    await asyncio.sleep(_JOIN_PAUSE_S)
                self._is_stale = False
                await self._withdraw_all()
                # Again if a job has left meanwhile: its rows must not run.
                while jobs := [job for job in self._jobs if job.has_waiting and job.is_admitting]:
                    if await self._plan(jobs) is not None:
                        break
        except Exception as error:  # whatever it is: each job raises it, and would wait for ever if it did not
            self._fail(error)
        finally:
            if self._planning is asyncio.current_task():
                self._planning = None

    async def _withdraw_all(self) -> None:
        """Take back what has not started, and wait until all of it is here."""
        for plan, (jobs, _) in list(self._plans.items()):
            if self._alone not in jobs:
                self._withdraw(plan)
        unsettled = [plan for plan in self._plans if plan.is_withdrawn and not plan.is_settled]
        if not unsettled:
            return
        # Messages are handled in the order in which they were sent. When a request that was sent behind the withdrawal,
        # and withdrawn itself, is back, so is everything.
        await asyncio.gather(*(self._probe(engine) for engine in self._runtime.info.engine_numbers))
        for plan in unsettled:
            plan.is_settled = True

    async def _probe(self, engine: int) -> None:
        """Wait until an engine has handled all that it was sent, or is gone."""
        job_id = self._runtime.open_job()
        try:
            self._runtime.submit(job_id, _probe_of(engine))
            self._runtime.withdraw(job_id)
            is_over = False
            while not is_over:
                finished = await self._runtime.receive(job_id)
                is_over = bool(finished.positions) or (finished.lost is not None and finished.lost.number == engine)
        finally:
            self._runtime.close_job(job_id, is_complete=False)

    def _withdraw(self, plan: RunningPlan) -> None:
        """Doing it twice does nothing."""
        if plan.is_withdrawn:
            return
        plan.withdraw()
        if plan.is_done:
            self._close(plan)
        else:
            self._runtime.withdraw(plan.job_id)

    async def _plan(self, jobs: Sequence[Job], max_in_flight: int | None = None) -> RunningPlan | None:
        """Plan what waits of some jobs, and let it run; None where one of them admits no more by then."""
        started = time.perf_counter()
        parts, info = [job.part() for job in jobs], self._runtime.info
        # In a thread, whose kernels give the event loop its turn.
        plan = await asyncio.to_thread(JointPlan, parts, info, self._group_order)
        plan_s = time.perf_counter() - started
        self.num_plans += 1
        self.stats.plan_s += plan_s
        for job, prefixes in zip(jobs, plan.largest_prefixes, strict=True):
            job.stats.plan_s += plan_s / len(jobs)
            job.largest_prefixes = job.largest_prefixes or prefixes
        if self._is_for_one and max_in_flight is None and (step := largest_step(info, plan.plan)) is not None:
            started = time.perf_counter()
            await warm_up(self._runtime, step)
            jobs[0].stats.start_s += time.perf_counter() - started
        window = self._window(plan, max_in_flight or MAX_IN_FLIGHT)
        await asyncio.to_thread(give_memory_back)  # of a large plan it takes long
        if not all(job.is_admitting for job in jobs):
            return None
        self.num_lost_tokens += plan.plan.num_lost_tokens
        jobs[0].stats.num_cut_tokens += plan.num_cut_tokens
        running = RunningPlan(self._runtime.open_job(), plan, window)
        self._plans[running] = jobs, asyncio.create_task(self._read(running, jobs))
        self._feed(running, jobs)
        return running

    def _window(self, plan: JointPlan, max_in_flight: int) -> Window:
        info, cost, most = self._runtime.info, plan.cutter.kv_cost, self._max_run_requests
        if plan.units is None or info.engines is None:
            return FeedWindow(cost, info.kv_limit_tokens, max_run_requests=most, max_in_flight=max_in_flight)
        work, bounds = plan.units.work, plan.units.bounds
        return ReplicaFeed(cost, work, bounds, info.engines, max_run_requests=most, max_in_flight=max_in_flight)

    # Who runs alone

    async def _run_alone(self, job: Job) -> None:
        """Plan a job and let it run while nothing of the others is in flight."""
        try:
            async with self._turn:
                self._alone = job
                try:
                    self._drained.clear()
                    self._note_drained()
                    await self._drained.wait()
                    if (plan := await self._plan([job], job.max_in_flight)) is not None:
                        await asyncio.wait([self._plans[plan][1]])
                finally:
                    self._alone = None
                    self.feed()
        except Exception as error:  # as above
            job.fail(error)
        finally:
            del self._apart[job]

    def _note_drained(self) -> None:
        if not any(plan.num_in_flight for plan in self._plans):
            self._drained.set()

    # What runs

    def feed(self) -> None:
        """Submit what the windows have room for."""
        for plan, (jobs, _) in self._plans.items():
            self._feed(plan, jobs)

    def _feed(self, plan: RunningPlan, jobs: Sequence[Job]) -> None:
        if self._alone is not None and self._alone not in jobs:
            return
        while not any(job.is_behind or job.is_stopping for job in jobs) and (taken := plan.take_run()) is not None:
            requests, samples_of = taken
            for part, samples in samples_of:
                jobs[part].submit(samples, requests.engine)
            self._runtime.submit(plan.job_id, requests)

    async def _read(self, plan: RunningPlan, jobs: Sequence[Job]) -> None:
        """Deliver what comes back, and keep the window full."""
        try:
            while not plan.is_done:
                finished = await self._runtime.receive(plan.job_id)
                for delivery in plan.finish(finished):
                    job = jobs[delivery.part]
                    self.stats += delivery.stats
                    job.deliver(delivery)
                    if plan.is_settled and len(delivery.withdrawn) and job in self._jobs:
                        self._make_stale()  # it came too late for the plan
                for job in jobs:
                    job.keep_steps(finished.steps)
                self._feed(plan, jobs)
                self._note_drained()
        except Exception as error:  # as above
            self._fail(error)
        finally:
            self._close(plan)

    def _close(self, plan: RunningPlan) -> None:
        """Doing it twice does nothing."""
        if plan not in self._plans:
            return
        self._cancel(self._plans.pop(plan)[1])
        self._note_drained()
        self._runtime.close_job(plan.job_id, is_complete=plan.is_complete)


def single_job(
    runtime: Runtime,
    rows: JobRows,
    *,
    group_order: GroupOrder = DEFAULT_GROUP_ORDER,
    max_run_requests: int = MAX_IN_FLIGHT,
    **options: Any,
) -> Job:
    """A job that is planned by itself.

    Args:
        runtime: What runs it.
        rows: The rows.
        group_order: Order of sibling groups in the plan.
        max_run_requests: Most requests that one message carries.
        **options: Further keyword arguments of `Job`.
    """
    jobs = Jobs(runtime, group_order=group_order, max_run_requests=max_run_requests, is_for_one=True)
    return Job(jobs, rows, **options)


def _probe_of(engine: int) -> RunRequests:
    """A request that says, by coming back, that all before it has been handled. It costs a token if it runs at all."""
    table = TokenTable.from_lists([[0]])
    cutter = RunCutter(plan_batch(table), table, np.ones(1, np.int32))
    return RunRequests(
        run=cutter.cut(0, 1),
        sampling=(SamplingParams(max_new_tokens=1),),
        sampling_index=[0],
        seeds=[0],
        namespaces=None,
        engine=engine,
    )
