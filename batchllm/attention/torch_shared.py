"""Attention over shared prefixes in plain torch: what runs where the compiled kernels cannot.

Knows: the layout of a step (`plan`), and its tensors (`run`), on any device. Must not know: SGLang, instruction sets.
Invariant: sequences of about the same length take one matrix product together, and a layer's scores and gathered KV
never take more than some times 64 MiB, however long the step; beside them there are float32 copies of queries and
output, and, for the whole step, the slots of all pieces.

A step is cut into pieces: some rows (query tokens, neighbours in the layout's order) that read one range of positions
of a segment or of a private part. Pieces of about the same size are padded to one batch of matrix products. A row
has its pieces in successive waves, and partial results are merged wave by wave.

Legend of shapes: S sequences in the step, G segments, P pieces, T query tokens; in a batch B pieces of n rows and m
positions, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchllm.attention.layout import AttentionLayout
from batchllm.attention.merge_state import merge_states
from batchllm.attention.work_list import ordered_rows, sum_of_enclosing

Int64Array = npt.NDArray[np.int64]

# More rows make a product no faster, and in a prompt each block reads only as far as its last row sees.
_BLOCK_ROWS = 128
# Float32 numbers that a piece may take, scores, keys and values together: 64 MiB.
_MAX_PIECE_SIZE = 1 << 24
# The same for a batch of several pieces: 8 MiB stay in the last cache from one operation to the next.
_MAX_BATCH_SIZE = 1 << 21
# Rows times positions from which a piece is worth a product of its own, without padding.
_MIN_ALONE = 1 << 14


@dataclass(frozen=True, slots=True)
class _Pieces:
    """All [P]; ``wave``: how many pieces the rows have before this one. Rows are in the layout's order."""

    first_row: Int64Array
    num_rows: Int64Array
    table_row: Int64Array
    start: Int64Array
    end: Int64Array
    wave: Int64Array

    def take(self, index: Int64Array) -> _Pieces:
        fields = (self.first_row, self.num_rows, self.table_row, self.start, self.end, self.wave)
        return _Pieces(*(field[index] for field in fields))


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Pieces that are computed together. Padding repeats the last row and the last position of a piece.

    Attributes:
        tokens: int64[B * n] query token of each row.
        slots: int64[B, m].
        cache_rows: int64[B * num_kv_heads * m] keys of one head, numbered as in a contiguous cache.
        own: int64[B, n] position of a row's own token, counted from the first.
        num_visible: int64[B, n] positions that a row sees, from the first on, without a window.
        sees_all: Whether all of them see all m.
        is_first: Whether no row was in a batch before.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    cache_rows: torch.Tensor
    own: torch.Tensor
    num_visible: torch.Tensor
    sees_all: bool
    is_first: bool


