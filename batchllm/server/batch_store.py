"""Records of batches: what was asked for, where each stands, and what has come of it.

Knows columns, statuses and who may follow whom; not how a batch is run.

INVARIANT: a status changes only from one that the change names, so that of two changes at once one is refused.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import orjson

from batchllm.server.database import Database
from batchllm.server.file_store import UnknownCursorError
from batchllm.server.objects import ACTIVE_STATUSES, BatchCreate, BatchStatus, seconds_of
from batchllm.server.steady_clock import unix_now

BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
_JSON_COLUMNS = frozenset({"metadata", "errors", "usage"})
_TIME_OF: Mapping[BatchStatus, str] = {
    status: f"{status}_at"
    for status in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """What is known of a batch; times in Unix seconds."""

    seq: int
    """Place in the order of creation."""
    id: str
    status: BatchStatus
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_expiry_s: int | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    model: str | None
    errors: list[dict[str, Any]] | None
    output_file_id: str | None
    error_file_id: str | None
    usage: dict[str, Any] | None
    """Sums of ``input``, ``cached`` and ``output`` tokens over answered rows, and ``failed_by_code``, how many rows
    have failed for each reason; of one that ran whole without a restart also ``prompt`` tokens, those that were
    ``computed``, and the ``optimal`` number of these. None until there are results."""
    num_rows: int
    num_answered: int
    num_failed: int
    num_attempts: int
    """Times that it was begun since a row was last recorded; 0 when it was left in good order."""
    num_done_at_attempt: int
    """Rows that had a result when it was last begun; -1 before that."""

    @property
    def num_done(self) -> int:
        """Rows that have a result."""
        return self.num_answered + self.num_failed

    @property
    def is_suspect(self) -> bool:
        """The last time that it ran, the process ended and no row was recorded."""
        return self.num_attempts > 0 and self.num_done <= self.num_done_at_attempt


_COLUMNS = [field.name for field in fields(BatchRecord)]
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM batch"


class BatchStore:
    """The batches of a storage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, asked: BatchCreate) -> BatchRecord:
        """Record a new batch."""
        now = int(unix_now())
        expiry = asked.output_expires_after
        batch_id = f"batch_{secrets.token_hex(16)}"
        values = {
            "id": batch_id,
            "status": "validating",
            "endpoint": asked.endpoint,
            "input_file_id": asked.input_file_id,
            "completion_window": asked.completion_window,
            "metadata": asked.metadata,
            "output_expiry_s": None if expiry is None else expiry.seconds,
            "created_at": now,
            "expires_at": now + seconds_of(asked.completion_window),
        }
        names, places = ", ".join(values), ", ".join("?" * len(values))
        with self._database.transaction():
            self._database.write(f"INSERT INTO batch ({names}) VALUES ({places})", _encoded(values))
            return self.need(batch_id)

    def get(self, batch_id: str) -> BatchRecord | None:
        """The record of a batch; None where there is none."""
        if not BATCH_ID.fullmatch(batch_id):
            return None
        found = self._database.query(f"{_SELECT} WHERE id = ?", (batch_id,))
        return _record(found[0]) if found else None

    def need(self, batch_id: str) -> BatchRecord:
        """The record of a batch that there is."""
        found = self.get(batch_id)
        assert found is not None, batch_id
        return found

    def delete(self, batch_id: str) -> None:
        """Forget a batch, and the key that it was begun with."""
        with self._database.transaction():
            self._database.write("DELETE FROM batch WHERE id = ?", (batch_id,))
            self._database.write("DELETE FROM idempotency WHERE object_id = ?", (batch_id,))

    def page(self, *, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """Batches, the newest first, and whether there are more.

        Raises:
            UnknownCursorError: There is no batch ``after``.
        """
        where, values = "", []
        if after is not None:
            cursor = self._database.query("SELECT seq FROM batch WHERE id = ?", (after,))
            if not cursor:
                raise UnknownCursorError
            where, values = "WHERE seq < ?", [cursor[0]["seq"]]
        found = self._database.query(f"{_SELECT} {where} ORDER BY seq DESC LIMIT ?", (*values, limit + 1))
        return [_record(row) for row in found[:limit]], len(found) > limit

    def active(self) -> list[BatchRecord]:
        """Batches that have not ended, the oldest first."""
        query = f"{_SELECT} WHERE status IN {ACTIVE_STATUSES} ORDER BY seq"
        return [_record(row) for row in self._database.query(query)]

    def num_by_status(self) -> dict[str, int]:
        """How many batches have each status; statuses that none has are left out."""
        return {row[0]: row[1] for row in self._database.query("SELECT status, count(*) FROM batch GROUP BY status")}

    def update(self, batch_id: str, **columns: Any) -> None:
        """Change columns other than the status."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self._database.write(f"UPDATE batch SET {assignments} WHERE id = ?", (*_encoded(columns), batch_id))

    def move(self, batch_id: str, before: tuple[BatchStatus, ...], status: BatchStatus, **columns: Any) -> bool:
        """Change the status, note when, and change columns with it.

        Args:
            before: What the status must be now.

        Returns:
            Whether it was, and is changed.
        """
        columns = {"status": status, _TIME_OF[status]: int(unix_now()), **columns}
        assignments = ", ".join(f"{name} = ?" for name in columns)
        places = ", ".join("?" * len(before))
        num = self._database.write(
            f"UPDATE batch SET {assignments} WHERE id = ? AND status IN ({places})",
            (*_encoded(columns), batch_id, *before),
        )
        return num == 1


def _encoded(columns: Mapping[str, Any]) -> list[Any]:
    return [
        orjson.dumps(value).decode() if name in _JSON_COLUMNS and value is not None else value
        for name, value in columns.items()
    ]


def _record(row: sqlite3.Row) -> BatchRecord:
    values = dict(row)
    for name in _JSON_COLUMNS:
        if values[name] is not None:
            values[name] = orjson.loads(values[name])
    return BatchRecord(**values)
