"""The storage's database: files, batches and idempotency keys in one SQLite file.

Knows tables, transactions and the storage's lock; not what the rows mean.

INVARIANT: a transaction is on disk, whole, when it has ended well, and is not there at all otherwise; one process at a
time has the storage.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from batchllm.errors import ConfigError
from batchllm.offline.folder_lock import FolderLock, file_identity

NAME = "batches.db"
FLAG = "--batch-storage"

_FORMAT = 1
_SCHEMA = f"""
BEGIN;
CREATE TABLE file (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, num_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL, expires_at INTEGER, filename TEXT NOT NULL, purpose TEXT NOT NULL
);
CREATE INDEX file_expiry ON file (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE batch (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT, output_expiry_s INTEGER,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, in_progress_at INTEGER, finalizing_at INTEGER,
    completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelling_at INTEGER, cancelled_at INTEGER,
    model TEXT, errors TEXT, output_file_id TEXT, error_file_id TEXT, usage TEXT,
    num_rows INTEGER NOT NULL DEFAULT 0, num_answered INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0,
    num_attempts INTEGER NOT NULL DEFAULT 0, num_done_at_attempt INTEGER NOT NULL DEFAULT -1
);
CREATE INDEX batch_status ON batch (status);
CREATE TABLE idempotency (
    kind TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, object_id TEXT NOT NULL, PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX idempotency_object ON idempotency (object_id);
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


def _check_ours(folder: Path) -> None:
    """Refuse a folder that holds something and is not a server's: what is in it would be taken for leftovers.

    Raises:
        ConfigError: It does.
    """
    if (folder / NAME).exists():
        return
    found = sorted(name for name in os.listdir(folder) if name != FolderLock.NAME)
    if found:
        raise ConfigError(
            f"{FLAG} {folder}: holds {found[0]} and no {NAME}, so that it is not a server's; give an empty folder"
        )


def _columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    """Names of tables and of their columns."""
    select = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table'"
    return {(table, column) for table, column in db.execute(select)}


def _check_whole(db: sqlite3.Connection, path: Path) -> None:
    """Refuse what requests and batches could not use: each would find out for itself, again and again.

    Raises:
        ConfigError: It is damaged, or not a server's.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as ours:
        ours.executescript(_SCHEMA)
        if not _columns(ours) <= _columns(db):
            raise ConfigError(f"{FLAG}: {path} is a database of something else; give another folder")
    (fault,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if fault != "ok":
        why = " ".join(fault.split())
        raise ConfigError(f"{FLAG}: {path} is damaged: {why}; put a copy of it back, or give another folder")


class Database:
    """The database of a storage, which is made if need be; threads take turns.

    Args:
        folder: The storage.

    Raises:
        ConfigError: Another process has the storage, it cannot be written, or its database was made by another program.
    """

    def __init__(self, folder: Path) -> None:
        self._turn = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_ours(folder)
        except OSError as error:
            raise ConfigError(f"{FLAG} {folder}: cannot be made: {error.strerror}") from error
        try:
            self._lock = FolderLock(folder, "a server")
        except ConfigError as error:
            raise ConfigError(f"{FLAG}: {error}") from error
        try:
            self._path = folder / NAME
            self._db = self._open(self._path)
            self._identity = file_identity(self._path)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                (found,) = db.execute("PRAGMA user_version").fetchone()
                if found == 0 and not _columns(db):
                    db.executescript(_SCHEMA)
                elif found not in (0, _FORMAT):
                    raise ConfigError(
                        f"{FLAG}: {path} was written by another version (format {found}, this one has {_FORMAT}); "
                        "give another folder"
                    )
                _check_whole(db, path)
            except BaseException:
                db.close()
                raise
            return db
        except sqlite3.Error as error:
            raise ConfigError(f"{FLAG}: {path} cannot be used: {error}") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is written in here; inside another one it is part of that.

        Raises:
            sqlite3.Error: The disk refuses.
        """
        with self._turn:
            if self._db.in_transaction:
                yield
                return
            self._check_there()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _check_there(self) -> None:
        """SQLite would go on writing to a file that the next start does not find."""
        if file_identity(self._path) != self._identity:
            raise sqlite3.OperationalError(
                f"{self._path} was deleted, moved or replaced while the server was running; stop the server, put the "
                "storage back, and start it again"
            )

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """The rows of an answer."""
        with self._turn:
            return self._db.execute(sql, values).fetchall()

    def write(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Change rows, and tell how many; safe when the transaction around it has ended, or at once where none is."""
        with self.transaction():
            return self._db.execute(sql, values).rowcount

    def close(self) -> None:
        """Let others have the storage. Closing twice does nothing."""
        with self._turn:
            self._db.close()
            self._lock.release()