class TorchSharedAttention:
    """`StepAttention` for any shape of heads and any float dtype; float64 is computed as such, others in float32."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Fix the shape of the heads.

        Args:
            num_heads: Query heads.
            num_kv_heads: KV heads.
            head_dim: Of queries, keys and values.

        Raises:
            ValueError: Query heads are no multiple of KV heads.
        """
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._num_tokens = 0
        self._batches: list[_Batch] = []

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Cut a step into batches of matrix products; as of `StepAttention`."""
        _, tokens = ordered_rows(layout)
        positions = _positions(layout)
        pieces = _cut(layout, positions, self._num_heads, self._sizes_of_position())
        self._num_tokens = len(tokens)
        self._batches = [
            self._make_batch(pieces.take(members), tokens, positions, table)
            for members in _group(pieces, self._num_heads, self._sizes_of_position())
        ]

    def _sizes_of_position(self) -> int:
        """Numbers that keys and values of a position are."""
        return 2 * self._num_kv_heads * self._head_dim

    def _make_batch(self, pieces: _Pieces, tokens: Int64Array, positions: Int64Array, table: torch.Tensor) -> _Batch:
        num_rows, length = int(pieces.num_rows.max()), pieces.end - pieces.start
        num_positions = int(length.max())
        rows = pieces.first_row[:, None] + np.minimum(np.arange(num_rows), pieces.num_rows[:, None] - 1)
        columns = pieces.start[:, None] + np.minimum(np.arange(num_positions), length[:, None] - 1)
        own = positions[rows] - pieces.start[:, None]
        num_visible = np.minimum(own + 1, length[:, None])

        device = table.device
        table_rows = torch.from_numpy(pieces.table_row).to(device)
        slots = table[table_rows[:, None], torch.from_numpy(columns).to(device)].long()
        heads = torch.arange(self._num_kv_heads, device=device)[:, None]
        return _Batch(
            tokens=torch.from_numpy(tokens[rows].reshape(-1)).to(device),
            slots=slots,
            cache_rows=(slots[:, None] * self._num_kv_heads + heads).reshape(-1),
            own=torch.from_numpy(own).to(device),
            num_visible=torch.from_numpy(num_visible).to(device),
            sees_all=bool((num_visible == num_positions).all()),
            is_first=bool(pieces.wave[0] == 0),
        )

    def run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        logit_cap: float = 0.0,
        window: int = 0,
    ) -> None:
        """Attention of one layer; as of `StepAttention`."""
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        scaled = query[: self._num_tokens].to(dtype) * scale
        out = torch.empty_like(scaled, memory_format=torch.contiguous_format)
        lse = out.new_empty(out.shape[:2])
        for batch in self._batches:
            part = self._attend(scaled, key_cache, value_cache, batch, logit_cap, window)
            if not batch.is_first:
                outs = torch.stack([out.index_select(0, batch.tokens), part[0]])
                part = merge_states(outs, torch.stack([lse.index_select(0, batch.tokens), part[1]]))
            out[batch.tokens], lse[batch.tokens] = part
        output[: self._num_tokens] = out

    def _attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: _Batch,
        logit_cap: float,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B * n, num_heads, head_dim] and log-sum-exp [B * n, num_heads] over the positions of a batch."""
        num_pieces, num_positions = batch.slots.shape
        heads, group = self._num_kv_heads, self._num_heads // self._num_kv_heads
        num_rows = len(batch.tokens) // num_pieces
        rows = query.index_select(0, batch.tokens).view(num_pieces, num_rows, heads, group, self._head_dim)
        rows = rows.transpose(1, 2).reshape(num_pieces, heads, num_rows * group, self._head_dim)
        scores = rows @ self._gather(key_cache, batch, query.dtype).transpose(-1, -2)
        if logit_cap:
            scores = torch.tanh(scores / logit_cap) * logit_cap
        if window or not batch.sees_all:
            # Made for every layer: kept, the masks of a step would be as large as its scores of one head.
            position = torch.arange(num_positions, device=query.device)
            is_hidden = position >= batch.num_visible[..., None]
            if window:
                is_hidden |= position <= batch.own[..., None] - window
            by_row = scores.view(num_pieces, heads, num_rows, group, num_positions)
            # Not -inf: a row may see nothing of a range of a long prompt; its result is to weigh nothing, not be NaN.
            by_row.masked_fill_(is_hidden[:, None, :, None], torch.finfo(scores.dtype).min)
        maximum = scores.amax(-1)
        weights = torch.softmax(scores, -1)
        # The weight of the largest score is 1 / sum(exp(score - maximum)): no second pass of exponentials.
        lse = maximum - weights.amax(-1).log()
        out = weights @ self._gather(value_cache, batch, query.dtype)
        out = out.view(num_pieces, heads, num_rows, group, self._head_dim).transpose(1, 2)
        lse = lse.view(num_pieces, heads, num_rows, group).transpose(1, 2)
        return out.reshape(-1, self._num_heads, self._head_dim), lse.reshape(-1, self._num_heads)

    def _gather(self, cache: torch.Tensor, batch: _Batch, dtype: torch.dtype) -> torch.Tensor:
        """[B, num_kv_heads, m, head_dim]."""
        num_pieces, num_positions = batch.slots.shape
        if cache.is_contiguous():
            # Rows of one head each come out in the order of the product, and `index_select` copies them whole.
            rows = cache.view(-1, self._head_dim).index_select(0, batch.cache_rows)
            return rows.view(num_pieces, self._num_kv_heads, num_positions, self._head_dim).to(dtype)
        return cache[batch.slots].to(dtype).transpose(1, 2)


