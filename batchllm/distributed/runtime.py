"""Several engines in Ray actors as one runtime.

An engine that dies takes its requests in flight along, which is said to the job; the others go on, and another engine
takes its place as soon as there is one. Engines that come late join. One whose node is about to go ends what it has
begun, and gives the rest back.

Knows: engines, their numbers, which is up. Must not know: what a plan is, which engine gets what, whose fault a death
is.

INVARIANT: what has come of an engine before it died is delivered before its death, and nothing afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from batchllm.distributed.actor import Software, Started
from batchllm.distributed.cluster import Cluster, ClusterLostError, Resources
from batchllm.distributed.replica import Replica
from batchllm.distributed.tokenizer import SpreadTokenizer
from batchllm.errors import BatchLLMError, ConfigError, EngineDiedError, EngineError
from batchllm.host.messages import CloseJob, GivePlanned, OpenJob, Submit, Withdraw
from batchllm.offline.event_loop import LoopThread, iterate_on, run_on
from batchllm.offline.recovery import MAX_FRUITLESS_DEATHS, RestartLimit
from batchllm.offline.runtime import FinishedRequests, LostEngine, RunRequests, Runtime, RuntimeInfo
from batchllm.scheduler.counters import JobCounters
from batchllm.trace.steps import STEP_DTYPE

T = TypeVar("T")
_WATCH_EVERY_S = 2.0
_NOTHING = FinishedRequests(positions=[], completions=[], counters=JobCounters(), steps=np.zeros(0, STEP_DTYPE))


@dataclass(slots=True)
class _OpenJob:
    """A job, and what each engine has counted for it."""

    outputs: asyncio.Queue[FinishedRequests | EngineError] = field(default_factory=asyncio.Queue)
    counters: dict[int, JobCounters] = field(default_factory=dict)


class ReplicatedRuntime:
    """Engines in Ray actors. Made in a thread without an event loop; jobs run on one of its own.

    Args:
        start: Starts an engine, in an actor's process.
        cluster: Where; closed with the runtime.
        resources: What each engine takes.
        num_engines: Engines that are to run.
        min_engines: Engines with which it begins; the others join when they are up.
        software: What is to be on every node; None: anything.
        tell: Told in words when an engine dies, or will not come.
        start_timeout_s: How long the first ones may take.

    Attributes:
        loop: The event loop on which jobs are fed and received.
        death: Why there will never be an engine again; None while there may be.

    Raises:
        ConfigError: A node has something else, or an engine takes no such argument.
        EngineError: So many engines do not start.
    """

    def __init__(
        self,
        start: Callable[[], Runtime],
        *,
        cluster: Cluster,
        resources: Resources,
        num_engines: int,
        min_engines: int | None = None,
        software: Software | None = None,
        tell: Callable[[str], None] = print,
        start_timeout_s: float = 1200.0,
    ) -> None:
        self._start, self._cluster, self._resources = start, cluster, resources
        self._num_engines, self._software, self._tell = num_engines, software, tell
        self._min_engines = num_engines if min_engines is None else min_engines
        self._numbers, self._job_numbers = itertools.count(), itertools.count()
        self._replicas: dict[int, Replica] = {}  # those that are up, or on the way
        self._engines: dict[int, int] = {}  # number -> KV limit of those that are up
        self._num_places_left = num_engines
        self._jobs: dict[int, _OpenJob] = {}
        self.death: EngineError | None = None
        self._enough: Future[Started] = Future()
        self._is_up = True
        self._kv_limit = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._loop_thread = LoopThread("batchllm-jobs")
        self.loop = self._loop_thread.loop
        try:
            run_on(self.loop, self._begin())
            started = self._wait_for_enough(start_timeout_s)
            if self._min_engines < num_engines:
                tell(
                    f"the job begins with {len(self._engines)} of {num_engines} replicas; others join when they are up"
                )
        except BaseException:
            self.end()
            raise
        self.info: RuntimeInfo = replace(
            started.info, kv_limit_tokens=self._kv_limit, num_engines=num_engines, engines=self._engines
        )
        self.tokenizer = SpreadTokenizer(self.loop, self._live) if started.has_tokenizer else None

    # Jobs, on the loop

    def open_job(self) -> int:
        if self.death is not None:
            raise self.death
        job_id = next(self._job_numbers)
        self._jobs[job_id] = _OpenJob()
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        replica = self._replicas[requests.engine]
        if job_id not in replica.jobs:
            replica.jobs.add(job_id)
            replica.send(OpenJob(job_id))
        replica.send(Submit(job_id, requests))

    async def receive(self, job_id: int) -> FinishedRequests:
        """As `Runtime.receive`.

        Raises:
            EngineDiedError: The connection to Ray is gone: with another one the job may go on.
            EngineError: No engine is left, and others would end as those have.
        """
        output = await self._jobs[job_id].outputs.get()
        if isinstance(output, EngineError):
            raise output
        return output

    def withdraw(self, job_id: int) -> None:
        for replica in self._replicas.values():
            if job_id in replica.jobs:
                replica.send(Withdraw(job_id))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        del self._jobs[job_id]
        for replica in self._replicas.values():
            if job_id in replica.jobs:
                replica.jobs.remove(job_id)
                replica.send(CloseJob(job_id, is_complete))

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        return iterate_on(self.loop, stream)

    def give_planned(self, share: float) -> None:
        self.loop.call_soon_threadsafe(self._give_planned, share)

    def _give_planned(self, share: float) -> None:
        for replica in self._live():
            replica.send(GivePlanned(share))

    # Live requests, from any thread

    @property
    def live_urls(self) -> dict[int, str]:
        """Where live requests are answered, by the number of the engine."""
        urls = {number: replica.live_url for number, replica in list(self._replicas.items())}
        return {number: url for number, url in urls.items() if url is not None and number in self._engines}

    def shutdown(self) -> None:
        """A job that has the engines for itself ends."""
        self.end()

    def end(self) -> None:
        """End all engines and the connection to Ray. Doing it twice does nothing."""
        if not self._is_up:
            return
        self._is_up = False
        try:
            run_on(self.loop, self._end())
        finally:
            self._loop_thread.close()
            self._cluster.close()

    def _wait_for_enough(self, timeout_s: float) -> Started:
        try:
            return self._enough.result(timeout_s)
        except TimeoutError:
            starting = [r.node for r in list(self._replicas.values()) if r.node is not None and r.started is None]
            num_waiting = sum(replica.node is None for replica in list(self._replicas.values()))
            reasons = [f"one on node {node} is still starting" for node in starting]
            if num_waiting:
                reasons.append(f"{num_waiting} wait for {self._resources.words} each, which the cluster has not free")
            raise EngineError(
                f"{len(self._engines)} of {self._min_engines} replicas came up within {timeout_s:.0f} s; "
                + "; ".join(reasons)
            ) from None

    # Engines, on the loop

    async def _begin(self) -> None:
        self._tasks = [asyncio.create_task(self._keep_place()) for _ in range(self._num_engines)]
        self._tasks.append(asyncio.create_task(self._watch_drains()))

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.shutdown() for replica in self._replicas.values()))

    async def _keep_place(self) -> None:
        """Keep one engine up: start it, and another one when it has died, as long as that makes sense."""
        # A row that kills engines takes two along alone, and there may be some of them.
        starting, running = RestartLimit(), RestartLimit(2 * MAX_FRUITLESS_DEATHS)
        try:
            while True:
                replica = Replica(
                    next(self._numbers),
                    self._cluster,
                    self._resources,
                    self._start,
                    self._software,
                )
                self._replicas[replica.number] = replica
                try:
                    self._join(replica, await replica.start())
                    starting.answered()
                    await self._read(replica, running)
                    self._leave(replica, "drained")
                    self._tell(f"replica {replica.number} has ended in good order: its node is about to go")
                    await replica.shutdown()
                except ConfigError:
                    raise
                except EngineError as death:
                    self._leave(replica, str(death))
                    replica.kill()
                    self._tell(f"replica {replica.number} is gone: {death}")
                    if not self._has_begun and self._num_engines == self._min_engines:
                        raise
                    if isinstance(death, ClusterLostError):
                        raise
                    limit = starting if replica.started is None else running
                    await asyncio.sleep(limit.next_pause_s(death))
                if not self._cluster.is_connected:
                    raise ClusterLostError("it was closed")
        except BatchLLMError as error:
            self._give_place_up(error)

    async def _watch_drains(self) -> None:
        """Have the engines of nodes that are about to go begin nothing more."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            try:
                nodes = await _in_thread(self._cluster.draining_nodes)
            except Exception as error:  # Ray's interface for this is not public: it may raise anything
                if not self._cluster.is_connected:
                    return
                self._tell(f"nodes that are drained are not noticed, and end as lost ones do: {error}")
                return
            for replica in self._live():
                if replica.started is not None and replica.started.node_id in nodes:
                    del self._engines[replica.number]
                    replica.drain()

    @property
    def _has_begun(self) -> bool:
        return self._enough.done()

    def _give_place_up(self, error: BatchLLMError) -> None:
        """There will be an engine less. Too few to begin with: that is the end; none at all: likewise."""
        self._num_places_left -= 1
        if self._has_begun:
            self._tell(f"a replica less, {self._num_places_left} are left: {error}")
        if not self._has_begun:
            if self._num_places_left < self._min_engines:
                self._enough.set_exception(error)
            return
        if self._num_places_left == 0:
            kind = EngineDiedError if isinstance(error, ClusterLostError) else EngineError
            self.death = kind(f"no engine is left: {error}")
            for job in self._jobs.values():
                job.outputs.put_nowait(self.death)

    def _join(self, replica: Replica, started: Started) -> None:
        """An engine is up. Jobs are told by an empty message that there is somebody to feed.

        Raises:
            EngineError: It has less KV than rows have been promised.
        """
        limit = started.info.kv_limit_tokens
        if self._has_begun and limit < self._kv_limit:
            raise EngineError(
                f"an engine that came late has room for {limit} KV tokens, and the first had for {self._kv_limit}: "
                f"give all as many, --max-total-tokens"
            )
        self._engines[replica.number] = limit
        if not self._has_begun and len(self._engines) >= self._min_engines:
            self._kv_limit = min(self._engines.values())
            self._enough.set_result(started)
        for number, job in self._jobs.items():
            self._deliver(number, job, _NOTHING)

    def _leave(self, replica: Replica, reason: str) -> None:
        """An engine is gone. Of one that was draining no request is to blame."""
        del self._replicas[replica.number]
        self._engines.pop(replica.number, None)
        for number in replica.jobs & self._jobs.keys():
            lost = LostEngine(replica.number, reason, is_clean=replica.is_draining)
            self._deliver(number, self._jobs[number], replace(_NOTHING, lost=lost))

    async def _read(self, replica: Replica, limit: RestartLimit) -> None:
        """Hand on what an engine says, until it is drained; tell the limit that it answers.

        Raises:
            EngineError: It is gone.
        """
        while outputs := await replica.receive():
            for output in outputs:
                if isinstance(output, EngineDiedError):
                    raise output
                number, finished = output
                if any(completion.finish_reason != "abort" for completion in finished.completions):
                    limit.answered()
                if (job := self._jobs.get(number)) is not None:  # else it has been closed
                    job.counters[replica.number] = finished.counters
                    self._deliver(number, job, _answered(finished) if replica.is_draining else finished)

    def _deliver(self, number: int, job: _OpenJob, finished: FinishedRequests) -> None:
        counters = sum(job.counters.values(), JobCounters())
        job.outputs.put_nowait(replace(finished, counters=counters))

    def _live(self) -> list[Replica]:
        return [replica for number, replica in self._replicas.items() if number in self._engines]


async def _in_thread(function: Callable[[], T]) -> T:
    """What a function returns that may block for ever, as Ray does without its head: nobody waits for its thread."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def call() -> None:
        try:
            result.set_result(function())
        except Exception as error:  # it is the caller's
            result.set_exception(error)

    threading.Thread(target=call, name="batchllm-ray", daemon=True).start()
    return await asyncio.wrap_future(result)


def _answered(finished: FinishedRequests) -> FinishedRequests:
    """What has been answered. What has been aborted has not begun, or fails again elsewhere."""
    kept = [i for i, completion in enumerate(finished.completions) if completion.finish_reason != "abort"]
    return replace(
        finished,
        positions=[finished.positions[i] for i in kept],
        completions=[finished.completions[i] for i in kept],
    )
