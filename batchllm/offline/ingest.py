"""The rows of an input, once through: which of them still have to run.

A row with a result of an earlier run is passed over; one that cannot be read, or that takes another row's id, fails at
once; the others go on.

Knows rows and results; not plans or engines. Keeps 24 bytes a row.

INVARIANT: every row of the input is counted once, and is then done, failed, or handed on.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from batchllm.dataset import BadRow, Row, RowIds, duplicate_error, reject
from batchllm.errors import RowError
from batchllm.offline.encode import Encoded
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.job_rows import ENCODE_SLICE, JobRows
from batchllm.offline.row_spool import RowSpool
from batchllm.planner.shards import split_by_prefix
from batchllm.tokens import Int64Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intake:
    """What has come of an input.

    Attributes:
        job_rows: Rows that can run.
        left: Numbers of those of them that are to run, ascending; None for all.
    """

    job_rows: JobRows
    left: Int64Array | None

    def shards(self, max_tokens: int, page_size: int) -> tuple[list[Int64Array], int]:
        """The rows that are to run, in shards that fit in memory one after another.

        Args:
            max_tokens: Most tokens of a shard.
            page_size: Tokens of a KV page.

        Returns:
            Row numbers of each shard, and how many prompt tokens are computed more than once on their account.
        """
        rows = self.job_rows
        everything = np.arange(len(rows))
        shards = split_by_prefix(
            rows.store,
            max_shard_tokens=max_tokens,
            namespaces=rows.per_prompt(rows.namespace(everything)),
            num_samples=rows.per_prompt(rows.num_samples(everything) // rows.num_prompts),
            page_size=page_size,
        )
        left = everything if self.left is None else self.left
        row_shard = shards.row_shard[rows.first_prompt]  # a row with several prompts goes where its first one does
        chosen = [left[row_shard[left] == shard] for shard in range(shards.num_shards)]
        return [numbers for numbers in chosen if len(numbers)], shards.num_lost_tokens


class Ingest:
    """One pass over an input.

    Args:
        finished: Rows that have a result already, ascending positions in the input.
        fail: Called with each row that cannot run.
        spool: Takes the heads of the rows that run.
        identical: Finds rows that need not run; None where all shall run.

    Attributes:
        num_rows: Rows so far.
        read_s: Seconds that `load` has waited for rows.
    """

    def __init__(
        self,
        finished: Int64Array,
        fail: Callable[[BadRow], None],
        spool: RowSpool,
        identical: IdenticalRows | None = None,
    ) -> None:
        self._finished = array("q", finished.tobytes())
        self._fail = fail
        self._spool = spool
        self._identical = identical
        self._ids = RowIds()
        self._lines = array("q")
        self._next_finished = 0
        self.num_rows = 0
        self.read_s = 0.0

    def load(
        self,
        rows: Iterable[Row | BadRow],
        make_job_rows: Callable[[], JobRows],
        on_slice: Callable[[], None] = lambda: None,
    ) -> Intake | None:
        """Take rows in, tokenized and checked; those that cannot run fail.

        Args:
            rows: The rows of the input.
            make_job_rows: Called with the first row that has to run; makes what takes them in, empty.
            on_slice: Called now and then.

        Returns:
            What is to run; None where no row had to.
        """
        pending = self._pending(rows)
        first = next(pending, None)
        if first is None:
            return None
        job_rows = make_job_rows()
        self._tokenize(chain([first], pending), job_rows, on_slice)
        is_out = self._refuse_duplicates(job_rows)
        self._ids, self._lines = RowIds(), array("q")  # a job of millions of rows has better use for the memory
        if self._identical is not None:
            self._identical.find(np.flatnonzero(~is_out))
            is_out |= self._identical.is_follower
        return Intake(job_rows=job_rows, left=np.flatnonzero(~is_out) if is_out.any() else None)

    def _pending(self, rows: Iterable[Row | BadRow]) -> Iterator[Row]:
        """The rows that can be read and have no result yet."""
        for row in rows:
            index = row.index
            self.num_rows += 1
            self._ids.append(row.given_id)
            self._lines.append(row.line)
            if self._finished and self._has_result(index):
                continue
            if isinstance(row, BadRow):
                self._fail(row)
            else:
                yield row

    def _has_result(self, index: int) -> bool:
        finished, at = self._finished, self._next_finished
        while at < len(finished) and finished[at] < index:
            at += 1
        self._next_finished = at
        return at < len(finished) and finished[at] == index

    def _tokenize(self, pending: Iterator[Row], job_rows: JobRows, on_slice: Callable[[], None]) -> None:
        # The tokenizer works in another process, or without Python's lock: meanwhile the next rows are read.
        with ThreadPoolExecutor(1, thread_name_prefix="batchllm-encode") as encoder:
            rows: list[Row] = []
            encoded: Future[list[Encoded | RowError]] | None = None
            while True:
                next_rows = self._read(pending)
                waits_for, encoded = encoded, None
                if next_rows:
                    encoded = encoder.submit(job_rows.encode, [row.request for row in next_rows])
                if waits_for is not None:
                    self._take_in(rows, job_rows.take_in(waits_for.result()))
                    on_slice()
                if encoded is None:
                    break
                rows = next_rows
        self._spool.flush()

    def _take_in(self, rows: list[Row], errors: list[RowError | None]) -> None:
        for row, error in zip(rows, errors, strict=True):
            if error is None:
                self._spool.append(row.head)
            else:
                self._fail(reject(row.head, error))

    def _read(self, pending: Iterator[Row]) -> list[Row]:
        started = time.perf_counter()
        rows = list(islice(pending, ENCODE_SLICE))
        self.read_s += time.perf_counter() - started
        return rows

    def _refuse_duplicates(self, job_rows: JobRows) -> npt.NDArray[np.bool_]:
        """Rows that were taken in and have failed all the same: their id is another row's. Shape ``[num_rows]``."""
        is_refused = np.zeros(len(job_rows), bool)
        places = job_rows.places(np.arange(len(job_rows)))
        for duplicate, first in self._ids.find_duplicates():
            row = int(np.searchsorted(places, duplicate))
            if row < len(places) and places[row] == duplicate:  # else it has failed already, or is done
                is_refused[row] = True
                head = self._spool.read(row)
                self._fail(reject(head, duplicate_error(head.given_id, self._lines[first], head.kind)))
        return is_refused
