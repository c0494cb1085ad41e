"""One batch on its way: validated, run, ended.

Knows the order of a batch's states and what each stage needs; not which batches run when, and not HTTP.

INVARIANT: every stage can be cut off anywhere and done again: the journal knows which rows are done, and the files of
results appear together with the status that names them.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from batchllm.dataset import BadRow, Row, read_rows
from batchllm.dataset.decompress import open_unwrapped
from batchllm.errors import BatchLLMError, ConfigError, EngineError, JournalError, WorkloadError
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.job import JobMaker
from batchllm.offline.journal import Journal
from batchllm.offline.recorder import Recorder
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.runtime import Runtime
from batchllm.offline.stop import StopSignal
from batchllm.offline.token_store import TokenMemory
from batchllm.request import SamplingParams
from batchllm.server.api_errors import is_disk_full
from batchllm.server.batch_activity import BatchActivity
from batchllm.server.batch_progress import BatchProgress
from batchllm.server.batch_results import record_missing, write_results
from batchllm.server.batch_store import BatchRecord, BatchStore
from batchllm.server.database import Database
from batchllm.server.file_store import FileStore
from batchllm.server.metrics import BatchMetrics
from batchllm.server.objects import ACTIVE_STATUSES, OUTPUT_PURPOSE
from batchllm.server.options import BatchOptions
from batchllm.server.placement import Placement
from batchllm.server.steady_clock import unix_now
from batchllm.server.validation import MAX_SHOWN, Verdict, validate

logger = logging.getLogger(__name__)

End = Literal["completed", "cancelled", "expired", "failed"]

SHUTDOWN, CRASH = "shutdown", "crash"
"""Why a batch is asked to stop, beside its own end: the server ends, or its engine has died."""
MAX_ATTEMPTS = 3
"""Times that a batch is begun without a row being recorded, before it is given up."""
_CRASH_LOOP = (
    f"the server or its engine ended {MAX_ATTEMPTS} times in a row while this batch was in progress, before one more "
    "of its rows had a result; one of those without a result, which are in the error file, may be what ends it"
)
_WHY_MISSING: dict[End, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "failed": ("batch_failed", "This request was not executed because the batch failed."),
}
_OUTPUT_FORMAT = "1"


class _StoppedError(WorkloadError):
    """Asked to stop while the input was being read."""


class _OtherModelError(WorkloadError):
    """The server has another model than the one that has answered a part of the batch."""


@dataclass(frozen=True, kw_only=True)
class BatchContext:
    """What all batches are run with."""

    options: BatchOptions
    database: Database
    files: FileStore
    batches: BatchStore
    start_engine: Callable[[], Runtime]
    make_job: JobMaker
    token_memory: TokenMemory
    metrics: BatchMetrics | None
    activity: BatchActivity = field(default_factory=BatchActivity)
    make_placement: Callable[[], Placement] | None = None

    def folder(self, batch_id: str) -> Path:
        """Where a batch has its journal."""
        return self.options.storage / "jobs" / batch_id


class BatchRun:
    """A batch's next stage (validated, run, or ended), in a thread of its own.

    Args:
        context: What it is run with.
        batch_id: Which batch.
        stop: Asks it to stop; what comes then is for the next stage.

    Attributes:
        has_trouble: It could not do what it should, through no fault of the batch; it is to be tried again later.
    """

    def __init__(self, context: BatchContext, batch_id: str, stop: StopSignal) -> None:
        self._context = context
        self._id = batch_id
        self._stop = stop
        self.has_trouble = False

    def run(self) -> None:
        """Do the stage."""
        try:
            batch = self._context.batches.need(self._id)
            if batch.status == "validating":
                self._validate(batch)
            else:
                self._go_on(batch)
        except _StoppedError:
            pass
        except EngineError as error:
            if self._stop.is_set:  # it was not waited for
                try:
                    self._leave()
                except sqlite3.Error as fault:
                    logger.warning("%s: that it was stopped cannot be recorded: %s", self._id, fault)
                return
            logger.error("%s: the engine has failed: %s", self._id, error)
            self.has_trouble = True
        except _OtherModelError as error:
            logger.error("%s: %s", self._id, error)
            self.has_trouble = True
        except (BatchLLMError, OSError, sqlite3.Error) as error:
            if is_disk_full(error):
                self._wait_for_room(error)
            else:
                self._give_up(error)
        except Exception:  # a mistake of ours must not end the thread unheard; it counts as a fruitless attempt
            logger.exception("%s: cannot be run", self._id)
            self.has_trouble = True
            told = _error("server_error", "the server made a mistake when it looked at the file; its log says more")
            self._context.batches.move(self._id, ("validating",), "failed", errors=[told])  # attempts are not counted

    # Validation

    def _validate(self, batch: BatchRecord) -> None:
        context = self._context
        if batch.expires_at <= unix_now():
            context.batches.move(batch.id, ("validating",), "expired")
            return
        verdict = validate(
            context.files.path(batch.input_file_id),
            endpoint=batch.endpoint,
            max_rows=context.options.max_rows,
            keep_on=lambda: not self._stop.is_set,
        )
        if verdict is None:
            return
        if verdict.errors:
            context.batches.move(batch.id, ("validating",), "failed", errors=_shown(verdict))
        else:
            context.batches.move(batch.id, ("validating",), "in_progress", num_rows=verdict.num_rows)

    # Running

    def _go_on(self, batch: BatchRecord) -> None:
        if batch.in_progress_at is None:  # cancelled before its file was found good
            self._context.batches.move(batch.id, ("cancelling",), "cancelled")
            return
        with self._open_journal() as journal:
            end = self._early_end(batch, journal)
            if end is None:
                end = self._run_rows(batch, journal)
            if end is None:
                return
            self._finish(end, journal)
        shutil.rmtree(self._context.folder(batch.id), ignore_errors=True)  # else the next start does it

    def _open_journal(self) -> Journal:
        folder = self._context.folder(self._id)
        if Journal.exists(folder):
            return Journal.open(folder)
        fingerprint = Fingerprint({"batch": self._id, "format": _OUTPUT_FORMAT})
        return Journal.create(folder, fingerprint=fingerprint, command={})

    def _early_end(self, batch: BatchRecord, journal: Journal) -> End | None:
        """How the batch ends although not all of it has run; None if it goes on."""
        if batch.status == "cancelling":
            return "cancelled"
        if batch.status == "finalizing" and journal.num_rows == batch.num_rows:
            return "completed"
        if batch.expires_at <= unix_now():
            return "expired"
        num_attempts = 1 if journal.num_rows > batch.num_done_at_attempt else batch.num_attempts + 1
        if num_attempts > MAX_ATTEMPTS:
            return "failed"
        self._context.batches.update(batch.id, num_attempts=num_attempts, num_done_at_attempt=journal.num_rows)
        return None

    def _run_rows(self, batch: BatchRecord, journal: Journal) -> End | None:
        """Run what has no result; returns how the batch ends, None if it goes on later."""
        context = self._context
        runtime = context.start_engine()
        model = runtime.info.model_name
        if journal.num_rows and batch.model not in (None, model):
            context.batches.update(batch.id, num_attempts=0)
            raise _OtherModelError(
                f"{batch.model} has answered a part of it, and this server has {model}: it waits until one with "
                "that model goes on with it, or it is cancelled"
            )
        num_failed = len(journal.failed())
        progress = BatchProgress(
            context.batches,
            batch.id,
            num_answered=journal.num_rows - num_failed,
            num_failed=num_failed,
            metrics=context.metrics,
        )
        context.batches.update(batch.id, model=model)
        folder = context.folder(batch.id)
        placement = None if context.make_placement is None else context.make_placement()
        with ExitStack() as stack:
            stack.callback(progress.show)
            recorder = Recorder(journal, None, progress, None, job_seed=_seed_of(batch.id))
            context.activity.begin(batch.id, recorder, is_first=journal.num_rows == 0)
            stack.callback(context.activity.end, batch.id)
            runner = Runner(
                context.start_engine,
                journal=journal,
                recorder=recorder,
                progress=progress,
                stop=self._stop,
                folder=folder,
                options=RunOptions(token_memory=context.token_memory),
                make_job=partial(
                    context.activity.make_job,
                    batch.id,
                    context.make_job,
                    on_submit=None if placement is None else placement.give,
                ),
            )
            stack.callback(runner.close)
            is_complete = runner.run(self._rows(batch, runtime.info.context_len, placement))
            if runner.num_shards > 1:
                logger.info(
                    "%s: its token ids did not fit in memory beside those of other batches (--batch-max-token-bytes); "
                    "it was planned in %d parts, which cost %d prompt tokens",
                    *(batch.id, runner.num_shards, runner.num_lost_tokens),
                )
        if is_complete:
            context.batches.move(batch.id, ("in_progress",), "finalizing")
            return "completed"
        self._leave()
        return None

    def _rows(self, batch: BatchRecord, context_len: int, placement: Placement | None) -> Iterator[Row | BadRow]:
        with open_unwrapped(self._context.files.path(batch.input_file_id)) as stream:
            # A chat row without a limit may use what the context leaves, as with OpenAI.
            for row in read_rows(stream, defaults=SamplingParams(), default_max_new_tokens=context_len):
                if self._stop.is_set:
                    self._leave()
                    raise _StoppedError("asked to stop")
                if placement is not None and isinstance(row, Row):
                    placement.add(row.index, row.request)
                yield row

    def _leave(self) -> None:
        """Stopped in good order, the batch is to blame for nothing."""
        if self._stop.name != CRASH:
            self._context.batches.update(self._id, num_attempts=0)

    # The end

    def _finish(self, end: End, journal: Journal, errors: list[dict[str, Any]] | None = None) -> None:
        """Make the files of results, and let them appear with the status, and with these errors of the batch."""
        context = self._context
        batch = context.batches.need(self._id)
        if batch.status == "cancelling":  # meanwhile
            end = "cancelled"
        if end != "completed":
            code, message = _WHY_MISSING[end]
            input_path = context.files.path(batch.input_file_id)
            if input_path.exists():  # else nobody knows the ids of the rows that are missing
                seed = _seed_of(batch.id)
                record_missing(journal, input_path, batch.num_rows, code=code, message=message, job_seed=seed)
        answers, failures = context.files.new_path(), context.files.new_path()
        placed: list[str] = []
        try:
            usage = self._write_results(journal, batch, answers, failures)
            ids = []
            for path in (answers, failures):
                ids.append(context.files.place(path) if path.stat().st_size else None)
                placed += [file_id for file_id in ids[-1:] if file_id is not None]
            failed_by_code = journal.failed_by_code()
            numbers = usage | {"failed_by_code": failed_by_code} | context.activity.totals(batch.id)
            self._commit(end, batch, ids, numbers, num_failed=sum(failed_by_code.values()), errors=errors)
            placed = []
        finally:
            answers.unlink(missing_ok=True)
            failures.unlink(missing_ok=True)
            for file_id in placed:
                context.files.drop(file_id)

    def _write_results(self, journal: Journal, batch: BatchRecord, answers: Path, failures: Path) -> dict[str, int]:
        try:
            return write_results(journal, answers, failures)
        except JournalError as error:
            if journal.num_rows == batch.num_rows:
                raise
            # Lines were not what had been recorded; without them the next stage runs their rows again.
            logger.error("%s: %s", self._id, error)
            raise _StoppedError("rows are missing again") from error

    def _commit(
        self,
        end: End,
        batch: BatchRecord,
        ids: list[str | None],
        usage: dict[str, Any],
        *,
        num_failed: int,
        errors: list[dict[str, Any]] | None,
    ) -> None:
        context = self._context
        with context.database.transaction():
            for file_id, what in zip(ids, ("output", "error"), strict=True):
                if file_id is not None:
                    context.files.add(
                        file_id,
                        filename=f"{batch.id}_{what}.jsonl",
                        purpose=OUTPUT_PURPOSE,
                        lifetime_s=batch.output_expiry_s,
                    )
            is_moved = context.batches.move(
                batch.id,
                (batch.status,),
                end,
                output_file_id=ids[0],
                error_file_id=ids[1],
                usage=usage,
                num_answered=batch.num_rows - num_failed,
                num_failed=num_failed,
                errors=errors or ([_error("crash_loop", _CRASH_LOOP)] if end == "failed" else None),
            )
            if not is_moved:  # cancelled in this very moment
                raise _StoppedError("the batch has another status now")

    def _wait_for_room(self, error: Exception) -> None:
        """The disk is full: what is recorded stays, and the batch goes on when there is room, until it expires."""
        logger.error("%s: the disk is full; it goes on when there is room: %s", self._id, error)
        self.has_trouble = True
        with contextlib.suppress(sqlite3.Error):  # that it is to blame for nothing need not fit on the disk either
            self._context.batches.update(self._id, num_attempts=0)

    def _hand_out(self, told: dict[str, Any]) -> bool:
        """End the batch as failed, with files of the results that it has; False where that does not work."""
        try:
            if not Journal.exists(self._context.folder(self._id)):
                return False
            with self._open_journal() as journal:
                self._finish("failed", journal, [told])
            return True
        except (BatchLLMError, OSError, sqlite3.Error) as fault:
            logger.error("%s: its results cannot be handed out: %s", self._id, fault)
            return False

    def _give_up(self, error: Exception) -> None:
        """The storage refuses, or the input is gone: no trying again would help this batch."""
        logger.error("%s: fails: %s", self._id, error, exc_info=error)
        if isinstance(error, ConfigError):
            told = _error("server_error", f"the server is not set up for this batch: {error}")
        else:
            told = _error("storage_unavailable", "the server could not keep or read what the batch needs on its disk")
        if self._hand_out(told):
            return
        try:
            self._context.batches.move(self._id, ACTIVE_STATUSES, "failed", errors=[told])
        except sqlite3.Error as fault:
            logger.error("%s: not even that can be written, it is tried again later: %s", self._id, fault)
            self.has_trouble = True


def _seed_of(batch_id: str) -> int:
    """A number that is the batch's own."""
    return int(batch_id.rpartition("_")[2], 16)


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "line": None, "message": message, "param": None}


def _shown(verdict: Verdict) -> list[dict[str, Any]]:
    if verdict.num_errors <= MAX_SHOWN:
        return verdict.errors
    return [*verdict.errors, _error("more_errors", f"{verdict.num_errors - MAX_SHOWN} more errors are not shown")]
