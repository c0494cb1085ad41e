"""An engine that computes nothing, as a `Runtime`: for tests and measurements of what stands above the seam.

It answers every request that is outstanding, with one token, as soon as somebody waits for it. A subclass says
otherwise by overriding `before_answers`, `choose`, `answer`, `has_started` and `counters`.

INVARIANT: every request comes back once, answered or withdrawn, unless its job is closed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo
from batchllm.request import Completion, SamplingParams
from batchllm.scheduler.counters import JobCounters
from batchllm.trace.steps import STEP_DTYPE

T = TypeVar("T")
_NUM_TURNS = 10
"""Turns of the event loop that a step takes: an engine's step is longer than what the driver does with its answers."""
_WAIT_S = 0.001


class FakeRequest:
    """A request as it has reached the runtime.

    Attributes:
        position: Its position in the plan.
    """

    __slots__ = ("_job", "_number", "_submitted", "position")

    def __init__(self, job: FakeJob, submitted: _Submitted, number: int) -> None:
        self._job = job
        self._submitted = submitted
        self._number = number
        self.position = submitted.requests.run.first_position + number

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        run, start = self._submitted.requests.run, self._submitted.starts[self._number]
        private: tuple[int, ...] = tuple(run.private_tokens[start : start + run.private_len[self._number]].tolist())
        return self._job.prefixes[int(run.request_prefix[self._number])] + private

    @property
    def seed(self) -> int:
        """Sampling seed."""
        return self._submitted.requests.seeds[self._number]

    @property
    def sampling(self) -> SamplingParams:
        """How it is sampled."""
        requests = self._submitted.requests
        return requests.sampling[requests.sampling_index[self._number]]

    @property
    def max_new_len(self) -> int:
        """Most tokens that it may generate."""
        return int(self._submitted.requests.run.request_max_new_len[self._number])

    @property
    def namespace(self) -> str:
        """Name of its namespace."""
        namespaces = self._submitted.requests.namespaces
        return namespaces[self._number] if namespaces else ""


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A run, and where the private tokens of each of its requests start."""

    requests: RunRequests
    starts: list[int]


@dataclass(slots=True)
class FakeJob:
    """A job that is open.

    Attributes:
        prefixes: Token ids of each prefix, from the start, by its number; -1 is the empty one.
        outstanding: Requests by position, in the order in which they were submitted.
        withdrawn: Requests that come back next, as aborted.
        num_answered: Requests that have been answered.
        num_computed: Prompt tokens submitted, those of a shared prefix once.
    """

    prefixes: dict[int, tuple[int, ...]] = field(default_factory=lambda: {-1: ()})
    outstanding: dict[int, FakeRequest] = field(default_factory=dict)
    withdrawn: list[FakeRequest] = field(default_factory=list)
    num_answered: int = 0
    num_computed: int = 0


class FakeRuntime:
    """A `Runtime` of any number of jobs at once.

    Args:
        info: What it says of itself.
        tokenizer: Its tokenizer; None where the engine runs on token ids only.

    Attributes:
        info: As given.
        tokenizer: As given.
        jobs: Jobs that are open, by number.
        closed: Whether each job that was closed was complete.
        num_answered: Requests that have been answered, of all jobs.
    """

    def __init__(self, info: RuntimeInfo, tokenizer: Any = None) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.jobs: dict[int, FakeJob] = {}
        self.closed: list[bool] = []
        self.num_answered = 0
        self._numbers = itertools.count()

    # Hooks

    async def before_answers(self, job: FakeJob) -> None:
        """Called before requests of a job come back; some are outstanding. It may wait, or raise EngineDiedError."""

    def choose(self, job: FakeJob) -> list[FakeRequest]:
        """Which requests finish next, together."""
        return list(job.outstanding.values())

    def answer(self, request: FakeRequest) -> Completion:
        """What a request is answered with."""
        return Completion(
            index=0,
            text="An answer.",
            output_ids=[7],
            finish_reason="length",
            prompt_tokens=len(request.prompt),
            cached_tokens=0,
        )

    def has_started(self, place: int) -> bool:
        """Whether the outstanding request of this place, in their order, runs on when its job is withdrawn."""
        return place < 1

    def counters(self, job: FakeJob) -> JobCounters:
        """What is said of a job with its answers."""
        return JobCounters(num_computed_prompt_tokens=job.num_computed, peak_kv_tokens=1)

    # The seam

    def open_job(self) -> int:
        job_id = next(self._numbers)
        self.jobs[job_id] = FakeJob()
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        job, run = self.jobs[job_id], requests.run
        start = 0
        prefix_lens = (run.prefix_end_len - run.prefix_start_len).tolist()
        for i, (parent, length) in enumerate(zip(run.prefix_parent.tolist(), prefix_lens, strict=True)):
            own = tuple(run.prefix_tokens[start : start + length].tolist())
            job.prefixes[run.first_prefix + i] = job.prefixes[parent] + own
            start += length
        submitted = _Submitted(requests, (np.cumsum(run.private_len) - run.private_len).tolist())
        for i in range(len(run)):
            job.outstanding[run.first_position + i] = FakeRequest(job, submitted, i)
        job.num_computed += len(run.private_tokens) + len(run.prefix_tokens)

    async def receive(self, job_id: int) -> FinishedRequests:
        job = self.jobs[job_id]
        for _ in range(_NUM_TURNS):
            await asyncio.sleep(0)
        while not job.outstanding and not job.withdrawn:
            await asyncio.sleep(_WAIT_S)
        await self.before_answers(job)
        finished, job.withdrawn = job.withdrawn, []
        if finished:
            completions = [_withdrawn(request) for request in finished]
        else:
            finished = self.choose(job)
            for request in finished:
                del job.outstanding[request.position]
            completions = [self.answer(request) for request in finished]
            job.num_answered += len(finished)
            self.num_answered += len(finished)
        return FinishedRequests(
            positions=[request.position for request in finished],
            completions=completions,
            counters=self.counters(job),
            steps=np.zeros(1, STEP_DTYPE),
        )

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(stream))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    def withdraw(self, job_id: int) -> None:
        job = self.jobs[job_id]
        for place, request in enumerate(list(job.outstanding.values())):
            if not self.has_started(place):
                job.withdrawn.append(job.outstanding.pop(request.position))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        del self.jobs[job_id]
        self.closed.append(is_complete)

    def give_planned(self, share: float) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _withdrawn(request: FakeRequest) -> Completion:
    return Completion(
        index=0,
        text="",
        output_ids=[],
        finish_reason="abort",
        prompt_tokens=len(request.prompt),
        cached_tokens=0,
        error="withdrawn",
    )
