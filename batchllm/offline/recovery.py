"""What runs next, and what to suspect, when an engine dies under a job.

An engine that dies says nothing of which row killed it. Those in flight are run again by themselves, few at a time; if
it dies again, the few in flight at both deaths are set apart, and everything else goes on. Last, each of those runs
alone: an engine that dies under one row names it.

Knows row numbers only; not processes, files or clocks.

INVARIANT: every row is in exactly one piece of work, or has been taken out of it as finished or failed.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from batchllm.errors import BatchLLMError, EngineDiedError
from batchllm.tokens import Int64Array

NUM_NARROW = 64
"""Rows in flight at once while one of them is suspected."""
MAX_DEATHS_ALONE = 2
"""Engines that a row may take along, running alone, before it is given up: one may be bad luck."""

MAX_FRUITLESS_DEATHS = 5
"""Engines that may die one after the other, nothing settled between, before the job stops."""
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """Rows to run together.

    Attributes:
        rows: Row numbers, or None for all rows of the job.
        max_in_flight: Most of them submitted at once; None for as many as serve throughput.
    """

    rows: Int64Array | None
    max_in_flight: int | None = None


class WorkQueue:
    """Pieces of work, in the order in which they run.

    Args:
        works: What there is to do.
    """

    def __init__(self, works: list[Work]) -> None:
        self._works = deque(works)
        self._apart: list[int] = []
        self._deaths_alone: Counter[int] = Counter()

    def take(self) -> Work | None:
        """The next piece; rows set apart come last. None: nothing is left."""
        if self._works:
            return self._works.popleft()
        if self._apart:
            apart, self._apart = self._apart, []
            return Work(rows=np.array(apart, np.int64), max_in_flight=1)
        return None

    def add(self, rows: Int64Array) -> None:
        """These run again, behind what is waiting."""
        self._works.append(Work(rows=rows))

    def split_after_death(self, work: Work, unfinished: Int64Array, in_flight: Int64Array) -> list[int]:
        """The engine died under a piece of work: what is left of it goes back, the suspects apart from the others.

        Args:
            work: What ran.
            unfinished: Rows of it that have no result.
            in_flight: Those of them that had been submitted.

        Returns:
            Rows that are to be recorded as failed: the engine has died under them alone, twice.
        """
        in_flight = np.intersect1d(in_flight, unfinished)
        others = np.setdiff1d(unfinished, in_flight)
        failed: list[int] = []
        if work.max_in_flight is None:
            self._put_first(others, None)
            self._put_first(in_flight, NUM_NARROW)
        elif work.max_in_flight > 1:
            self._apart += in_flight.tolist()
            self._put_first(others, NUM_NARROW)
        else:
            self._put_first(others, 1)
            for row in in_flight.tolist():
                self._deaths_alone[row] += 1
                if self._deaths_alone[row] >= MAX_DEATHS_ALONE:
                    failed.append(row)
                else:
                    self._put_first(np.array([row]), 1)
        return failed

    def _put_first(self, rows: Int64Array, max_in_flight: int | None) -> None:
        if len(rows):
            self._works.appendleft(Work(rows=rows, max_in_flight=max_in_flight))


class RestartLimit:
    """How long to wait before an engine is started again, and when to stop trying.

    Args:
        max_fruitless: Engines that may die one after the other, nothing settled between.
    """

    def __init__(self, max_fruitless: int = MAX_FRUITLESS_DEATHS) -> None:
        self._max_fruitless = max_fruitless
        self.num_deaths = 0
        """Engines that have died."""
        self._num_fruitless = 0
        self._has_answered = False

    def answered(self) -> None:
        """A row has been answered."""
        self._has_answered = True
        self._num_fruitless = 0

    def condemned(self) -> None:
        """A row has been found to kill engines. That is progress, unless no engine has ever answered anything."""
        if self._has_answered:
            self._num_fruitless = 0

    def next_pause_s(self, death: BatchLLMError) -> float:
        """An engine has died, or did not start; seconds to wait before the next is tried.

        Raises:
            EngineDiedError: It is not worth trying again.
        """
        self.num_deaths += 1
        self._num_fruitless += 1
        if self._num_fruitless >= self._max_fruitless:
            raise EngineDiedError(
                f"the engine died {self._num_fruitless} times in a row before any row was answered; "
                f"the last time: {death}"
            ) from death
        return min(_FIRST_PAUSE_S * 2.0 ** (self._num_fruitless - 1), _LONGEST_PAUSE_S)
