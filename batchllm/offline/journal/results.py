"""The results of a job, kept safe as they come: one SQLite file in the job's folder, which survives any end of a run.

Rows are appended in the order in which they finish, which a disk does fastest; where a row is, is found by a scan.
A commit is on disk when it returns (write-ahead log, `synchronous=FULL`).

Knows row numbers, output lines as bytes, counts and wall-clock times; not what a line means or how rows are run.

INVARIANT: a row that `commit` has counted is there exactly once, with its bytes, however the process ends; a commit
that was cut off is not there at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from batchllm.errors import ConfigError, JournalError
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.folder_lock import FolderLock, file_identity
from batchllm.offline.journal import database, result_table
from batchllm.offline.journal.database import clock_second, damaged, database_path, faults, wal_path
from batchllm.tokens import Int64Array

Order = Literal["input", "finished"]

NUM_ROWS_PER_COMMIT = 256
MAX_COMMIT_AGE_S = 0.1
"""A commit is due with so many rows, or when the oldest has waited so long; whoever asks ten times a second is never
more than 0.2 s behind."""

_NUM_NAMED = 5
_ADD_PROGRESS = (
    "INSERT INTO progress VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
    "num_rows = num_rows + excluded.num_rows, num_tokens = num_tokens + excluded.num_tokens"
)


class Journal:
    """A job's results, open for writing: by `create` or `open`, from which time on nobody else can write in the folder.

    Attributes:
        folder: The job's folder.
        fingerprint: What the results depend on.
        command: What was asked for, to run it again.
        recovery: What was found of a run that was cut off in the middle of a commit, one sentence; None if nothing.
        num_rows: Rows whose results are safe on disk.
    """

    def __init__(self, folder: Path, lock: FolderLock) -> None:
        self.folder = folder
        self._path = database_path(folder)
        self._lock = lock
        self._rows: list[tuple[int, int, str, int, int, int, bytes]] = []
        self._events: list[tuple[float, str, str]] = []
        self._oldest_at = 0.0
        self._started_second = clock_second()
        self._fault: JournalError | None = None
        self.num_rows = 0
        self._db, num_dropped = database.open_writer(folder)
        try:
            with self._reading():
                self.num_rows = int(self._one("SELECT num_rows FROM total")[0])
                self._run = int(self._one("SELECT coalesce(max(run), 0) + 1 FROM progress")[0])
                fingerprint, command = self._one("SELECT fingerprint, command FROM job")
                self.fingerprint = Fingerprint(dict(json.loads(fingerprint)))
                self.command: dict[str, Any] = json.loads(command)
            self._files = self._identities()
            self._take_back()
        except BaseException:
            self._db.close()
            raise
        self.recovery = None
        if num_dropped:
            self.recovery = (
                f"{wal_path(folder)}: a run was cut off in the middle of a commit, which has been dropped "
                f"({num_dropped} pages); {self.num_rows} rows are safe, all others run again"
            )

    def num_tokens(self) -> tuple[int, int]:
        """Prompt and output tokens of all rows that are safe."""
        with self._reading():
            return tuple(self._one("SELECT num_prompt_tokens, num_output_tokens FROM total"))

    @staticmethod
    def exists(folder: Path) -> bool:
        """A job has been begun in this folder."""
        return database_path(folder).is_file()

    @classmethod
    def create(cls, folder: Path, *, fingerprint: Fingerprint, command: Mapping[str, Any]) -> Self:
        """Begins the journal of a job, in a folder that is made if need be; it appears complete or not at all.

        Raises:
            ConfigError: The folder has a journal, or is in use, or cannot be written.
            JournalError: The disk refuses.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}; the job's folder cannot be made") from error
        lock = FolderLock(folder, "the job")
        try:
            if cls.exists(folder):
                raise ConfigError(f"{folder}: this folder has a job already; go on with it, or give --restart")
            database.make_database(folder, json.dumps(list(fingerprint.parts.items())), json.dumps(dict(command)))
            return cls(folder, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Goes on with a job.

        Raises:
            ConfigError: There is none, or another process is running it.
            JournalError: The disk refuses, or the file is damaged.
        """
        database.check_journal_there(folder)
        lock = FolderLock(folder, "the job")
        try:
            database.check_journal_there(folder)
            return cls(folder, lock)
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def remove(folder: Path) -> None:
        """Deletes the journal of a job, and nothing else; does nothing where there is none.

        Raises:
            ConfigError: Another process is running the job, or the folder cannot be written.
        """
        database.remove_journal(folder)

    def append(
        self,
        index: int,
        line: bytes,
        *,
        is_failed: bool = False,
        code: str = "",
        num_prompt_tokens: int = 0,
        num_output_tokens: int = 0,
    ) -> None:
        """The result of a row, to be safe after the next `commit`.

        Args:
            index: Number of the row, from 0. Whoever appends a row twice finds it twice.
            line: Its output line, without a newline.
            is_failed: The row has no answer.
            code: Why not, a stable name.
            num_prompt_tokens: Tokens of its prompt.
            num_output_tokens: Tokens generated for it.
        """
        if not self._rows:
            self._oldest_at = time.monotonic()
        checksum = result_table.checksum(index, line)
        self._rows.append((index, 1 if is_failed else 0, code, num_prompt_tokens, num_output_tokens, checksum, line))

    def is_due(self, now: float) -> bool:
        """What waits should be committed now.

        Args:
            now: By `time.monotonic`.
        """
        num_waiting = len(self._rows)
        return num_waiting >= NUM_ROWS_PER_COMMIT or (num_waiting > 0 and now - self._oldest_at >= MAX_COMMIT_AGE_S)

    def commit(self) -> int:
        """Make safe what waits, and tell how many rows that was; where nothing does, the disk is left alone.

        Raises:
            JournalError: The disk refuses, now or at an earlier commit. What waited is dropped, and nothing more can be
                written; every row counted by an earlier commit stays safe, unless the error says otherwise.
        """
        self._check_usable()
        if not self._rows and not self._events:
            return 0
        rows, self._rows = self._rows, []
        events, self._events = self._events, []
        num_failed = sum(row[1] for row in rows)
        num_prompt_tokens, num_output_tokens = sum(row[3] for row in rows), sum(row[4] for row in rows)
        with self._transaction(len(rows)):
            self._db.executemany(result_table.INSERT, rows)
            self._db.executemany("INSERT INTO event VALUES (?, ?, ?)", events)
            self._db.execute(result_table.ADD, (len(rows), num_failed, num_prompt_tokens, num_output_tokens))
            self._db.execute(_ADD_PROGRESS, (self._run, self._started_second, 0, 0))
            num_tokens = num_prompt_tokens + num_output_tokens
            self._db.execute(_ADD_PROGRESS, (self._run, clock_second(), len(rows), num_tokens))
        return len(rows)

    def event(self, kind: str, detail: str = "") -> None:
        """Something happened now; it is written with the next commit, or at once where no row waits for one.

        Raises:
            JournalError: As `commit`.
        """
        # What a system says of itself need not be text.
        self._events.append((time.time(), kind, detail.encode(errors="backslashreplace").decode()))
        if not self._rows:
            self.commit()

    def note(self, key: str, value: Any) -> None:
        """Writes a small fact of the job, a JSON value, in place of an older one of that name.

        Raises:
            JournalError: As `commit`.
        """
        with self._transaction(0):
            self._db.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (key, json.dumps(value)))

    @property
    def notes(self) -> dict[str, Any]:
        """All facts by name."""
        with self._reading():
            return {key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM note")}

    def finished(self) -> Int64Array:
        """Rows that have a result, by the order in which they got it."""
        indices = self._indices("SELECT idx FROM result ORDER BY seq")
        if len(indices) != self.num_rows:
            raise damaged(self._path, f"{len(indices)} of {self.num_rows} rows are left")
        return indices

    def failed(self) -> Int64Array:
        """Rows whose result is a failure, in no order."""
        return self._indices("SELECT idx FROM result WHERE is_failed")

    def failed_by_code(self) -> dict[str, int]:
        """How many rows have failed with each code."""
        with self._reading():
            return dict(self._db.execute("SELECT code, count(*) FROM result WHERE is_failed GROUP BY code"))

    def set_failed_aside(self) -> None:
        """Failures have no result until they are run again; without `forget_aside` they have it again at the end.

        Raises:
            JournalError: As `commit`.
        """
        self.commit()
        with self._transaction(0), self._reading():
            num_aside = result_table.put_failed_aside(self._db)
        self.num_rows -= num_aside

    def forget_aside(self) -> None:
        """What was set aside runs again. Does nothing where nothing was.

        Raises:
            JournalError: As `commit`.
        """
        if result_table.is_any_aside(self._db):
            with self._transaction(0):
                result_table.forget_aside(self._db)

    def _take_back(self) -> None:
        """Give back what was set aside by a run that came to nothing."""
        with self._reading():
            if not result_table.is_any_aside(self._db):
                return
        with self._transaction(0), self._reading():
            num_back = result_table.take_back(self._db)
        self.num_rows += num_back

    def results(self, order: Order, *, failed: bool | None = None) -> Iterator[bytes]:
        """Lines of all rows that are safe.

        Args:
            order: By row number, or as they finished. The first sorts on disk, in the job's folder.
            failed: Only failures, or only answers; None for both.

        Raises:
            JournalError: A line is not what was recorded. It and all others like it have been removed, and their rows
                have no result any more; or as `commit`.
        """
        if order == "input":
            self._sort_in_folder()
        where = {None: "", True: "WHERE is_failed", False: "WHERE NOT is_failed"}[failed]
        column = "idx" if order == "input" else "seq"
        with self._reading(), contextlib.closing(self._db.cursor()) as cursor:
            query = f"SELECT idx, checksum, line FROM result {where} ORDER BY {column}"
            for index, checksum, line in cursor.execute(query):
                if not result_table.is_whole(index, checksum, line):
                    break
                yield line
            else:
                return
        raise self._drop_damaged()

    def close(self) -> None:
        """Commit what waits and let others have the folder. Closing twice does nothing.

        SQLite puts its log away, so that one file is left; if the disk refuses, the log stays and nothing is lost.

        Raises:
            JournalError: As `commit`, if anything waited.
        """
        try:
            if self._fault is None:
                self.commit()
                self._take_back()
        finally:
            if self._fault is None:
                self._fault = JournalError(f"{self._path}: the journal is closed")
            self._db.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self, num_added: int) -> Iterator[None]:
        """All or nothing of it is on disk, in the file that has the name; if nothing, no other is tried."""
        self._check_usable()
        try:
            with faults(self._path, f"{self.num_rows} rows are safe; {database.GO_ON}"):
                try:
                    self._db.execute("BEGIN IMMEDIATE")
                    yield
                    self._db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
            self._check_files()
        except JournalError as error:
            self._fault = error
            raise
        except BaseException:  # whether it is on disk is not known here
            self._fault = JournalError(f"{self._path}: a commit was interrupted; {database.GO_ON}")
            raise
        self.num_rows += num_added

    def _check_usable(self) -> None:
        if self._fault is not None:
            raise JournalError(str(self._fault))

    def _check_files(self) -> None:
        """SQLite goes on writing to files that have lost their names, and what it writes there is lost."""
        if self._identities() != self._files:
            raise JournalError(
                f"{self._path}: it, or its log, was deleted, moved or replaced while the job was running, with the "
                f"{self.num_rows} rows recorded so far. Put the whole folder back and run the same command to go on; "
                "without it, the same command begins anew"
            )

    def _identities(self) -> list[tuple[int, int] | None]:
        return [file_identity(self._path), file_identity(wal_path(self.folder))]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with faults(self._path, f"{self.num_rows} rows are safe; {database.GO_ON}"):
                yield
        except (ValueError, TypeError, OverflowError) as error:  # a value of another kind than was written
            raise damaged(self._path, str(error)) from error

    def _one(self, query: str) -> tuple[Any, ...]:
        """The only row of an answer; none is a damage."""
        row: tuple[Any, ...] | None = self._db.execute(query).fetchone()
        if row is None:
            raise damaged(self._path, "a row of facts is gone")
        return row

    def _indices(self, query: str) -> Int64Array:
        with self._reading():
            return np.fromiter((index for (index,) in self._db.execute(query)), np.int64)

    def _sort_in_folder(self) -> None:
        """SQLite sorts in files as large as the lines, and there is room where those are."""
        quoted = str(self.folder.absolute()).replace("'", "''")  # SQLite takes no path that is no text
        if os.access(self.folder, os.W_OK) and quoted.isprintable():
            with self._reading():
                self._db.execute(f"PRAGMA temp_store_directory = '{quoted}'")

    def _drop_damaged(self) -> JournalError:
        """Remove every row whose line is not what was recorded; returns the error that says so."""
        with self._reading():
            rows = self._db.execute("SELECT seq, idx, checksum, line FROM result")
            found = [
                (seq, index) for seq, index, checksum, line in rows if not result_table.is_whole(index, checksum, line)
            ]
        with self._transaction(0), self._reading():
            num_removed = result_table.remove(self._db, json.dumps([seq for seq, _ in found]))
        self.num_rows -= num_removed
        named = ", ".join([str(index) for _, index in found[:_NUM_NAMED]] + ["..."] * (len(found) > _NUM_NAMED))
        return JournalError(
            f"{self._path}: the results of {len(found)} rows are not what was recorded (row numbers from 0: {named}); "
            f"they have been removed, {self.num_rows} rows are safe; run the same command to run these again"
        )
