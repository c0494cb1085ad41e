"""A journal's file: its tables, how it is made, opened and deleted, and what can go wrong with it.

Knows files, tables and SQLite's codes of faults; not what is recorded, or how a job is run.

INVARIANT: under the journal's name there is a whole journal or none.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from batchllm.errors import ConfigError, JournalError
from batchllm.offline.folder_lock import FolderLock, lock_holder
from batchllm.trace.whole_file import sync_folder

_WAL_HEADER_LEN = 32
_WAL_FRAME_HEADER_LEN = 24
_BUSY_TIMEOUT_S = 10.0
_CACHE_KIB = 8192


_FORMAT = 1
"""Of the tables below; a journal of another one is refused."""

# `total` is what `result` adds up to, so that nobody has to read it all. `progress` has what was recorded in each
# second of each run, beginning with zeros in the second in which the run began; by `clock_second`.
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
BEGIN;
CREATE TABLE result (
    seq INTEGER PRIMARY KEY, idx INTEGER NOT NULL, is_failed INTEGER NOT NULL, code TEXT NOT NULL,
    num_prompt_tokens INTEGER NOT NULL, num_output_tokens INTEGER NOT NULL,
    checksum INTEGER NOT NULL, line BLOB NOT NULL
);
CREATE INDEX failure ON result (code, idx) WHERE is_failed;
CREATE TABLE total (num_rows INTEGER, num_failed INTEGER, num_prompt_tokens INTEGER, num_output_tokens INTEGER);
INSERT INTO total VALUES (0, 0, 0, 0);
CREATE TABLE progress (
    run INTEGER, second INTEGER, num_rows INTEGER, num_tokens INTEGER, PRIMARY KEY (run, second)
) WITHOUT ROWID;
CREATE TABLE event (at REAL NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE note (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE job (fingerprint TEXT NOT NULL, command TEXT NOT NULL);
PRAGMA user_version = {_FORMAT};
"""

_CAUSES = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it can only be read",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_BUSY: "another program keeps it locked",
    sqlite3.SQLITE_IOERR: "the disk refuses to read or write",
    sqlite3.SQLITE_PERM: "it may not be written",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
}
"""What SQLite's codes mean where the journal is whole; any other means that it is not."""

GO_ON = "mend that, and run the same command to go on"


def database_path(folder: Path) -> Path:
    """Where the journal of a job lies."""
    return folder / "journal.db"


def wal_path(folder: Path) -> Path:
    """SQLite's log of commits that are not in the journal's main file yet."""
    return folder / "journal.db-wal"


def check_journal_there(folder: Path) -> None:
    """There is a journal.

    Raises:
        ConfigError: There is none.
    """
    if not database_path(folder).is_file():
        raise ConfigError(f"{folder}: no job has been run in this folder, it has no {database_path(folder).name}")


