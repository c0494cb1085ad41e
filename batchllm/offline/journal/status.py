"""How far a job is, read from its folder while it runs or after.

Knows the journal's tables and what a failed line's message is; writes nothing.

INVARIANT: what it says was true at one moment.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchllm.offline.journal.database import clock_second, damaged, database_path, open_reader

RECENT_S = 300
"""What `JobStatus.recent_speed` looks back."""
NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was recorded over a time of at least one second."""

    elapsed_s: float
    rows_per_s: float
    tokens_per_s: float
    """Tokens of prompts and outputs together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureKind:
    """Rows that failed with the same code.

    Attributes:
        code: Stable name of the reason.
        num_rows: How many.
        examples: Number, from 0, and message of the first few.
    """

    code: str
    num_rows: int
    examples: list[tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """How far a job is.

    Attributes:
        command: What was asked for.
        notes: Small facts by name, e.g. ``num_rows``.
        writer_pid: The process that runs the job now, 0 where it is not known; None if none does.
        num_finished: Rows with a result.
        num_failed: Those of them whose result is a failure.
        num_prompt_tokens: Prompt tokens of rows with a result.
        num_output_tokens: Output tokens of rows with a result.
        recent_speed: Over the last `RECENT_S` seconds of the last run that recorded anything.
        whole_speed: Over all runs, the time between them left out.
        failures: What failed, the most frequent first.
        events: Unix seconds, kind and detail, oldest first.
    """

    command: dict[str, Any]
    notes: dict[str, Any]
    writer_pid: int | None
    num_finished: int
    num_failed: int
    num_prompt_tokens: int
    num_output_tokens: int
    recent_speed: Speed
    whole_speed: Speed
    failures: list[FailureKind]
    events: list[tuple[float, str, str]]


def read_status(folder: Path) -> JobStatus:
    """How far the job in a folder is; only reads, also while it runs.

    Raises:
        ConfigError: There is no job.
        JournalError: Its journal cannot be read.
    """
    with open_reader(folder) as (database, writer_pid):
        try:
            return _read_status(database, writer_pid)
        except (TypeError, ValueError, OverflowError) as error:  # a value of another kind than was written
            raise damaged(database_path(folder), str(error)) from error


def _read_status(database: sqlite3.Connection, writer_pid: int | None) -> JobStatus:
    database.execute("BEGIN")  # all of it at one moment
    recent_speed, whole_speed = _speeds(database, clock_second() if writer_pid is not None else None)
    num_finished, num_failed, num_prompt_tokens, num_output_tokens, command = database.execute(
        "SELECT num_rows, num_failed, num_prompt_tokens, num_output_tokens, command FROM total, job"
    ).fetchone()
    return JobStatus(
        command=json.loads(command),
        notes={key: json.loads(value) for key, value in database.execute("SELECT key, value FROM note")},
        writer_pid=writer_pid,
        num_finished=num_finished,
        num_failed=num_failed,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        recent_speed=recent_speed,
        whole_speed=whole_speed,
        failures=_failures(database),
        events=database.execute("SELECT at, kind, detail FROM event ORDER BY rowid").fetchall(),
    )


def _speeds(database: sqlite3.Connection, now: float | None) -> tuple[Speed, Speed]:
    """Speed over the last minutes of the last run, which goes on until now if it is running, and over all runs."""
    runs = database.execute(
        "SELECT run, min(second), max(second), sum(num_rows), sum(num_tokens) FROM progress GROUP BY run ORDER BY run"
    ).fetchall()
    if not runs:
        return _speed(0, 0, 0), _speed(0, 0, 0)
    run, start, end, _, _ = runs[-1]
    end = end if now is None else max(now, end)
    recent_start = max(start, end - RECENT_S)
    recent_rows, recent_tokens = database.execute(
        "SELECT coalesce(sum(num_rows), 0), coalesce(sum(num_tokens), 0) FROM progress WHERE run = ? AND second >= ?",
        (run, recent_start),
    ).fetchone()
    elapsed = sum(last - first for _, first, last, _, _ in runs[:-1]) + end - start
    whole = _speed(sum(row[3] for row in runs), sum(row[4] for row in runs), elapsed)
    return _speed(recent_rows, recent_tokens, end - recent_start), whole


def _speed(num_rows: int, num_tokens: int, elapsed_s: float) -> Speed:
    elapsed_s = max(elapsed_s, 1.0)
    return Speed(elapsed_s=elapsed_s, rows_per_s=num_rows / elapsed_s, tokens_per_s=num_tokens / elapsed_s)


def _failures(database: sqlite3.Connection) -> list[FailureKind]:
    counts = database.execute("SELECT code, count(*) FROM result WHERE is_failed GROUP BY code ORDER BY 2 DESC, 1")
    query = "SELECT idx, line FROM result WHERE is_failed AND code = ? ORDER BY idx LIMIT ?"
    return [
        FailureKind(
            code=code,
            num_rows=num_rows,
            examples=[(index, _message(line)) for index, line in database.execute(query, (code, NUM_EXAMPLES))],
        )
        for code, num_rows in counts.fetchall()
    ]


def _message(line: bytes) -> str:
    """What a failed line says; all of the line where it says nothing."""
    try:
        record = json.loads(line)
        return str((record.get("error") or record["response"]["body"]["error"])["message"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return line.decode(errors="replace")
