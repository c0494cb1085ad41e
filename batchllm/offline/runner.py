"""Runs a job to its end: every row of the input gets its result, recorded once, whatever dies on the way.

Rows come in as a stream and results go to the journal; what is needed between is columns, and heads of rows on disk. An
engine that dies is started again.

Knows the rooms below and the order of things; not how an engine is started, or what a file looks like.

INVARIANT: a row is run only if it has no result, and never while another engine runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from batchllm.dataset import BadRow, Row, reject
from batchllm.errors import BatchLLMError, ConfigError, EngineDiedError, EngineError, RowError, WorkloadError
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.ingest import Ingest, Intake
from batchllm.offline.job import Job, JobMaker
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import single_job
from batchllm.offline.journal import Journal
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Answers, Recorder
from batchllm.offline.recovery import RestartLimit, Work, WorkQueue
from batchllm.offline.row_spool import RowSpool
from batchllm.offline.runtime import Runtime, RuntimeInfo
from batchllm.offline.stats import JobStats
from batchllm.offline.stop import StopSignal
from batchllm.offline.token_store import TokenMemory, TokenStore
from batchllm.planner import DEFAULT_GROUP_ORDER, GroupOrder
from batchllm.trace.steps import StepArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a job is run; none of it changes an answer."""

    num_retries: int = 0
    """Times that a row which fails while it runs is run again, unless it is at fault itself."""
    shares_answers: bool = False
    """Run rows that must have the same answer once (`batchllm.offline.identical`)."""
    max_token_bytes: int = 1 << 40
    """Token ids held in memory; a larger job is planned in shards."""
    token_memory: TokenMemory | None = None
    """Shared with other jobs; one that does not fit beside them is planned in shards too."""
    group_order: GroupOrder = DEFAULT_GROUP_ORDER
    keep_steps: bool = False
    """Keep what each forward step was like."""
    ends_engine: bool = True
    """End the engine with the run; if not, it is the caller's again, as `Runner.runtime`."""


