"""Files of the storage: their records in the database, their bytes under names of our own.

Knows records, folders and lifetimes; not HTTP, and not what is in a file.

INVARIANT: a file that has a record has all its bytes on disk, but for one that could not be deleted from a full disk.
Bytes of ours without a record are out of the way after the next start, and are deleted a week later; a name that is not
ours is left alone. What a user calls a file is never part of a path.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from batchllm.server.api_errors import is_disk_full
from batchllm.server.database import Database
from batchllm.server.objects import ACTIVE_STATUSES
from batchllm.server.steady_clock import unix_now
from batchllm.trace.whole_file import sync_folder

logger = logging.getLogger(__name__)

Order = Literal["asc", "desc"]
_ID = re.compile(r"file-[0-9a-f]{32}")
_UNFINISHED = "unfinished-"
_NAMES_OF_OURS = re.compile(r"(file-|batch_)[0-9a-f]{32}")
UNKNOWN = "unknown"
"""Folder in the storage for what has a name of ours and no record, in case the records are what is missing."""
_KEEP_UNKNOWN_S = 7 * 24 * 3600
_NEEDED = f"SELECT input_file_id FROM batch WHERE status IN {ACTIVE_STATUSES}"
_COLUMNS = "id, num_bytes, created_at, expires_at, filename, purpose"


def set_aside(path: Path, storage: Path) -> None:
    """Move what is not known out of the way of what is."""
    folder = storage / UNKNOWN
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / path.name)
    os.utime(folder / path.name)  # its week begins now
    logger.warning("%s has no record; it is kept for a week in %s", path.name, folder)


def _delete_old(folder: Path) -> None:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _NAMES_OF_OURS.fullmatch(path.name) and path.stat().st_mtime < time.time() - _KEEP_UNKNOWN_S:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


class FileInUseError(Exception):
    """A batch that has not ended needs the file."""


class UnknownCursorError(Exception):
    """There is nothing with the id after which a page shall begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What is known of a file; times in Unix seconds."""

    id: str
    num_bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str


class FileStore:
    """The files of a storage.

    Args:
        database: Has the records.
        storage: Has the bytes, in ``files``, and unfinished ones in ``incoming``.

    Raises:
        OSError: The folders cannot be made.
    """

    def __init__(self, database: Database, storage: Path) -> None:
        self._database = database
        self._storage = storage
        self._folder = storage / "files"
        self._incoming = storage / "incoming"
        self._folder.mkdir(exist_ok=True)
        self._incoming.mkdir(exist_ok=True)
        self._sweep_leftovers()

    def _sweep_leftovers(self) -> None:
        """What a server that was killed has left behind."""
        for path in self._incoming.iterdir():
            if path.name.startswith(_UNFINISHED):
                path.unlink()
        known = {row["id"] for row in self._database.query("SELECT id FROM file")}
        for path in self._folder.iterdir():
            if _ID.fullmatch(path.name) and path.name not in known:
                set_aside(path, self._storage)
        _delete_old(self._storage / UNKNOWN)

    def open_incoming(self) -> tuple[BinaryIO, Path]:
        """A new file, to be written and then given to `place`, or deleted."""
        fd, name = tempfile.mkstemp(dir=self._incoming, prefix=_UNFINISHED)
        return cast(BinaryIO, os.fdopen(fd, "wb", buffering=0)), Path(name)

    def place(self, incoming: Path) -> str:
        """Give a file, written where this store says, its place; returns its id, which has no record yet."""
        file_id = f"file-{secrets.token_hex(16)}"
        os.replace(incoming, self.path(file_id))
        sync_folder(self._folder)
        return file_id

    def new_path(self) -> Path:
        """Where a file may be written that becomes `place`d."""
        return self._incoming / f"{_UNFINISHED}{secrets.token_hex(16)}"

    def add(self, file_id: str, *, filename: str, purpose: str, lifetime_s: int | None) -> FileRecord:
        """Record a file that has its place."""
        now = int(unix_now())
        expires_at = None if lifetime_s is None else now + lifetime_s
        num_bytes = self.path(file_id).stat().st_size
        values = (file_id, num_bytes, now, expires_at, filename, purpose)
        self._database.write(f"INSERT INTO file ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", values)
        return FileRecord(
            id=file_id,
            num_bytes=num_bytes,
            created_at=now,
            expires_at=expires_at,
            filename=filename,
            purpose=purpose,
        )

    def drop(self, file_id: str) -> None:
        """Delete the bytes of a file, unless it has got a record: a commit that ended in an error may have worked."""
        if self.get(file_id) is None:
            self.path(file_id).unlink(missing_ok=True)

    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return int(self._database.query("SELECT coalesce(sum(num_bytes), 0) FROM file")[0][0])

    def path(self, file_id: str) -> Path:
        """Where its bytes are."""
        assert _ID.fullmatch(file_id), file_id
        return self._folder / file_id

    def get(self, file_id: str) -> FileRecord | None:
        """The record of a file; None where there is none, or it has expired."""
        if not _ID.fullmatch(file_id):
            return None
        query = f"SELECT {_COLUMNS} FROM file WHERE id = ? AND (expires_at IS NULL OR expires_at > ?)"
        found = self._database.query(query, (file_id, int(unix_now())))
        return FileRecord(**dict(found[0])) if found else None

    def page(
        self, *, purpose: str | None, after: str | None, limit: int, order: Order
    ) -> tuple[list[FileRecord], bool]:
        """Files by age, and whether there are more.

        Raises:
            UnknownCursorError: There is no file ``after``.
        """
        where, values = "(expires_at IS NULL OR expires_at > ?)", [int(unix_now())] + [purpose] * (purpose is not None)
        if purpose is not None:
            where += " AND purpose = ?"
        if after is not None:
            cursor = self._database.query("SELECT seq FROM file WHERE id = ?", (after,))
            if not cursor:
                raise UnknownCursorError
            where += f" AND seq {'>' if order == 'asc' else '<'} ?"
            values.append(cursor[0]["seq"])
        query = f"SELECT {_COLUMNS} FROM file WHERE {where} ORDER BY seq {order} LIMIT ?"
        found = self._database.query(query, (*values, limit + 1))
        return [FileRecord(**dict(row)) for row in found[:limit]], len(found) > limit

    def delete(self, file_id: str) -> bool:
        """Delete a file; returns whether there was one.

        Raises:
            FileInUseError: It stays.
        """
        return self.get(file_id) is not None and self._erase(file_id)

    def delete_expired(self) -> None:
        """Delete what has expired, but for the inputs of batches that have not ended."""
        query = f"SELECT id FROM file WHERE expires_at <= ? AND id NOT IN ({_NEEDED})"
        for row in self._database.query(query, (int(unix_now()),)):
            try:
                self._erase(row["id"])
            except (OSError, sqlite3.Error) as error:
                logger.warning("file %s has expired and cannot be deleted: %r", row["id"], error)

    def _erase(self, file_id: str) -> bool:
        """Forget a file and delete its bytes; returns whether it was known.

        A full disk does not take so much as the news that a file is gone: there the bytes go first, and make room.
        """
        try:
            is_known = self._forget(file_id)
        except sqlite3.Error as error:
            if not is_disk_full(error):
                raise
            is_known = self._forget(file_id, makes_room=True)
        self.path(file_id).unlink(missing_ok=True)
        return is_known

    def _forget(self, file_id: str, *, makes_room: bool = False) -> bool:
        with self._database.transaction():
            if self._database.query(f"SELECT 1 WHERE ? IN ({_NEEDED})", (file_id,)):
                raise FileInUseError
            num = self._database.write("DELETE FROM file WHERE id = ?", (file_id,))
            self._database.write("DELETE FROM idempotency WHERE object_id = ?", (file_id,))
            if makes_room:
                self.path(file_id).unlink(missing_ok=True)
        return num == 1
