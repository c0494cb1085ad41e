"""A job of `batchllm run` on the instant engine that meets a fault, and is called again when it is mended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.cli.jobs import Argument, Done, SubmissionLog, batchllm, ids_of, rows_of, write_rows

NUM_ROWS = 900
AT = 600
"""Answers at which a fault in mid-run comes: after a commit or two, and before the last."""
IDS = [f"r{i}" for i in range(NUM_ROWS)]


class FaultyJob:
    """The job.

    Attributes:
        base: A folder without faults.
        disk: A small file system of its own, where one was mounted.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.disk = base / "disk"
        self.disk.mkdir(exist_ok=True)
        self.filler = self.disk / "filler"
        self.source = write_rows(base / "in.jsonl", rows_of(NUM_ROWS))
        self.log = SubmissionLog(base / "log.txt")

    @property
    def fill(self) -> str:
        """A command that leaves no byte on the disk."""
        return f"cat /dev/zero > {self.filler} 2> /dev/null"

    def run(self, *flags: Argument, **settings: Any) -> Done:
        return batchllm("run", *flags, log=self.log.path, **settings)

    def fail(self, *flags: Argument, at: int = AT, **settings: Any) -> str:
        """Runs into the fault; what is said is one message."""
        said = self.run("-i", self.source, *flags, batch=10, at=at, **settings).check(2).stderr
        assert said.startswith("batchllm: ")
        assert len(said.splitlines()) <= 2, said
        self.log.take()
        return said

    def go_on(self, recorded: set[int], *flags: Argument, out: Path) -> None:
        """The same command answers all other rows, and writes each row once."""
        self.run("-i", self.source, *flags).check(0)
        asked = self.log.take()
        asked.pop("start", None)
        assert asked == {str(i): 1 for i in range(NUM_ROWS) if i not in recorded}
        in_order = sorted if "finished" in flags else list
        assert in_order(ids_of(out)) == in_order(IDS)
        assert not [name for name in os.listdir(out.parent) if name.endswith((".tmp", ".unfinished"))]
