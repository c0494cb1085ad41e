"""Runs a job to its end: every row of the input gets its result, recorded once, whatever dies on the way.

Rows come in as a stream and results go to the journal; what is needed between is columns, and heads of rows on disk. An
engine that dies is started again.

Knows the rooms below and the order of things; not how an engine is started, or what a file looks like.

INVARIANT: a row is run only if it has no result, and never while another engine runs it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from batchllm.dataset import BadRow, Row, RowHead, find_abort, reject
from batchllm.errors import ConfigError, EngineDiedError, EngineError, RowError, WorkloadError
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.ingest import Ingest
from batchllm.offline.job import FinishedSamples, Job, JobMaker, RunningJob
from batchllm.offline.job_rows import JobRows
from batchllm.offline.journal import Journal
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.recovery import RestartLimit, Work, WorkQueue
from batchllm.offline.row_spool import RowSpool
from batchllm.offline.runtime import Runtime, RuntimeInfo
from batchllm.offline.stats import JobStats
from batchllm.offline.stop import StopSignal
from batchllm.offline.token_store import TokenMemory, TokenStore
from batchllm.planner import DEFAULT_GROUP_ORDER, GroupOrder
from batchllm.planner.shards import split_by_prefix
from batchllm.request import Completion
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


class Runner:
    """One run of a job.

    Args:
        start_engine: Starts what answers; called again after a death.
        journal: Has the results of earlier runs.
        recorder: Takes the results.
        progress: Told what goes on.
        stop: Asked whether to stop.
        folder: For what does not fit in memory.
        options: How to run it.
        make_job: Makes a job of rows that run together: one of its own, or part of a plan that others are in too.

    Attributes:
        runtime: The engine of the moment; None before the first has started.
        info: Its numbers.
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
        make_job: JobMaker = Job,
    ) -> None:
        self._start_engine = start_engine
        self._journal = journal
        self._recorder = recorder
        self._progress = progress
        self._stop = stop
        self._options = options
        self._make_job = make_job
        self._spool = RowSpool(folder)
        self._store = TokenStore(folder, options.max_token_bytes, options.token_memory)
        self._identical = IdenticalRows() if options.shares_answers else None
        self._samples: dict[int, list[Completion]] = {}
        self._optimal_lens: Counter[int] = Counter()
        self._num_tries: Counter[int] = Counter()
        self._to_retry: list[int] = []
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
            self._progress.set_state("reading")
            ingest = Ingest(np.sort(self._journal.finished()), self._recorder.fail, self._spool)
            pending = ingest.take_pending(rows)
            first = next(pending, None)
            if first is not None:
                self._start()
            self._journal.forget_aside()
            if first is not None:
                job_rows, works = self._take_in(ingest, chain([first], pending))
            self.num_rows = ingest.num_rows
            self._progress.set_num_rows(ingest.num_rows)
            self._journal.note("num_rows", ingest.num_rows)
            self._recorder.commit()
            if first is not None:
                self._run_works(job_rows, works)
                self._recorder.commit()
            return self._journal.num_rows == self.num_rows
        except (EngineError, KeyboardInterrupt, MemoryError, WorkloadError):
            self._recorder.commit()  # what is there is good
            raise
        finally:
            if self.runtime is not None:
                self.runtime.shutdown()

    def close(self) -> None:
        """Give temporary files back."""
        self._spool.close()
        self._store.close()

    # Rows in

    def _take_in(self, ingest: Ingest, pending: Iterator[Row]) -> tuple[JobRows, list[Work]]:
        started = time.perf_counter()
        self._progress.set_state("reading")
        assert self.runtime is not None
        job_rows = JobRows(self.runtime.info, self.runtime.tokenizer, self._store, self._identical)
        is_out = ingest.load(pending, job_rows, self._progress.tick)
        if self._identical is not None:
            self._identical.find(np.flatnonzero(~is_out))
            is_out |= self._identical.is_follower
        self.stats.read_s = ingest.read_s
        self.stats.tokenize_s = time.perf_counter() - started - ingest.read_s
        return job_rows, self._first_works(job_rows, is_out)

    def _first_works(self, job_rows: JobRows, is_out: np.ndarray) -> list[Work]:
        left = np.flatnonzero(~is_out)
        if not self._store.is_spilled:
            return [Work(rows=None if len(left) == len(is_out) else left)] if len(left) else []
        started = time.perf_counter()
        assert self.runtime is not None
        everything = np.arange(len(job_rows))
        memory = self._options.token_memory
        max_shard_bytes = self._options.max_token_bytes if memory is None else memory.max_shard_bytes
        shards = split_by_prefix(
            self._store,
            max_shard_tokens=max_shard_bytes // 4,
            namespaces=job_rows.per_prompt(job_rows.namespace(everything)),
            num_samples=job_rows.per_prompt(job_rows.num_samples(everything) // job_rows.num_prompts),
            page_size=self.runtime.info.page_size,
        )
        self.num_shards = shards.num_shards
        self.num_lost_tokens = shards.num_lost_tokens
        self.stats.plan_s += time.perf_counter() - started
        row_shard = shards.row_shard[job_rows.first_prompt]  # a row with several prompts goes where its first one does
        chosen = [left[row_shard[left] == shard] for shard in range(shards.num_shards)]
        return [Work(rows=rows) for rows in chosen if len(rows)]

    # Rows through the engine

    def _start(self) -> None:
        self._progress.set_state("starting")
        started = time.perf_counter()
        try:
            self.runtime = self._start_engine()
        finally:
            self.stats.start_s += time.perf_counter() - started
        self.info = self.runtime.info

    def _run_works(self, job_rows: JobRows, works: list[Work]) -> None:
        self.started_at = time.monotonic()
        self._is_done = np.zeros(len(job_rows), bool)
        queue = WorkQueue(works)
        while (work := queue.take()) is not None and not self._stop.is_set:
            self._run_work(job_rows, work, queue)
            if self._to_retry:
                queue.add(np.array(self._to_retry, np.int64))
                self._to_retry = []

    def _run_work(self, job_rows: JobRows, work: Work, queue: WorkQueue) -> None:
        assert self.runtime is not None
        self._progress.set_state("running")
        job = self._make_job(
            self.runtime,
            job_rows,
            subset=work.rows,
            group_order=self._options.group_order,
            max_in_flight=work.max_in_flight,
            keep_steps=self._options.keep_steps,
        )
        try:
            with self._stop.heeded():
                self._run_job(job, job_rows)
        except EngineDiedError as death:
            rows = np.arange(len(job_rows)) if work.rows is None else work.rows
            unfinished = np.setdiff1d(rows[~self._is_done[rows]], self._to_retry)
            self._recover(death, queue.split_after_death(work, unfinished, job.rows_in_flight()))
        finally:
            self._samples.clear()  # of rows that have not finished; they run whole again
            self._optimal_lens.clear()
            # Those are of attempts; rows are counted when they get their result.
            self.stats += replace(job.stats, num_prompt_tokens=0, num_output_tokens=0, num_optimal_prompt_tokens=0)
            self.steps += job.steps or []

    def _run_job(self, job: RunningJob, job_rows: JobRows) -> None:
        assert self.runtime is not None
        for finished in self.runtime.iterate(job.run()):
            self._take(finished, job_rows)
            self._recorder.commit_if_due()
            self._progress.tick()
            if self._stop.is_overdue:
                job.give_up()
            elif self._stop.is_set and not job.is_stopping:
                self._progress.set_state("stopping")
                job.stop_admitting()
        self._recorder.commit()  # it may be long until the next rows finish

    def _recover(self, death: EngineDiedError, poison: list[int]) -> None:
        """Record what the engine's death has settled, and start another."""
        assert self.runtime is not None
        self._journal.event("engine_death", str(death))
        for row in poison:
            error = RowError(f"the engine died each time this row ran alone: {death}", code="engine_died")
            self._fail(row, reject(self._spool.read(row), error, status_code=500))
            self.restarts.condemned()
        self._recorder.commit()
        self.runtime.shutdown()
        self._progress.set_state("starting")
        reason: EngineError = death
        while True:
            time.sleep(self.restarts.next_pause_s(reason))
            self._progress.set_num_engine_restarts(self.restarts.num_deaths)
            try:
                self._start()
                return
            except EngineError as error:  # e.g. a device whose memory is not free yet
                reason = error

    # Answers out

    def _take(self, finished: FinishedSamples, job_rows: JobRows) -> None:
        self._progress.update(
            num_computed=finished.num_computed_prompt_tokens,
            num_prompt_tokens=finished.num_prompt_tokens,
            num_output_tokens=finished.num_output_tokens,
        )
        num_samples = job_rows.num_samples(np.array(finished.rows, np.int64)).tolist()
        answered: list[tuple[int, RowHead, list[Completion]]] = []
        for row, sample, completion, optimal_len, num in zip(
            finished.rows, finished.samples, finished.completions, finished.optimal_lens, num_samples, strict=True
        ):
            self._optimal_lens[row] += optimal_len
            if num == 1:
                answered.append((row, self._spool.read(row), [completion]))
                continue
            samples = self._samples.setdefault(row, [])
            samples.append(msgspec.structs.replace(completion, sample=sample))
            if len(samples) == num:
                answered.append((row, self._spool.read(row), self._samples.pop(row)))
        if self.info is not None and self.info.parses_answers:
            self._parse([(head, completions) for _, head, completions in answered if head.kind == "chat"])
        for row, head, completions in answered:
            self._finish(row, head, completions)

    def _parse(self, chats: list[tuple[RowHead, list[Completion]]]) -> None:
        """Look the answers to chats through for reasoning and tool calls."""
        assert self.runtime is not None and self.runtime.tokenizer is not None
        parsed = iter(
            self.runtime.tokenizer.parse_answers(
                [(head.chat or {}, completion) for head, completions in chats for completion in completions]
            )
        )
        for _, completions in chats:
            completions[:] = [next(parsed) for _ in completions]

    def _finish(self, row: int, head: RowHead, completions: list[Completion]) -> None:
        assert self.info is not None
        bad = find_abort(head, completions)
        optimal_len = self._optimal_lens.pop(row)
        if bad is not None and bad.status_code >= 500 and self._num_tries[row] < self._options.num_retries:
            self._num_tries[row] += 1
            self._to_retry.append(row)
            return
        self.stats.num_optimal_prompt_tokens += optimal_len
        self.stats.num_prompt_tokens += sum([completion.prompt_tokens for completion in completions])
        self.stats.num_output_tokens += sum([completion.completion_tokens for completion in completions])
        if bad is not None:
            self._fail(row, bad)
            return
        for number in self._with_followers(row):
            head = head if number == row else self._spool.read(number)
            self._recorder.answer(
                head,
                completions,
                model=self.info.model_name,
                decode=self._decode,
                decode_prompt=self._decode_prompt,
            )
            self._is_done[number] = True
        self.restarts.answered()

    def _fail(self, row: int, bad: BadRow) -> None:
        for number in self._with_followers(row):
            head = self._spool.read(number)
            self._is_done[number] = True
            own: dict[str, Any] = {
                "kind": head.kind,
                "given_id": head.given_id,
                "line": head.line,
                "carried": head.carried,
            }
            self._recorder.fail(replace(bad, index=head.position, **own))

    def _with_followers(self, row: int) -> list[int]:
        return [row] if self._identical is None else [row, *self._identical.followers(row)]

    def _decode(self, token_id: int) -> bytes | str:
        assert self.runtime is not None
        if self.runtime.tokenizer is None:
            raise ConfigError("--skip-tokenizer-init: OpenAI rows with logprobs need a tokenizer")
        return self.runtime.tokenizer.decode_token(token_id)

    def _decode_prompt(self, ids: Sequence[int]) -> str:
        assert self.runtime is not None
        if self.runtime.tokenizer is None:
            raise ConfigError("--skip-tokenizer-init: rows with echo need a tokenizer")
        return self.runtime.tokenizer.decode(ids)
