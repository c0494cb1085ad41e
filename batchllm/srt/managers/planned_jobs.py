"""Which planned requests of which job are still to be answered. Runs in the scheduler's process."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchllm.scheduler.counters import JobCounters
from batchllm.srt.managers.schedule_batch import PlannedReq


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

    def unfinished(self, job_id: int) -> list[PlannedReq]:
        """Requests of this job that are not yet answered; none for a job that is not known."""
        return list(self._jobs[job_id].unfinished.values()) if job_id in self._jobs else []

    def any_unfinished(self) -> bool:
        """Whether any request has not been answered."""
        return any(job.unfinished for job in self._jobs.values())

    def counters(self, job_id: int) -> JobCounters:
        """What this job has cost so far."""
        return self._jobs[job_id].counters

    def all_counters(self) -> list[JobCounters]:
        """Counters of every job."""
        return [job.counters for job in self._jobs.values()]
