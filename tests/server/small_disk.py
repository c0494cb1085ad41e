"""A storage on a small disk, in a process of its own (`tests.mounted_disk`)."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from batchllm.server import BatchOptions, dispatcher
from tests.cli.instant_engine import Settings
from tests.server.instant_server import Api, SharedRuntime


class SmallDisk:
    """A small disk with a storage."""

    def __init__(self, base: Path) -> None:
        self.folder = base / "disk"
        self.filler = self.folder / "filler"
        dispatcher._RETRY_AFTER_S = 0.2

    def serve(self, settings: Settings) -> Api:
        return Api(BatchOptions(storage=self.folder / "storage"), SharedRuntime(settings))

    def fill(self) -> None:
        """Leaves no byte on it."""
        with self.filler.open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def check_whole(self) -> None:
        with closing(sqlite3.connect(self.folder / "storage" / "batches.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
