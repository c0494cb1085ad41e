"""How planned requests come into the scheduler and leave it. Runs in the scheduler's process.

(Upstream: ``srt/managers/scheduler.py``.) They wait in a window of their own, in plan order. Knows jobs, the window,
aborts. Must not know which request runs next.

INVARIANT: a planned request is in the window, or compiles its grammar, or holds KV, or has been answered; each is
answered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from batchllm.scheduler.counters import JobCounters
from batchllm.scheduler.decision import SettledDecision
from batchllm.scheduler.window import RequestWindow
from batchllm.srt.constrained.grammars import hold_stops
from batchllm.srt.managers.io_struct import PlannedAbortReqInput, PlannedCloseReqInput, PlannedRunReqInput
from batchllm.srt.managers.planned_run import RunReader
from batchllm.srt.managers.schedule_batch import PlannedReq

_GIVEN_UP = "it was taken back before it had finished"


@dataclass(slots=True)
class _Job:
    counters: JobCounters = field(default_factory=JobCounters)
    unfinished: dict[int, PlannedReq] = field(default_factory=dict)
    is_closed: bool = False


class PlannedJobs:
    """What of each job is still to be answered, what it has cost, and whether it is closed.

    A job is here from its first request until it is closed *and* its last request has been answered, in whichever order
    that happens; `take_ended` says so once.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, _Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def open(self, job_id: int) -> None:
        """Requests of this job arrive. Does nothing for a job that is known."""
        self._jobs.setdefault(job_id, _Job())

    def add(self, req: PlannedReq) -> None:
        """This request of an open job has arrived."""
        self._jobs[req.job_id].unfinished[req.position] = req

    def finish(self, req: PlannedReq) -> JobCounters:
        """This request has been answered. Returns its job's counters."""
        job = self._jobs[req.job_id]
        del job.unfinished[req.position]
        return job.counters

    def close(self, job_id: int) -> None:
        """No request of this job will arrive any more. Does nothing for a job that is not known."""
        if job_id in self._jobs:
            self._jobs[job_id].is_closed = True

    def take_ended(self, job_id: int) -> bool:
        """Forget the job if it is closed and all of it has been answered; whether it is gone now."""
        job = self._jobs.get(job_id)
        if job is None or job.unfinished or not job.is_closed:
            return False
        del self._jobs[job_id]
        return True

    def unfinished(self, job_id: int | None = None) -> list[PlannedReq]:
        """Requests not yet answered, of one job or of all."""
        jobs: Iterator[_Job] | list[_Job] = iter(self._jobs.values())
        if job_id is not None:
            jobs = [self._jobs[job_id]] if job_id in self._jobs else []
        return [req for job in jobs for req in job.unfinished.values()]

    def any_unfinished(self) -> bool:
        """Whether any request has not been answered."""
        return any(job.unfinished for job in self._jobs.values())

    def counters(self, job_id: int) -> JobCounters:
        """What this job has cost so far."""
        return self._jobs[job_id].counters

    def all_counters(self) -> list[JobCounters]:
        """Counters of every job."""
        return [job.counters for job in self._jobs.values()]


