"""What this process knows of the batches that it runs or has run lately, beside their records.

Knows counts and plans' summaries; not HTTP, and not the records.

INVARIANT: a batch that does not run holds none of its rows here, and no more than `_MAX_BATCHES` are remembered.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchllm.dataset import BadRow
from batchllm.offline.job import Job, JobMaker
from batchllm.offline.job_rows import JobRows
from batchllm.offline.recorder import Recorder
from batchllm.offline.runtime import Runtime
from batchllm.offline.stats import JobStats
from batchllm.planner import PrefixSummary

_MAX_BATCHES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCosts:
    """A batch as this process has run it: what its answers have cost, and what has failed.

    Attributes:
        is_whole: All that has run of it has run here.
        stats: Counts of the batch; tokens are counted as computed before their rows are answered.
        failed_by_code: Rows that have failed for each reason.
        first_failed: The first few of them.
        largest_prefixes: Prefixes of its plan that save most.
    """

    is_whole: bool
    stats: JobStats
    failed_by_code: Mapping[str, int]
    first_failed: Sequence[BadRow]
    largest_prefixes: Sequence[PrefixSummary]


@dataclass(slots=True)
class _Batch:
    is_whole: bool
    stats: JobStats = field(default_factory=JobStats)
    prefixes: Sequence[PrefixSummary] = ()
    failed_by_code: Mapping[str, int] = field(default_factory=dict)
    first_failed: Sequence[BadRow] = ()
    job: Job | None = None

    def all_stats(self) -> JobStats:
        return self.stats if self.job is None else self.stats + self.job.stats

    def all_prefixes(self) -> Sequence[PrefixSummary]:
        """Prefixes of the plan that saves most. A batch has several plans if it was planned in parts or again."""
        new = () if self.job is None else self.job.largest_prefixes
        return max(self.prefixes, new, key=lambda prefixes: sum(prefix.saved_tokens for prefix in prefixes))

    def settle(self) -> None:
        """Keep the numbers of the job and let it go."""
        self.stats, self.prefixes, self.job = self.all_stats(), self.all_prefixes(), None


class BatchActivity:
    """The batches. Threads that run them tell of them, any may ask."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._batches: OrderedDict[str, _Batch] = OrderedDict()

    def begin(self, batch_id: str, recorder: Recorder, *, is_first: bool) -> None:
        """Rows of a batch are about to run, for the first time if no row has a result."""
        with self._turn:
            batch = self._batches.setdefault(batch_id, _Batch(is_first))
            batch.failed_by_code, batch.first_failed = recorder.failed_by_code, recorder.first_failed
            self._batches.move_to_end(batch_id)
            while len(self._batches) > _MAX_BATCHES:
                self._batches.popitem(last=False)

    def make_job(self, batch_id: str, make_job: JobMaker, runtime: Runtime, rows: JobRows, **options: Any) -> Job:
        """Make a job of a batch, whose numbers count for it."""
        job = make_job(runtime, rows, **options)
        with self._turn:
            batch = self._batches.setdefault(batch_id, _Batch(is_whole=False))
            batch.settle()
            batch.job = job
        return job

    def end(self, batch_id: str) -> None:
        """Nothing of it runs any more."""
        with self._turn:
            if batch_id in self._batches:
                self._batches[batch_id].settle()

    def get(self, batch_id: str) -> BatchCosts | None:
        """What is known of a batch; None where this process has not run it, or long ago."""
        with self._turn:
            batch = self._batches.get(batch_id)
            if batch is None:
                return None
            return BatchCosts(
                is_whole=batch.is_whole,
                stats=batch.all_stats(),
                failed_by_code=dict(batch.failed_by_code),
                first_failed=list(batch.first_failed),
                largest_prefixes=batch.all_prefixes(),
            )

    def totals(self, batch_id: str) -> dict[str, int]:
        """Prompt tokens of a batch that has ended, ``prompt``, ``computed`` and ``optimal``; empty where not all of it
        has run here.
        """
        costs = self.get(batch_id)
        if costs is None or not costs.is_whole:
            return {}
        return {
            "prompt": costs.stats.num_prompt_tokens,
            "computed": costs.stats.num_computed_prompt_tokens,
            "optimal": costs.stats.num_optimal_prompt_tokens,
        }