class Runner:
    """One run of a job.

    Args:
        start_engine: Starts what answers; called again after a death.
        journal: Has the results of earlier runs.
        recorder: Takes the results.
        progress: Shows how far the job is.
        stop: Asked whether to stop.
        folder: For what does not fit in memory.
        options: How to run it.
        make_job: Makes a job of rows that run together; None: each is planned by itself.

    Attributes:
        runtime: The engine of the moment; None before the first has started.
        info: Numbers of that engine.
        restarts: Counts engines that died.
        stats: What this run has cost.
        steps: What each forward step was like, where that is kept.
        started_at: When the first batch began, on the monotonic clock.
        num_rows: Rows of the input.
        num_shards: Parts in which the job was planned.
        num_lost_tokens: Prompt tokens computed more than once because the job was planned in shards.
    """

    def __init__(
        self,
        start_engine: Callable[[], Runtime],
        *,
        journal: Journal,
        recorder: Recorder,
        progress: Progress,
        stop: StopSignal,
        folder: Path,
        options: RunOptions,
        make_job: JobMaker | None = None,
    ) -> None:
        self._start_engine = start_engine
        self._journal = journal
        self._recorder = recorder
        self._progress = progress
        self._stop = stop
        self._options = options
        self._make_job = make_job or partial(single_job, group_order=options.group_order)
        self._spool = RowSpool(folder)
        self._store = TokenStore(folder, options.max_token_bytes, options.token_memory)
        self.runtime: Runtime | None = None
        self.info: RuntimeInfo | None = None
        self.restarts = RestartLimit()
        self.stats = JobStats()
        self.steps: list[StepArray] = []
        self.started_at = 0.0
        self.num_rows = 0
        self.num_shards = 1
        self.num_lost_tokens = 0

    def run(self, rows: Iterable[Row | BadRow]) -> bool:
        """Run what has no result yet.

        Returns:
            Whether every row has a result now; else a signal has asked to stop.

        Raises:
            EngineError: The engine does not start, or dies again and again. Results stay safe, here and below.
            JournalError: The disk refuses.
            WorkloadError: The input cannot be read, or too many rows have failed.
        """
        try:
            self._run(rows)
            self._recorder.commit()
            return self._journal.num_rows == self.num_rows
        except (EngineError, KeyboardInterrupt, MemoryError, WorkloadError):
            self._recorder.commit()  # what is there is good
            raise
        finally:
            if self.runtime is not None and self._options.ends_engine:
                self.runtime.shutdown()

    def close(self) -> None:
        """Give temporary files back."""
        self._spool.close()
        self._store.close()

    def _run(self, rows: Iterable[Row | BadRow]) -> None:
        self._progress.set_state("reading")
        identical = IdenticalRows() if self._options.shares_answers else None
        ingest = Ingest(np.sort(self._journal.finished()), self._recorder.fail, self._spool, identical)
        intake = ingest.load(rows, lambda: self._begin(identical), self._progress.tick)
        if intake is None:
            self._journal.forget_aside()
        else:
            self.stats.read_s = ingest.read_s
            self.stats.tokenize_s = time.perf_counter() - self._begun_at - ingest.read_s
            works = self._works(intake)
        self.num_rows = ingest.num_rows
        self._progress.set_num_rows(ingest.num_rows)
        self._journal.note("num_rows", ingest.num_rows)
        self._recorder.commit()
        if intake is not None:
            job_rows, num_retries = intake.job_rows, self._options.num_retries
            self._answers = Answers(
                self._recorder, self._spool, identical, num_rows=len(job_rows), num_retries=num_retries
            )
            self._run_works(job_rows, WorkQueue(works))

    def _begin(self, identical: IdenticalRows | None) -> JobRows:
        """There is something to run: start what runs it, and take the rows in."""
        runtime = self._start()
        self._journal.forget_aside()
        self._progress.set_state("reading")
        self._begun_at = time.perf_counter()
        return JobRows(runtime.info, runtime.tokenizer, self._store, identical)

    def _works(self, intake: Intake) -> list[Work]:
        if not self._store.is_spilled:
            return [] if intake.left is not None and not len(intake.left) else [Work(rows=intake.left)]
        assert self.info is not None
        started = time.perf_counter()
        memory = self._options.token_memory
        max_bytes = self._options.max_token_bytes if memory is None else memory.max_shard_bytes
        shards, self.num_lost_tokens = intake.shards(max_bytes // 4, self.info.page_size)
        self.num_shards = len(shards)
        self.stats.plan_s += time.perf_counter() - started
        return [Work(rows=rows) for rows in shards]

    def _start(self) -> Runtime:
        self._progress.set_state("starting")
        started = time.perf_counter()
        try:
            self.runtime = self._start_engine()
        finally:
            self.stats.start_s += time.perf_counter() - started
        self.info = self.runtime.info
        return self.runtime

    def _run_works(self, job_rows: JobRows, queue: WorkQueue) -> None:
        self.started_at = time.monotonic()
        while (work := queue.take()) is not None and not self._stop.is_set:
            self._run_work(job_rows, work, queue)
            if retries := self._answers.take_retries():
                queue.add(np.array(retries, np.int64))

    def _run_work(self, job_rows: JobRows, work: Work, queue: WorkQueue) -> None:
        assert self.runtime is not None
        self._progress.set_state("running")
        job = self._make_job(
            self.runtime,
            job_rows,
            subset=work.rows,
            max_in_flight=work.max_in_flight,
            keep_steps=self._options.keep_steps,
        )
        try:
            with self._stop.heeded():
                self._run_job(job, self.runtime)
            if job.deaths:
                unfinished = self._answers.unfinished(work.rows)
                self._blame(job.deaths, queue.split_after_death(work, unfinished, job.rows_lost()))
            elif job.has_given_back:
                queue.add(self._answers.unfinished(work.rows))
        except EngineDiedError as death:
            if self._stop.is_set:  # the same signal may have ended both, and nothing more would run
                self._journal.event("engine_death", str(death))
                return
            unfinished = self._answers.unfinished(work.rows)
            suspects = np.union1d(job.rows_in_flight(), job.rows_lost())
            self._recover(death, queue.split_after_death(work, unfinished, suspects))
        finally:
            # Those are of attempts; rows are counted when they get their result.
            self.stats += replace(job.stats, num_prompt_tokens=0, num_output_tokens=0, num_optimal_prompt_tokens=0)
            self.stats += self._answers.take_stats()
            self.steps += job.steps or []

    def _run_job(self, job: Job, runtime: Runtime) -> None:
        for finished in runtime.iterate(job.run_rows()):
            samples = finished.of_samples
            self._progress.update(
                num_computed=samples.num_computed_prompt_tokens,
                num_prompt_tokens=samples.num_prompt_tokens,
                num_output_tokens=samples.num_output_tokens,
            )
            if self._answers.take(finished, runtime):
                self.restarts.answered()
            self._recorder.commit_if_due()
            self._progress.tick()
            if self._stop.is_overdue:
                job.give_up()
            elif self._stop.is_set and not job.is_stopping:
                self._progress.set_state("stopping")
                job.stop_admitting()
        self._recorder.commit()  # it may be long until the next rows finish

    def _condemn(self, death: str, poison: list[int]) -> None:
        """Record what an engine's death has settled."""
        self._journal.event("engine_death", death)
        for row in poison:
            error = RowError(f"the engine died each time this row ran alone: {death}", code="engine_died")
            self._answers.fail(row, reject(self._spool.read(row), error, status_code=500))
            self.restarts.condemned()
        self._recorder.commit()

    def _blame(self, deaths: list[str], poison: list[int]) -> None:
        """Engines have died while others went on, and others take their places: nothing is started here.

        Raises:
            EngineDiedError: It has been so again and again, and nothing was answered between.
        """
        for death in deaths[:-1]:
            self._condemn(death, [])
        self._condemn(deaths[-1], poison)
        self.restarts.num_deaths += len(deaths) - 1
        self.restarts.next_pause_s(EngineDiedError(deaths[-1]))
        self._progress.set_num_engine_restarts(self.restarts.num_deaths)

    def _recover(self, death: EngineDiedError, poison: list[int]) -> None:
        """Record what the engine's death has settled, and start another, unless nothing more is to run."""
        assert self.runtime is not None
        self._condemn(str(death), poison)
        self.runtime.shutdown()
        self._progress.set_state("starting")
        reason: BatchLLMError = death
        while not self._stop.is_set:
            time.sleep(self.restarts.next_pause_s(reason))
            self._progress.set_num_engine_restarts(self.restarts.num_deaths)
            try:
                self._start()
                return
            except (ConfigError, EngineError) as error:  # a device whose memory is not free yet, a Ray that restarts
                reason = error