class PlannedIntake:
    """Takes the requests of jobs, and answers each of them once.

    Args:
        scheduler: A `BatchScheduler`.
        runs: Makes requests of what the driver sends.
        settled: Forgets the last decision where something changes.

    Attributes:
        window: Planned requests that have not started.
        jobs: What of each job is still to be answered.
    """

    def __init__(self, scheduler: Any, runs: RunReader, settled: SettledDecision) -> None:
        self._scheduler = scheduler
        self._runs = runs
        self._settled = settled
        self.window: RequestWindow[PlannedReq] = RequestWindow()
        self.jobs = PlannedJobs()

    # In

    def take_run(self, message: PlannedRunReqInput) -> None:
        """Take the next requests of a job into the window."""
        self.jobs.open(message.job_id)
        self._scheduler.shared_prefixes.drop_released()
        for req in self._runs.read(message):
            self._take_in(req)
        self._settled.invalidate()

    def _take_in(self, req: PlannedReq) -> None:
        scheduler = self._scheduler
        self.jobs.add(req)
        if scheduler.enable_priority_scheduling:
            scheduler._set_or_validate_priority(req)
        if req.to_finish is None:
            req.is_ready = not scheduler.grammar_manager.process_req_with_grammar(req)
        if req.to_finish is not None:
            self.abort_waiting([req])
        else:
            self._hold_stops(req)
            self.window.add(req)

    def _hold_stops(self, req: PlannedReq) -> None:
        """A grammar that is there goes on for as long as the request must."""
        if req.is_ready and req.grammar is not None and req.min_new_len:
            ends = {*(req.sampling_params.stop_token_ids or ()), *(req.eos_token_ids or ()), req.tokenizer.eos_token_id}
            ends |= req.tokenizer.additional_stop_token_ids or set()
            known = [i for i in ends if i is not None and i < self._scheduler.model_config.vocab_size]
            hold_stops(req.grammar, known, req.min_new_len)

    def take_back(self, req: PlannedReq, *, is_retracted: bool) -> None:
        """A planned request enters the window again: retracted, preempted, or with its grammar compiled."""
        if req.finished():  # aborted while its grammar was being compiled
            return
        self._settled.invalidate()
        if is_retracted:
            self.jobs.counters(req.job_id).num_retractions += 1
            self._scheduler.step_recorder.num_retracted += 1
            self.window.add(req)
        elif req.is_ready:  # preempted
            self.window.add(req)
        elif req.to_finish is not None:  # its grammar does not compile
            self.window.remove([req])
            self.abort_waiting([req])
        else:
            req.is_ready = True
            self._hold_stops(req)

    # Out

    def abort_job(self, message: PlannedAbortReqInput) -> None:
        """Drop what is left of a job."""
        reqs = self.jobs.unfinished(message.job_id)
        if message.spares_running:
            chunked = self._scheduler.chunked_req
            reqs = [req for req in reqs if req is not chunked and req.req_pool_idx is None]
        self.abort(reqs)

    def close_job(self, message: PlannedCloseReqInput) -> None:
        """Forget a job as soon as every request of it has been answered; none will come."""
        self.jobs.close(message.job_id)
        self._forget_ended(message.job_id)

    def _forget_ended(self, job_id: int) -> None:
        if self.jobs.take_ended(job_id):
            scheduler = self._scheduler
            scheduler.output_lengths.forget(job_id)
            scheduler.tree_cache.release_job(job_id)
            if not self.jobs:
                scheduler.tree_cache.free_withdrawn()
            self._settled.invalidate()

    def abort(self, reqs: list[PlannedReq]) -> None:
        """Drop these, wherever they are."""
        waiting: list[PlannedReq] = []
        for req in reqs:
            if req is self._scheduler.chunked_req:
                self._scheduler._pending_chunked_abort_req = req
            elif req.req_pool_idx is not None:
                req.to_finish = FINISH_ABORT(_GIVEN_UP)  # taken up when its running step is done
            elif req.finished_reason is None:
                req.to_finish = FINISH_ABORT(_GIVEN_UP)
                waiting.append(req)
        if waiting:
            self.window.remove(waiting)
            self.abort_waiting(waiting)

    def abort_waiting(self, reqs: list[PlannedReq]) -> None:
        """Finish requests that hold no KV, without running them. They come back together: there may be thousands."""
        for req in reqs:
            req.finished_reason, req.to_finish = req.to_finish, None
            self._scheduler.tree_cache.count_off(req)
        self._scheduler.output_streamer.send_finished(reqs)

    def finish(self, req: PlannedReq) -> JobCounters:
        """This request has been answered. Returns its job's counters."""
        counters = self.jobs.finish(req)
        self._settled.invalidate()
        if not isinstance(req.finished_reason, FINISH_ABORT):
            self._scheduler.output_lengths.finish(req.output, len(req.output_ids))
            counters.prediction.add(req.output, len(req.output_ids))
        self._forget_ended(req.job_id)
        return counters
