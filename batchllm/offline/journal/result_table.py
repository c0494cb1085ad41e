"""The tables of a journal that hold results: what is written to them, and how it is known to be whole.

Failures that are to be run again are set aside, in a table of their own, until it is certain that something can run
them. Knows SQL and lines as bytes; not when to commit.

INVARIANT: a result is in one of the two tables, or a later one of its row has taken its place.
"""

from __future__ import annotations

import sqlite3

import xxhash

INSERT = (
    "INSERT INTO result (idx, is_failed, code, num_prompt_tokens, num_output_tokens, checksum, line) "
    "VALUES (?, ?, ?, ?, ?, ?, ?)"
)
ADD = (
    "UPDATE total SET num_rows = num_rows + ?, num_failed = num_failed + ?, "
    "num_prompt_tokens = num_prompt_tokens + ?, num_output_tokens = num_output_tokens + ?"
)
_COLUMNS = "idx, is_failed, code, num_prompt_tokens, num_output_tokens, checksum, line"
_COUNTS = (
    "count(*), coalesce(sum(is_failed), 0), coalesce(sum(num_prompt_tokens), 0), coalesce(sum(num_output_tokens), 0)"
)
_BACK = "WHERE idx NOT IN (SELECT idx FROM result)"
_FIRST_INT64 = -(1 << 63)


def checksum(index: int, line: bytes) -> int:
    """Checksum of the line of a row."""
    return int(xxhash.xxh3_64_intdigest(line, index)) + _FIRST_INT64


def is_whole(index: object, recorded: object, line: object) -> bool:
    """The line is what was recorded for this row; the disk may have changed any of them, to anything."""
    return type(index) is int and index >= 0 and type(line) is bytes and checksum(index, line) == recorded


def remove(db: sqlite3.Connection, seqs: str) -> int:
    """Remove results; returns how many were there.

    Args:
        seqs: Their numbers in the table, as a JSON list.
    """
    where = "WHERE seq IN (SELECT value FROM json_each(?))"
    counts = db.execute(f"SELECT {_COUNTS} FROM result {where}", (seqs,)).fetchone()
    db.execute(f"DELETE FROM result {where}", (seqs,))
    db.execute(ADD, tuple(-count for count in counts))
    return int(counts[0])


def put_failed_aside(db: sqlite3.Connection) -> int:
    """Set all failures aside; returns how many."""
    db.execute(f"CREATE TABLE IF NOT EXISTS aside AS SELECT {_COLUMNS} FROM result WHERE 0")
    counts = db.execute(f"SELECT {_COUNTS} FROM result WHERE is_failed").fetchone()
    db.execute(f"INSERT INTO aside SELECT {_COLUMNS} FROM result WHERE is_failed")
    db.execute("DELETE FROM result WHERE is_failed")
    db.execute(ADD, tuple(-count for count in counts))
    return int(counts[0])


def take_back(db: sqlite3.Connection) -> int:
    """Give rows that have no result since the one that was set aside; returns how many they are."""
    counts = db.execute(f"SELECT {_COUNTS} FROM aside {_BACK}").fetchone()
    db.execute(f"INSERT INTO result ({_COLUMNS}) SELECT {_COLUMNS} FROM aside {_BACK} ORDER BY rowid")
    db.execute(ADD, counts)
    forget_aside(db)
    return int(counts[0])


def forget_aside(db: sqlite3.Connection) -> None:
    """Nothing is set aside any more."""
    db.execute("DROP TABLE aside")


def is_any_aside(db: sqlite3.Connection) -> bool:
    """Whether results are set aside."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'aside'").fetchone() is not None
