"""The tiles of one step: which query rows read which KV positions, cut so that all processors have the same to do.

Knows: the layout of the step, tile sizes, how many programs will run. Must not know: torch, triton, any tensor.
Invariant: every (query token, position it may read) is in exactly one tile, and a query token's tiles write its
partial results into neighbouring slots, in the order outer segments, inner segments, private part.

The query rows of a piece (`pieces.py`) are cut into row blocks, each of which loads the KV once for all its rows, and
its KV range into splits. A segment with more readers than ``rows_wide`` is loaded by several row blocks. They stand
side by side, so that the first load comes from memory and the others from the cache that all processors share.
Splitting a long prefix is what the BatchLLM kernel leaves open (paper, section 5: a common part much longer than the
distinct parts needs split-K).

Rows are numbered in the order of the layout, in which the readers of every segment are neighbours; the batch index of
each row stands in ``q_rows``. As the readers of a segment are cut at the same KV positions, each of them has the same
number of partial results before the segment's: one number per tile, and no list of slots per row, is enough.

Legend of shapes: S sequences in the step, G segments, P pieces, T query tokens, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.attention.layout import AttentionLayout
from batchllm.attention.pieces import Pieces, indptr, ordered_rows, row_positions, sum_of_enclosing, within
from batchllm.tokens import Int32Array, Int64Array

# Columns of a tile: first row, number of rows, row of the request-to-token table, KV positions [start, end), and the
# slot of its partial result, counted from the first slot of each of its rows. Two are spare: 32 bytes load at once.
TILE_FIELDS = 8

# A tile of many rows takes about so much longer per KV token than one of few.
_WIDE_COST = 2


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a step is cut.

    Attributes:
        rows_wide: Query tokens of a wide tile (each with all query heads of one KV head).
        rows_narrow: Query tokens of a narrow tile, for blocks that are not larger.
        block_n: KV tokens read at a time; splits are multiples of it.
        min_split: A KV range is not cut into splits shorter than this.
        min_split_wide: The same where rows are many: their partial results cost more than the KV they read.
        target_tiles: So many tiles, over all KV heads together, keep the device busy to the end.
    """

    rows_wide: int
    rows_narrow: int
    block_n: int
    min_split: int
    min_split_wide: int
    target_tiles: int


@dataclass(frozen=True, slots=True)
class WorkList:
    """What the device needs to know of a step.

    Attributes:
        tiles: [N, TILE_FIELDS] wide ones first, then narrow ones, long before short. Tiles of one KV range, which are
            row blocks of the same piece, are neighbours, so that programs read it at the same time.
        num_wide: How many of them are wide.
        q_rows: [T] batch index of each row.
        q_pos: [T] position of each row in its sequence.
        slot_indptr: [T + 1] partial results of row ``r`` are in slots ``[slot_indptr[r], slot_indptr[r + 1])``.
    """

    tiles: Int32Array
    num_wide: int
    q_rows: Int32Array
    q_pos: Int32Array
    slot_indptr: Int32Array

    @property
    def num_slots(self) -> int:
        return int(self.slot_indptr[-1])


def build_work_list(
    layout: AttentionLayout, shape: TileShape, num_kv_heads: int, max_slots: int | None = None
) -> WorkList:
    """Cut a step into tiles.

    Args:
        layout: The step.
        shape: Sizes of the tiles.
        num_kv_heads: Every tile is worked through once for each.
        max_slots: Upper bound for the partial results; ranges are then split less than would be best.

    Raises:
        ValueError: Even without any split there are more partial results than ``max_slots``.
    """
    _, q_rows = ordered_rows(layout)
    q_pos = row_positions(layout)
    pieces = Pieces.of(layout)
    split_len = _split_len(pieces, shape, num_kv_heads)
    while True:
        tiles, num_wide, slots_per_row = _cut(layout, pieces, q_pos, split_len, shape)
        num_slots = int(slots_per_row.sum())
        if max_slots is None or num_slots <= max_slots:
            break
        if (split_len >= pieces.end - pieces.start).all():
            raise ValueError(f"the step has {num_slots} partial results, but there is room for {max_slots}")
        split_len = 2 * split_len
    return WorkList(
        tiles, num_wide, q_rows.astype(np.int32), q_pos.astype(np.int32), indptr(slots_per_row).astype(np.int32)
    )


