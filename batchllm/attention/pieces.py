"""The pieces of a step: a segment with the rows that read it, or a sequence with its private part.

Knows: layouts. Must not know: torch, how backends cut pieces further.
Invariant: rows are query tokens in the order of the layout, in which the readers of every segment are neighbours.

Legend of shapes: S sequences in the step, G segments, P = G + S pieces, T query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.attention.layout import AttentionLayout
from batchllm.tokens import Int64Array


@dataclass(frozen=True, slots=True)
class Pieces:
    """Segments, then private parts in the order of the layout; all [P]. They read positions ``[start, end)``."""

    first_row: Int64Array
    num_rows: Int64Array
    table_row: Int64Array
    start: Int64Array
    end: Int64Array

    @classmethod
    def of(cls, layout: AttentionLayout) -> Pieces:
        order = layout.order
        row_indptr, _ = ordered_rows(layout)
        first, last = layout.segment_readers.T
        first_row = np.concatenate([row_indptr[first], row_indptr[:-1]])
        return cls(
            first_row,
            np.concatenate([row_indptr[last], row_indptr[1:]]) - first_row,
            np.concatenate([layout.segment_table_row, layout.table_rows[order]]).astype(np.int64),
            np.concatenate([layout.segment_span[:, 0], layout.private_start[order]]).astype(np.int64),
            np.concatenate([layout.segment_span[:, 1], layout.kv_len[order]]).astype(np.int64),
        )


def ordered_rows(layout: AttentionLayout) -> tuple[Int64Array, Int64Array]:
    """[S + 1] where the rows of each sequence begin, in the layout's order; [T] the batch index of each row."""
    num_tokens = np.diff(layout.qo_indptr).astype(np.int64)[layout.order]
    return indptr(num_tokens), np.repeat(layout.qo_indptr[layout.order], num_tokens) + within(num_tokens)


def row_positions(layout: AttentionLayout) -> Int64Array:
    """[T] position in its sequence of each row, in the layout's order."""
    num_tokens = np.diff(layout.qo_indptr).astype(np.int64)[layout.order]
    return np.repeat(layout.kv_len[layout.order] - num_tokens, num_tokens) + within(num_tokens)


def indptr(counts: Int64Array) -> Int64Array:
    """0 and the running sums of the counts."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def within(counts: Int64Array) -> Int64Array:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    starts = indptr(counts)
    return np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], counts)


def sum_of_enclosing(layout: AttentionLayout, values: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Sums of a number for each segment: [G] over all segments around each segment; [S] around each sequence.

    The second is in the layout's order. Readers of two segments are nested or disjoint, so what encloses a segment is
    what opened before it and is still open where its readers begin.
    """
    first, last = layout.segment_readers[:, 0], layout.segment_readers[:, 1]
    outer_first = np.lexsort((layout.segment_span[:, 0], first))
    opened = np.empty_like(values)
    opened[outer_first] = np.cumsum(values[outer_first]) - values[outer_first]
    by_end = np.argsort(last, kind="stable")
    closed = indptr(values[by_end])[np.searchsorted(last[by_end], first, side="right")]
    num_sequences = len(layout.order)
    steps = np.bincount(first, values, num_sequences + 1) - np.bincount(last, values, num_sequences + 1)
    return opened - closed, np.cumsum(steps[:-1]).astype(np.int64)
