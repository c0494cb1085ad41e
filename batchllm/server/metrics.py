"""Numbers of the batch API for Prometheus, beside those of the server.

Knows names of metrics; whoever runs the batches does the counting.

INVARIANT: nothing is registered before a `BatchMetrics` is made, and one process makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from batchllm.offline.stats import JobStats


class BatchMetrics:
    """The metrics.

    Args:
        registry: Where they are registered; the default one where none is given.
        job_stats: What all rows of all batches have cost so far; None where nobody counts it.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, job_stats: Callable[[], JobStats] | None = None
    ) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge

        registry = REGISTRY if registry is None else registry
        rows = Counter("batchllm_batch_rows", "Rows of batches that have a result.", ["outcome"], registry=registry)
        self._answered = rows.labels(outcome="answered")
        self._failed = rows.labels(outcome="failed")
        # With several processes each has a file of its own; only this one counts batches.
        self._batches = Gauge(
            "batchllm_batches", "Batches by status.", ["status"], registry=registry, multiprocess_mode="livemostrecent"
        )
        self._backlog = Gauge(
            "batchllm_batch_backlog_rows",
            "Rows of batches that have not ended, without a result.",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._job_stats = job_stats
        planned = Gauge(
            "batchllm_planned_prompt_tokens",
            "Prompt tokens of rows answered so far: all, those that had to be computed, those that were.",
            ["of"],
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._prompt, self._optimal, self._computed = map(planned.labels, ("prompts", "optimum", "computed"))
        self._upload_bytes = Counter("batchllm_batch_upload_bytes", "Bytes of files received.", registry=registry)

    def add_rows(self, num_answered: int, num_failed: int) -> None:
        """Rows have got their results."""
        self._answered.inc(num_answered)
        self._failed.inc(num_failed)

    def add_upload(self, num_bytes: int) -> None:
        """A file has been received."""
        self._upload_bytes.inc(num_bytes)

    def set_batches(self, num_by_status: Mapping[str, int], num_backlog_rows: int) -> None:
        """How many batches there are now, of every status, and how many of their rows have no result."""
        for status, num in num_by_status.items():
            self._batches.labels(status=status).set(num)
        self._backlog.set(num_backlog_rows)
        if self._job_stats is not None:
            stats = self._job_stats()
            self._prompt.set(stats.num_prompt_tokens)
            self._optimal.set(stats.num_optimal_prompt_tokens)
            self._computed.set(stats.num_computed_prompt_tokens)
