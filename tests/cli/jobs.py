"""Jobs for the tests of the command: rows in, the command on the instant engine, and what it leaves.

Knows how a process is started and what files a job has; claims nothing.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchllm.offline.journal import JobStatus, read_status
from tests import forked
from tests.cli.instant_engine import Settings
from tests.environment import of_user

ENGINE = Path(__file__).with_name("instant_engine.py")
TIMEOUT_S = 60
"""Of a command that ought to end in a second: one that hangs is a failure, not a hung test."""

Argument = str | Path


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    def check(self, status: int) -> Done:
        """It ended as expected, and without a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.status == status, self.stderr
        return self


def arguments_of(command: Sequence[Argument]) -> list[str]:
    """The command line of the command on the instant engine, for a shell: from a fresh interpreter."""
    return [sys.executable, str(ENGINE), *map(str, command)]


def environment_of(settings: Settings) -> dict[str, str]:
    return of_user() | settings.to_environment()


def batchllm(*command: Argument, stdin: bytes = b"", cwd: Path | None = None, **settings: Any) -> Done:
    """Runs the command in a process of its own; keywords are `Settings`."""
    done = forked.run(
        "tests.cli.instant_engine:main",
        [str(argument) for argument in command],
        input=stdin,
        timeout=TIMEOUT_S,
        cwd=cwd,
        environment=environment_of(Settings(**settings)),
    )
    return Done(done.returncode, done.stdout, done.stderr)


def rows_of(num_rows: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Rows whose prompts end with their numbers; every ten of them share the tokens before."""
    return [{"id": f"r{i}", "input_ids": [2000 + i // 10, 2500, i]} for i in range(first, first + num_rows)]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_bytes(lines_of(rows))
    return path


def lines_of(rows: Sequence[Any]) -> bytes:
    return b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids_of(path: Path) -> list[Any]:
    return [line["id"] for line in read_lines(path)]


def status_of(folder: Path) -> JobStatus:
    return read_status(folder)


def recorded_rows(folder: Path) -> set[int]:
    """Rows that a job's journal has, by the numbers at the ends of their prompts (`rows_of`)."""
    import sqlite3

    database = sqlite3.connect(f"file:{folder / 'journal.db'}?mode=ro", uri=True)
    try:
        return {index for (index,) in database.execute("SELECT idx FROM result")}
    finally:
        database.close()


class SubmissionLog:
    """What engines were asked for, from one run of a job to the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_read = 0

    def take(self) -> Counter[str]:
        """How often each last token was submitted since the last look; ``start`` counts engines."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        taken, self._num_read = Counter(lines[self._num_read :]), len(lines)
        return taken
