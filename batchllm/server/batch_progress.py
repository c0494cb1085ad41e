"""How far a running batch is, for whoever asks the API.

Knows counts; the runner does the counting.

INVARIANT: the record is behind what is recorded by at most about a second; what cannot be shown never stops the run.
"""

from __future__ import annotations

import logging
import sqlite3
import time

from batchllm.offline.progress import Progress
from batchllm.server.batch_store import BatchStore
from batchllm.server.metrics import BatchMetrics

logger = logging.getLogger(__name__)

SHOW_EVERY_S = 0.5


class BatchProgress(Progress):
    """Writes the counts of one batch into its record.

    Args:
        store: Has the record.
        batch_id: The batch.
        num_answered: Rows answered by earlier runs.
        num_failed: Rows failed in earlier runs.
        metrics: Counts the rows too, unless None.
    """

    def __init__(
        self, store: BatchStore, batch_id: str, *, num_answered: int, num_failed: int, metrics: BatchMetrics | None
    ) -> None:
        super().__init__(None, num_done_before=num_answered + num_failed, show=False)
        self._store = store
        self._batch_id = batch_id
        self._num_rows_answered = num_answered
        self._num_rows_failed = num_failed
        self._metrics = metrics
        self._is_shown = False
        self._shown_at = 0.0

    def update(self, *, num_rows: int = 0, num_failed: int = 0, **num_tokens: int) -> None:
        """Adds to the counts, as `Progress.update` does, and remembers that there is something to write."""
        super().update(num_rows=num_rows, num_failed=num_failed, **num_tokens)
        if num_rows:
            self._num_rows_answered += num_rows - num_failed
            self._num_rows_failed += num_failed
            self._is_shown = False
            if self._metrics is not None:
                self._metrics.add_rows(num_rows - num_failed, num_failed)

    def tick(self) -> None:
        """Lets time pass: writes at most every `SHOW_EVERY_S`."""
        if not self._is_shown and time.monotonic() - self._shown_at >= SHOW_EVERY_S:
            self.show()

    def show(self) -> None:
        """Write the counts now."""
        self._is_shown = True
        self._shown_at = time.monotonic()
        try:
            self._store.update(self._batch_id, num_answered=self._num_rows_answered, num_failed=self._num_rows_failed)
        except sqlite3.Error as error:
            logger.warning("%s: its counts cannot be written: %s", self._batch_id, error)