def clock_second() -> int:
    """Seconds since the machine started, which all of its processes agree on and nobody sets."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME))


def make_database(folder: Path, fingerprint: str, command: str) -> None:
    """Makes an empty journal, under its name only when it is complete; the lock is held.

    Raises:
        JournalError: The disk refuses.
    """
    path = database_path(folder)
    unfinished = path.with_name(path.name + ".new")
    with faults(path, "nothing has been recorded; mend that, and run the same command again"):
        _unlink_database(unfinished)
        # What an older journal has left is no log of the new one.
        _unlink_database(path)
        with contextlib.closing(sqlite3.connect(unfinished, isolation_level=None)) as database:
            database.executescript(_SCHEMA)
            database.execute("INSERT INTO job VALUES (?, ?)", (fingerprint, command))
            database.execute("COMMIT")
        os.replace(unfinished, path)
        sync_folder(folder)


def open_writer(folder: Path) -> tuple[sqlite3.Connection, int]:
    """Opens a journal for writing; the lock is held.

    Returns:
        The connection, and how many pages of a commit that was cut off SQLite has dropped.

    Raises:
        ConfigError: It was written by another version.
        JournalError: The disk refuses, or the file is damaged.
    """
    path = database_path(folder)
    with contextlib.ExitStack() as stack, faults(path, f"its results are as they were; {GO_ON}"):
        num_frames = _count_wal_frames(folder)
        database = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
        stack.callback(database.close)
        _check_format(database, path)
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        _, num_committed, _ = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        stack.pop_all()
        return database, max(num_frames - num_committed, 0)


def remove_journal(folder: Path) -> None:
    """See `Journal.remove`."""
    if not folder.is_dir():
        return
    lock = FolderLock(folder, "the job")
    try:
        _check_not_foreign(database_path(folder))
        _unlink_database(database_path(folder).with_name(database_path(folder).name + ".new"))
        _unlink_database(database_path(folder))
        lock.delete()
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; the job's results cannot be deleted") from error
    finally:
        lock.release()


def _check_not_foreign(path: Path) -> None:
    """Refuse to delete another program's database, which may have this name too. One that is damaged may be ours.

    Raises:
        ConfigError: It is one.
    """
    if not path.is_file():
        return
    try:
        uri = f"file:{quote(os.fsencode(path.absolute()))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S)) as found:
            is_ours = _is_ours(found)
    except sqlite3.Error:
        return
    if not is_ours:
        raise _foreign(path)


def _is_ours(database: sqlite3.Connection) -> bool:
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return not tables or {"result", "job"} <= tables


def _foreign(path: Path) -> ConfigError:
    return ConfigError(f"{path}: is a database of something else, and no job's; give another folder (--job-dir)")


def _unlink_database(path: Path) -> None:
    """The log goes first: without its file it would be taken for that of the next one."""
    for suffix in ("-wal", "-shm", "-journal", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def open_reader(folder: Path) -> Iterator[tuple[sqlite3.Connection, int | None]]:
    """Opens a journal for reading only, whether it is being written or not, and whether it can be or not.

    Yields:
        The connection, and the process that is writing, 0 where that is not known; None if none is.

    Raises:
        ConfigError: There is no journal, or it was written by another version.
        JournalError: It cannot be read.
    """
    check_journal_there(folder)
    path = database_path(folder)
    with contextlib.ExitStack() as stack:
        pid = lock_holder(folder, stack)
        uri = f"file:{quote(os.fsencode(path.absolute()))}?mode=ro"
        # A journal that was closed is one file. Read like any other it would get a log and an index again, or could not
        # be read at all on a disk that is read-only; the lock keeps writers away meanwhile.
        if pid is None and _size(wal_path(folder)) == 0:
            uri += "&immutable=1"
        with faults(
            path, f"nothing of it is lost; if {folder} cannot be written, copy it to where it can be, and ask there"
        ):
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
            stack.callback(connection.close)
            _check_format(connection, path)
            yield connection, pid


def _check_format(database: sqlite3.Connection, path: Path) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != _FORMAT:
        if not _is_ours(database):
            raise _foreign(path)
        raise ConfigError(
            f"{path}: written by another version of batchllm (format {version}, this one has {_FORMAT}); "
            "finish the job with that version, or give --restart to delete its results and begin anew"
        )


@contextlib.contextmanager
def faults(path: Path, outcome: str) -> Iterator[None]:
    """SQLite's faults as errors for the user.

    Args:
        path: The journal's file.
        outcome: What is safe and what to do, said if the disk is at fault.

    Raises:
        JournalError: SQLite has refused, or the file is damaged.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # our own mistake, not the disk's
    except sqlite3.DatabaseError as error:
        # Without a code it is Python's: a text that is none.
        name = getattr(error, "sqlite_errorname", "no text")
        cause = _CAUSES.get(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF)
        if cause is None:
            raise damaged(path, f"{error}, {name}") from error
        raise JournalError(f"{path}: {cause} ({error}, {name}); {outcome}") from error
    except UnicodeDecodeError as error:  # of a text in the file, or of SQLite's message that quotes it
        raise damaged(path, error.reason) from error
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; {outcome}") from error


def damaged(path: Path, detail: str) -> JournalError:
    """The error of a journal whose file is not what was written to it."""
    return JournalError(
        f"{path}: the file is damaged ({detail}). Put back a copy of {path.parent}, or give --restart to delete its "
        "results and run every row again"
    )


def _count_wal_frames(folder: Path) -> int:
    """Pages in SQLite's log that were written since it was last restarted, whether or not their commit was completed.

    Call it before the journal is opened: SQLite drops a commit that was cut off, and says nothing.
    """
    try:
        with wal_path(folder).open("rb") as stream:
            header = stream.read(_WAL_HEADER_LEN)
            size = os.fstat(stream.fileno()).st_size
            page_size, salts = int.from_bytes(header[8:12], "big"), header[16:24]
            num_frames = 0
            # A frame that the end of the file cuts off counts if its header is there.
            for offset in range(_WAL_HEADER_LEN, size, _WAL_FRAME_HEADER_LEN + page_size):
                stream.seek(offset)
                if stream.read(_WAL_FRAME_HEADER_LEN)[8:16] != salts:
                    break
                num_frames += 1
            return num_frames
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
