"""When each batch does its next stage, and what has expired.

Knows records, threads and the clock; what a stage is, is `batch_run`'s.

INVARIANT: a batch is in at most one thread; what is to be done next is read from the records, so that a server that was
killed finds all of it again.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from batchllm.offline.stop import StopSignal
from batchllm.server.batch_run import CRASH, SHUTDOWN, BatchContext, BatchRun
from batchllm.server.batch_store import BATCH_ID, BatchRecord
from batchllm.server.deadlines import LEAST, Advance, Deadlines
from batchllm.server.file_store import set_aside
from batchllm.server.objects import BatchStatus
from batchllm.server.steady_clock import unix_now

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_RETRY_AFTER_S = 5.0
_SWEEP_EVERY_S = 60.0
_JOIN_S = 60.0
_MAX_VALIDATIONS = 4
"""Files that are looked at together: a small one need not wait for a large one."""
_MAX_ENDINGS = 4
"""Batches that are ended together, cancelled or expired: none waits for one that runs."""


_Kind = Literal["validation", "rows", "ending"]


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage of a batch that is under way."""

    run: BatchRun
    stop: StopSignal
    thread: threading.Thread
    is_done: threading.Event
    """The thread has nothing more to do; it may live a moment longer."""
    kind: _Kind
    is_suspect: bool


class Dispatcher:
    """Begins stages of batches, in threads of their own, until stopped.

    Args:
        context: What all batches are run with.
        give_planned: Lets batches have this part of what they and live requests compete for.
    """

    def __init__(self, context: BatchContext, give_planned: Callable[[float], None]) -> None:
        self._context = context
        self._give_planned = give_planned
        self._deadlines = Deadlines()
        self._stages: dict[str, _Stage] = {}
        self._not_before: dict[str, float] = {}
        self._swept_at = -_SWEEP_EVERY_S
        self._is_stopping = False
        self._reason = SHUTDOWN
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Something has changed in the records."""
        self._wake.set()

    def stop(self, *, is_crash: bool) -> None:
        """End all stages where they are; what is recorded stays. Returns when their threads have ended."""
        self._reason = CRASH if is_crash else SHUTDOWN
        self._is_stopping = True
        self._wake.set()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            logger.error("batches still run after %.0f s; they go on with the next start", _JOIN_S)

    def _run(self) -> None:
        self._sweep_folders()
        while not self._is_stopping:
            try:
                self._look()
            except (OSError, sqlite3.Error) as error:  # the disk; it may come back
                logger.error("the batch storage refuses: %r", error)
            except Exception:  # a mistake of ours must not end the thread unheard, with every batch to come
                logger.exception("batches could not be looked at; it is tried again")
            self._wake.wait(_LOOK_EVERY_S)
            self._wake.clear()
        for stage in self._stages.values():
            stage.stop.ask(self._reason)
            stage.stop.ask(self._reason)  # now
        for stage in self._stages.values():
            stage.thread.join()

    def _look(self) -> None:
        now = time.monotonic()
        for batch_id, stage in list(self._stages.items()):
            if stage.is_done.is_set():
                del self._stages[batch_id]
                if stage.run.has_trouble:
                    self._not_before[batch_id] = now + _RETRY_AFTER_S
        batches = self._context.batches.active()
        active = {batch.id for batch in batches}
        self._not_before = {batch_id: at for batch_id, at in self._not_before.items() if batch_id in active}
        for batch in batches:
            at_work = self._stages.get(batch.id)
            if at_work is None:
                if now >= self._not_before.get(batch.id, 0.0) and self._has_room(batch):
                    self._begin(batch)
            elif not at_work.stop.is_set and _must_stop(batch):
                at_work.stop.ask(batch.status)
        if now - self._swept_at >= _SWEEP_EVERY_S:
            self._swept_at = now
            self._context.files.delete_expired()
        self._keep_deadlines(batches, now)
        self._tell(batches)

    def _keep_deadlines(self, batches: list[BatchRecord], now_s: float) -> None:
        before = self._deadlines.share
        advances = [
            Advance(
                batch.id,
                batch.num_done,
                batch.num_rows - batch.num_done,
                window_s=batch.expires_at - batch.created_at,
                seconds_left=batch.expires_at - unix_now(),
            )
            for batch in batches
            if batch.status == "in_progress" and batch.id in self._stages
        ]
        share = self._deadlines.update(now_s, advances)
        if share != before or share > LEAST:  # again and again: the engine may have been started anew
            self._give_planned(share)

    def _has_room(self, batch: BatchRecord) -> bool:
        """A batch that may have ended the server is begun beside no other such: the next end then tells them apart."""
        kind = _kind_of(batch)
        if kind == "rows" and batch.is_suspect and any(stage.is_suspect for stage in self._stages.values()):
            return False
        limits = {
            "validation": _MAX_VALIDATIONS,
            "ending": _MAX_ENDINGS,
            "rows": self._context.options.max_active_jobs,
        }
        return sum(stage.kind == kind for stage in self._stages.values()) < limits[kind]

    def _begin(self, batch: BatchRecord) -> None:
        stop = StopSignal(self._context.options.grace_s)
        run = BatchRun(self._context, batch.id, stop)

        is_done = threading.Event()

        def work() -> None:
            try:
                run.run()
            finally:
                is_done.set()
                self.wake()

        thread = threading.Thread(target=work, name=batch.id, daemon=True)
        kind = _kind_of(batch)
        self._stages[batch.id] = _Stage(run, stop, thread, is_done, kind, batch.is_suspect and kind == "rows")
        self._not_before.pop(batch.id, None)
        thread.start()

    def _sweep_folders(self) -> None:
        """Folders of batches that a killed server has ended; those of failed ones may have the only copy of results.

        A name that is not a batch's is left alone.
        """
        storage = self._context.options.storage
        folder = storage / "jobs"
        try:
            for path in folder.iterdir():
                if not BATCH_ID.fullmatch(path.name):
                    continue
                batch = self._context.batches.get(path.name)
                if batch is None:
                    set_aside(path, storage)
                elif batch.status in ("completed", "cancelled", "expired"):
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s cannot be tidied up: %r", folder, error)

    def _tell(self, batches: list[BatchRecord]) -> None:
        if self._context.metrics is None:
            return
        found = self._context.batches.num_by_status()
        num_by_status: Mapping[str, int] = {status: found.get(status, 0) for status in get_args(BatchStatus)}
        self._context.metrics.set_batches(num_by_status, sum(batch.num_rows - batch.num_done for batch in batches))


def _kind_of(batch: BatchRecord) -> _Kind:
    """Which kind of stage a batch does next."""
    if _must_stop(batch):
        return "ending"
    return "validation" if batch.status == "validating" else "rows"


def _must_stop(batch: BatchRecord) -> bool:
    """What runs of the batch shall come to its end."""
    return batch.status == "cancelling" or (batch.expires_at <= unix_now() and batch.status != "finalizing")
