"""Who reads which KV in one step: shared segments, read once for all their readers, and private parts.

Planned once a step, on the host; every layer and every backend works through the same layout. Follows the
plan / run split of FlashInfer's wrappers and the two parts of BatchLLM's kernel (paper, section 5), for any
number of nested segments.

Legend of shapes: S sequences in the step, G segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm.attention.segments import deepest_cached, plan_segments
from batchllm.errors import LayoutError, PlanError
from batchllm.tokens import Int32Array


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """One step. Slots of KV are named by the request-to-token table: ``table[row, position]``.

    A sequence is what one request does in the step: one query token where it decodes, several where its prompt
    is computed. Query token ``j`` of the ``n`` of sequence ``s`` stands at position ``kv_len[s] - n + j`` and reads
    all positions up to its own: first those of the segments that hold ``s``, one inside the other from position
    0 on without a gap, then from ``private_start[s]`` on by itself.

    Attributes:
        table_rows: [S] row of each sequence in the request-to-token table.
        qo_indptr: [S + 1] query tokens of sequence ``s`` are ``[qo_indptr[s], qo_indptr[s + 1])`` of the batch.
        kv_len: [S] tokens of each sequence, those of this step included.
        order: [S] the sequences so that the readers of each segment are neighbours.
        private_start: [S] the first position that a sequence reads by itself; never beyond its first query token.
        segment_readers: [G, 2] the readers of a segment are ``order[first:last]``; at least two.
        segment_span: [G, 2] positions ``[start, end)``; segments come outer before inner.
        segment_table_row: [G] a table row that holds the segment's slots.
    """

    table_rows: Int32Array
    qo_indptr: Int32Array
    kv_len: Int32Array
    order: Int32Array
    private_start: Int32Array
    segment_readers: Int32Array
    segment_span: Int32Array
    segment_table_row: Int32Array

    @property
    def num_kv_read_tokens(self) -> int:
        """KV tokens that the step reads, each segment once."""
        num_shared = (self.segment_span[:, 1] - self.segment_span[:, 0]).sum()
        return int(num_shared + (self.kv_len - self.private_start).sum())


class PrefixPaths:
    """The planned prefixes that sequences may share: a parent and an end position for each id.

    Ids are dense, from 0 on. A prefix that was released keeps its id while another lives below it, then the id
    is used again: prefixes may be released in any order. No path is stored, only the parent, so memory is a few
    bytes an id however deep the tree; `plan_layout` climbs each prefix that is in use once a step.
    """

    def __init__(self) -> None:
        self._parent = np.full(64, -1, np.int32)
        self._end = np.zeros(64, np.int32)
        # For `plan_layout`: number of a prefix within a step; -1 between steps.
        self._number = np.full(64, -1, np.int32)
        self._num_children: list[int] = []
        self._is_released: list[bool] = []
        self._free_ids: list[int] = []

    def __len__(self) -> int:
        """Ids given out so far, those that wait for reuse included."""
        return len(self._is_released)

    def add(self, parent: int, end: int) -> int:
        """Add a prefix.

        Args:
            parent: Id of the prefix that it extends, or -1.
            end: Tokens of the prefix, all of its parent's included.

        Returns:
            Its id.

        Raises:
            PlanError: The parent is unknown or was released, or the prefix is not longer than it.
        """
        if parent != -1:
            self._check_is_held(parent)
        parent_end = int(self._end[parent]) if parent >= 0 else 0
        if end <= parent_end:
            raise PlanError(f"a prefix of {end} tokens cannot extend prefix {parent}, which has {parent_end}")
        if self._free_ids:
            prefix_id = self._free_ids.pop()
        else:
            prefix_id = len(self)
            if prefix_id == len(self._end):
                self._grow()
            self._num_children.append(0)
            self._is_released.append(False)
        self._is_released[prefix_id] = False
        self._parent[prefix_id], self._end[prefix_id] = parent, end
        if parent >= 0:
            self._num_children[parent] += 1
        return prefix_id

    def release(self, prefix_id: int) -> None:
        """Give a prefix back that no sequence reads any more.

        Raises:
            PlanError: There is no such prefix, or it was released before.
        """
        self._check_is_held(prefix_id)
        self._is_released[prefix_id] = True
        while prefix_id >= 0 and self._is_released[prefix_id] and self._num_children[prefix_id] == 0:
            parent = int(self._parent[prefix_id])
            # An end of 0 marks an id that is free.
            self._parent[prefix_id], self._end[prefix_id] = -1, 0
            self._free_ids.append(prefix_id)
            if parent >= 0:
                self._num_children[parent] -= 1
            prefix_id = parent

    def _check_is_held(self, prefix_id: int) -> None:
        if not 0 <= prefix_id < len(self) or self._is_released[prefix_id]:
            raise PlanError(f"prefix {prefix_id} was never added, or has been released")

    def _grow(self) -> None:
        more = len(self._end)
        self._parent = np.append(self._parent, np.full(more, -1, np.int32))
        self._end = np.append(self._end, np.zeros(more, np.int32))
        self._number = np.append(self._number, np.full(more, -1, np.int32))


def plan_layout(
    *,
    table_rows: Int32Array,
    qo_len: Int32Array,
    kv_len: Int32Array,
    leaf: Int32Array,
    paths: PrefixPaths,
    min_segment_len: int = 1,
    max_nested_segments: int = 8,
) -> AttentionLayout:
    """Which sequences of a step read which KV together.

    A prefix counts for a sequence if all its KV was in the cache before the step, i.e. it ends at or before position
    ``kv_len - qo_len``. Prefixes, one inside the other, with the same readers become one segment; one reader is no
    segment. A segment shorter than ``min_segment_len`` is left to what is inside: each inner segment, and each
    reader that is in none, starts where the segment around the short one ends.

    Where more than ``max_nested_segments`` would hold one sequence, the least length of a segment is doubled for
    the step until no sequence is in more: partial results of a step are bounded, and the segments kept are spread
    over the positions.

    Args:
        table_rows: [S] row of each sequence in the request-to-token table.
        qo_len: [S] query tokens of each sequence.
        kv_len: [S] tokens of each sequence, query tokens included.
        leaf: [S] id of the deepest planned prefix of each sequence, or -1.
        paths: Where the ids are from.
        min_segment_len: Tokens, at least 1, which merges nothing.
        max_nested_segments: At least 1.

    Raises:
        LayoutError: A sequence names a prefix that is not there, or has fewer tokens than query tokens.
    """
    # Copies: callers change theirs in place while a layout is in use.
    rows, qo, kv, leaves = (np.array(array, np.int32) for array in (table_rows, qo_len, kv_len, leaf))
    if not len(rows) == len(qo) == len(kv) == len(leaves):
        raise LayoutError(f"{len(rows)} table rows, {len(qo)} and {len(kv)} lengths, {len(leaves)} prefixes")
    if min_segment_len < 1 or max_nested_segments < 1:
        raise LayoutError(
            f"min_segment_len {min_segment_len} and max_nested_segments {max_nested_segments} must be at least 1"
        )
    node = np.empty(len(rows), np.int32)
    wrong = deepest_cached(paths._parent, paths._end, leaves, kv, qo, node)
    if wrong >= 0:
        raise LayoutError(
            f"table row {rows[wrong]}: {qo[wrong]} query tokens, {kv[wrong]} tokens, prefix {leaves[wrong]}: "
            f"lengths must not be negative, query tokens are among the tokens, the prefix must be added and held"
        )
    return AttentionLayout(
        *plan_segments(
            rows, qo, kv, node, paths._parent, paths._end, paths._number, min_segment_len, max_nested_segments
        )
    )


def check_layout(layout: AttentionLayout, table: Int32Array, *, is_thorough: bool = False) -> None:
    """Check a layout in itself and against the request-to-token table.

    Linear in readers of segments; with ``is_thorough`` in the positions that they read.

    Args:
        layout: The layout of one step.
        table: [rows, positions] KV slots.
        is_thorough: Compare the slots of a segment's readers at all of its positions, not only the first and last.

    Raises:
        LayoutError: Names the table row, and the segment where one is at fault.
    """
    _check_sequences(layout, table)
    if len(layout.segment_span):
        _check_segments(layout, table)
    # Each pair of a segment and one of its readers, outer segments first.
    num_readers = layout.segment_readers[:, 1] - layout.segment_readers[:, 0]
    segment = np.repeat(np.arange(len(num_readers)), num_readers)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(num_readers) - num_readers, num_readers)
    sequence = layout.order[layout.segment_readers[segment, 0] + within]
    _check_coverage(layout, segment, sequence)
    _check_slots(layout, table, segment, sequence, is_thorough)


def _check_sequences(layout: AttentionLayout, table: Int32Array) -> None:
    rows, kv_len = layout.table_rows, layout.kv_len
    num_sequences = len(rows)
    shapes = {
        "qo_indptr": (num_sequences + 1,),
        "kv_len": (num_sequences,),
        "order": (num_sequences,),
        "private_start": (num_sequences,),
        "segment_readers": (len(layout.segment_span), 2),
        "segment_span": (len(layout.segment_span), 2),
        "segment_table_row": (len(layout.segment_span),),
    }
    for name, shape in shapes.items():
        if getattr(layout, name).shape != shape:
            raise LayoutError(f"{name} of {num_sequences} sequences has the shape {getattr(layout, name).shape}")
    if layout.qo_indptr[0] != 0:
        raise LayoutError(f"qo_indptr starts at {layout.qo_indptr[0]}, not at 0")
    if np.any(np.sort(layout.order) != np.arange(num_sequences)):
        raise LayoutError(f"order does not hold each of the {num_sequences} sequences once")
    qo_len = np.diff(layout.qo_indptr)
    private_start = layout.private_start
    _require(rows, (rows >= 0) & (rows < len(table)), f"is none of the table's {len(table)}")
    _require(rows, qo_len >= 0, "qo_indptr decreases: {} query tokens", qo_len)
    _require(rows, kv_len <= table.shape[1], f"{{}} tokens in a table of {table.shape[1]} positions", kv_len)
    _require(rows, qo_len <= kv_len, "{} query tokens of {} tokens", qo_len, kv_len)
    is_early = (private_start >= 0) & (private_start <= kv_len - qo_len)
    _require(
        rows,
        is_early,
        "reads by itself from position {} on, its first query token is at {}",
        private_start,
        kv_len - qo_len,
    )


def _check_segments(layout: AttentionLayout, table: Int32Array) -> None:
    num_sequences = len(layout.order)
    rows, (first, last), (start, end) = layout.segment_table_row, layout.segment_readers.T, layout.segment_span.T
    number = np.arange(len(rows))
    _require(rows, (rows >= 0) & (rows < len(table)), f"of segment {{}} is none of the table's {len(table)}", number)
    is_group = (first >= 0) & (last - first >= 2) & (last <= num_sequences)
    _require(rows, is_group, f"segment {{}} has readers {{}} to {{}} of {num_sequences}", number, first, last)
    is_inside = (start >= 0) & (start < end) & (end <= table.shape[1])
    _require(rows, is_inside, f"segment {{}} spans [{{}}, {{}}) of {table.shape[1]} positions", number, start, end)


def _check_coverage(layout: AttentionLayout, segment: npt.NDArray[np.intp], sequence: Int32Array) -> None:
    """Segments of a sequence follow one another from position 0 to its private part."""
    by_sequence = np.argsort(sequence, kind="stable")
    segment, sequence = segment[by_sequence], sequence[by_sequence]
    start, end = layout.segment_span[segment].T
    is_first = np.append(True, sequence[1:] != sequence[:-1])[: len(sequence)]
    before = np.where(is_first, 0, np.append(0, end[:-1])[: len(end)])
    rows = layout.table_rows[sequence]
    _require(
        rows, start == before, "segment {} starts at position {}, what is before it ends at {}", segment, start, before
    )
    covered = np.zeros(len(layout.order), np.int32)
    # Of several values for one index the last one stays: the innermost segment's.
    covered[sequence] = end
    message = "its segments end at position {}, its private part starts at {}"
    _require(layout.table_rows, covered == layout.private_start, message, covered, layout.private_start)


def _check_slots(
    layout: AttentionLayout,
    table: Int32Array,
    segment: npt.NDArray[np.intp],
    sequence: Int32Array,
    is_thorough: bool,
) -> None:
    rows, source = layout.table_rows[sequence], layout.segment_table_row[segment]
    start, end = layout.segment_span[segment].T
    message = "slot {} at position {}, but row {} of segment {} has slot {}"
    for position in (start, end - 1):
        slot, expected = table[rows, position], table[source, position]
        _require(rows, slot == expected, message, slot, position, source, segment, expected)
    if not is_thorough:
        return
    for row, source_row, g in zip(rows.tolist(), source.tolist(), segment.tolist(), strict=True):
        first, last = layout.segment_span[g].tolist()
        slots, expected = table[row, first:last], table[source_row, first:last]
        where = np.arange(first, last)
        _require(
            np.full(last - first, row),
            slots == expected,
            message,
            slots,
            where,
            np.full_like(where, source_row),
            np.full_like(where, g),
            expected,
        )


def _require(rows: npt.NDArray[Any], is_right: npt.NDArray[np.bool_], message: str, *values: npt.NDArray[Any]) -> None:
    """Raise with the message and values of the first that is not right."""
    if not is_right.all():
        wrong = int(np.argmin(is_right))
        raise LayoutError(f"table row {rows[wrong]}: " + message.format(*(value[wrong] for value in values)))