def _rows_per_block(pieces: Pieces, shape: TileShape) -> Int64Array:
    return np.where(pieces.num_rows > shape.rows_narrow, shape.rows_wide, shape.rows_narrow)


def _split_len(pieces: Pieces, shape: TileShape, num_kv_heads: int) -> Int64Array:
    """[P] longest split of each piece, so that the tiles are about ``target_tiles`` of equal cost."""
    is_wide = pieces.num_rows > shape.rows_narrow
    num_blocks = -(-pieces.num_rows // _rows_per_block(pieces, shape))
    cost = np.where(is_wide, _WIDE_COST, 1)
    total = int((num_blocks * (pieces.end - pieces.start) * cost).sum()) * num_kv_heads
    share = -(-total // (shape.target_tiles * cost))
    split_len: Int64Array = np.maximum(share, np.where(is_wide, shape.min_split_wide, shape.min_split))
    return split_len


def _cut(
    layout: AttentionLayout, pieces: Pieces, q_pos: Int64Array, split_len: Int64Array, shape: TileShape
) -> tuple[Int32Array, int, Int64Array]:
    """Tiles, how many are wide, and the number of partial results of each row."""
    num_segments = len(layout.segment_readers)
    rows_per_block = _rows_per_block(pieces, shape)
    num_blocks = -(-pieces.num_rows // rows_per_block)
    piece = np.repeat(np.arange(len(num_blocks)), num_blocks)
    first = within(num_blocks) * rows_per_block[piece]
    block_rows = np.minimum(rows_per_block[piece], pieces.num_rows[piece] - first)
    block_first = pieces.first_row[piece] + first
    kv_start = pieces.start[piece]
    # No row of the block reads beyond the last row's own position. Segments end before any of their readers' rows.
    kv_end = np.minimum(pieces.end[piece], q_pos[block_first + block_rows - 1] + 1)

    # Splits of the same length rather than a short one at the end.
    kv_len = kv_end - kv_start
    num_splits = -(-kv_len // split_len[piece])
    block_split = -(-kv_len // np.maximum(num_splits, 1))
    block_split = np.maximum(-(-block_split // shape.block_n) * shape.block_n, 1)
    num_splits = -(-kv_len // block_split)

    splits_of_segment = np.zeros(num_segments, np.int64)
    is_shared = piece < num_segments
    splits_of_segment[piece[is_shared]] = num_splits[is_shared]
    before, shared_slots = sum_of_enclosing(layout, splits_of_segment)
    slots_per_row = np.repeat(shared_slots, pieces.num_rows[num_segments:])
    slots_per_row += np.repeat(num_splits[~is_shared], block_rows[~is_shared])

    block = np.repeat(np.arange(len(num_splits)), num_splits)
    split = within(num_splits)
    start = kv_start[block] + split * block_split[block]
    end = np.minimum(start + block_split[block], kv_end[block])
    tile_is_wide = (block_rows > shape.rows_narrow)[block]
    tiles = np.zeros((len(block), TILE_FIELDS), np.int32)
    fields = (block_first, block_rows, pieces.table_row[piece], np.concatenate([before, shared_slots])[piece])
    for column, field in zip((0, 1, 2, 5), fields, strict=True):
        tiles[:, column] = field[block]
    tiles[:, 3], tiles[:, 4] = start, end
    tiles[:, 5] += split.astype(np.int32)
    longest_first = np.lexsort((block, start, piece[block], start - end, ~tile_is_wide))
    return tiles[longest_first], int(tile_is_wide.sum()), slots_per_row
