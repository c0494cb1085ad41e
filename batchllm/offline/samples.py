"""Samples of rows, by number: every row of a token table is one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.tokens import Int64Array


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows of a token table: of which row of the job is each, and which of its samples?

    Attributes:
        row_of: Row number of each, int64[num_samples]; None where it is the row of that number.
        sample_of: Which of its row's samples each is, int64[num_samples]; None where all are the first.
        num_samples: How many there are.
    """

    row_of: Int64Array | None
    sample_of: Int64Array | None
    num_samples: int

    def all_rows(self) -> Int64Array:
        """Row number of every row of the table."""
        return np.arange(self.num_samples, dtype=np.int64) if self.row_of is None else self.row_of

    def rows(self, table_rows: Int64Array) -> Int64Array:
        """Row numbers of these rows of the table."""
        return table_rows if self.row_of is None else self.row_of[table_rows]

    def samples(self, table_rows: Int64Array) -> Int64Array:
        """Which of its row's samples each of these is."""
        return np.zeros(len(table_rows), np.int64) if self.sample_of is None else self.sample_of[table_rows]