def _positions(layout: AttentionLayout) -> Int64Array:
    """[T] position in its sequence of each row, in the layout's order."""
    num_tokens = np.diff(layout.qo_indptr).astype(np.int64)[layout.order]
    return np.repeat(layout.kv_len[layout.order] - num_tokens, num_tokens) + _within(num_tokens)


def _within(counts: Int64Array) -> Int64Array:
    """0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1, ..."""
    first = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(first, counts)


def _cut(layout: AttentionLayout, positions: Int64Array, num_heads: int, size_of_position: int) -> _Pieces:
    """Segments and private parts in blocks of rows and, where they are very long, ranges of positions."""
    order, num_segments = layout.order, len(layout.segment_span)
    row_indptr, _ = ordered_rows(layout)
    first, last = layout.segment_readers.T
    first_row = np.concatenate([row_indptr[first], row_indptr[:-1]])
    num_rows = np.concatenate([row_indptr[last], row_indptr[1:]]) - first_row
    table_row = np.concatenate([layout.segment_table_row, layout.table_rows[order]]).astype(np.int64)
    start = np.concatenate([layout.segment_span[:, 0], layout.private_start[order]]).astype(np.int64)
    end = np.concatenate([layout.segment_span[:, 1], layout.kv_len[order]]).astype(np.int64)
    max_len = np.maximum(1, _MAX_PIECE_SIZE // (np.minimum(num_rows, _BLOCK_ROWS) * num_heads + size_of_position))
    num_ranges = -(-(end - start) // max_len)
    wave = np.concatenate(sum_of_enclosing(layout, num_ranges[:num_segments]))

    num_blocks = -(-num_rows // _BLOCK_ROWS)
    part = np.repeat(np.arange(len(num_rows)), num_blocks)
    block_row = _within(num_blocks) * _BLOCK_ROWS
    block_rows = np.minimum(num_rows[part] - block_row, _BLOCK_ROWS)
    block_row += first_row[part]
    # No row of the block reads beyond the last row's own position.
    block_end = np.minimum(end[part], positions[block_row + block_rows - 1] + 1)

    num_ranges = -(-(block_end - start[part]) // max_len[part])
    block = np.repeat(np.arange(len(part)), num_ranges)
    part, number = part[block], _within(num_ranges)
    range_start = start[part] + number * max_len[part]
    range_end = np.minimum(range_start + max_len[part], block_end[block])
    return _Pieces(block_row[block], block_rows[block], table_row[part], range_start, range_end, wave[part] + number)


def _group(pieces: _Pieces, num_heads: int, size_of_position: int) -> Iterator[Int64Array]:
    """Pieces of a batch, wave by wave: their sizes differ by less than two and fit into memory, padded."""
    length = pieces.end - pieces.start
    is_alone = pieces.num_rows * length >= _MIN_ALONE
    alone = np.where(is_alone, np.arange(len(length)), -1)
    # The exponent of the next power of two.
    rows_class, length_class = (np.frexp(size - 0.5)[1] for size in (pieces.num_rows, length))
    by_class = np.lexsort((length, length_class, rows_class, alone, pieces.wave))
    keys = np.stack([pieces.wave, alone, rows_class, length_class])[:, by_class]
    bounds = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1
    for members in np.split(by_class, bounds):
        if len(members) == 0:  # `split` of nothing
            continue
        row_size = int(pieces.num_rows[members].max()) * num_heads + size_of_position
        num_pieces = max(1, _MAX_BATCH_SIZE // (int(length[members].max()) * row_size))
        yield from np.split(members, range(num_pieces, len(members), num_pieces))
