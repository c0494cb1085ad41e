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
import torch

from batchllm.attention.base import LayerShape
from batchllm.attention.layout import AttentionLayout
from batchllm.attention.pieces import Pieces, ordered_rows, row_positions, sum_of_enclosing, within
from batchllm.tokens import Int64Array

# More rows make a product no faster, and in a prompt each block reads only as far as its last row sees.
_BLOCK_ROWS = 128
# Float32 numbers that a piece may take, scores, keys and values together: 64 MiB.
_MAX_PIECE_SIZE = 1 << 24
# The same for a batch of several pieces: 8 MiB stay in the last cache from one operation to the next.
_MAX_BATCH_SIZE = 1 << 21
# Rows times positions from which a piece is worth a product of its own, without padding.
_MIN_ALONE = 1 << 14


@dataclass(frozen=True, slots=True)
class _Cuts(Pieces):
    """Pieces cut further; ``wave``: how many of them their rows have before this one."""

    wave: Int64Array

    def take(self, index: Int64Array) -> _Cuts:
        fields = (self.first_row, self.num_rows, self.table_row, self.start, self.end, self.wave)
        return _Cuts(*(field[index] for field in fields))


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

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._num_heads, self._num_kv_heads = shape.num_heads, shape.num_kv_heads
        self._num_tokens = 0
        self._batches: list[_Batch] = []

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Cut a step into batches of matrix products; as of `StepAttention`."""
        _, tokens = ordered_rows(layout)
        positions = row_positions(layout)
        pieces = _cut(layout, positions, self._num_heads, self._sizes_of_position())
        self._num_tokens = len(tokens)
        self._batches = [
            self._make_batch(pieces.take(members), tokens, positions, table)
            for members in _group(pieces, self._num_heads, self._sizes_of_position())
        ]

    def _sizes_of_position(self) -> int:
        """Numbers that keys and values of a position are."""
        return self._num_kv_heads * (self._shape.head_dim + self._shape.output_dim)

    def _make_batch(self, pieces: _Cuts, tokens: Int64Array, positions: Int64Array, table: torch.Tensor) -> _Batch:
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
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attention of one layer; as of `StepAttention`."""
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        scaled = query[: self._num_tokens].to(dtype) * self._shape.scale
        out = scaled.new_empty(*scaled.shape[:2], self._shape.output_dim)
        lse = out.new_empty(out.shape[:2])
        for batch in self._batches:
            part = self._attend(scaled, key_cache, value_cache, batch)
            if not batch.is_first:
                outs = torch.stack([out.index_select(0, batch.tokens), part[0]])
                part = merge_states(outs, torch.stack([lse.index_select(0, batch.tokens), part[1]]))
            out[batch.tokens], lse[batch.tokens] = part
        output[: self._num_tokens] = out

    def _attend(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: _Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B * n, num_heads, output_dim] and log-sum-exp [B * n, num_heads] over the positions of a batch."""
        num_pieces, num_positions = batch.slots.shape
        logit_cap, window = self._shape.logit_cap, self._shape.window
        heads, group = self._num_kv_heads, self._num_heads // self._num_kv_heads
        num_rows = len(batch.tokens) // num_pieces
        rows = query.index_select(0, batch.tokens).view(num_pieces, num_rows, heads, group, -1)
        rows = rows.transpose(1, 2).reshape(num_pieces, heads, num_rows * group, -1)
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
        out = out.view(num_pieces, heads, num_rows, group, -1).transpose(1, 2)
        lse = lse.view(num_pieces, heads, num_rows, group).transpose(1, 2)
        return out.reshape(-1, self._num_heads, self._shape.output_dim), lse.reshape(-1, self._num_heads)

    def _gather(self, cache: torch.Tensor, batch: _Batch, dtype: torch.dtype) -> torch.Tensor:
        """[B, num_kv_heads, m, elements of a head]."""
        num_pieces, num_positions = batch.slots.shape
        if cache.is_contiguous():
            # Rows of one head each come out in the order of the product, and `index_select` copies them whole.
            rows = cache.view(-1, cache.shape[-1]).index_select(0, batch.cache_rows)
            return rows.view(num_pieces, self._num_kv_heads, num_positions, -1).to(dtype)
        return cache[batch.slots].to(dtype).transpose(1, 2)


def _cut(layout: AttentionLayout, positions: Int64Array, num_heads: int, size_of_position: int) -> _Cuts:
    """Segments and private parts in blocks of rows and, where they are very long, ranges of positions."""
    pieces, num_segments = Pieces.of(layout), len(layout.segment_span)
    num_rows, start, end = pieces.num_rows, pieces.start, pieces.end
    max_len = np.maximum(1, _MAX_PIECE_SIZE // (np.minimum(num_rows, _BLOCK_ROWS) * num_heads + size_of_position))
    num_ranges = -(-(end - start) // max_len)
    wave = np.concatenate(sum_of_enclosing(layout, num_ranges[:num_segments]))

    num_blocks = -(-num_rows // _BLOCK_ROWS)
    part = np.repeat(np.arange(len(num_rows)), num_blocks)
    block_row = within(num_blocks) * _BLOCK_ROWS
    block_rows = np.minimum(num_rows[part] - block_row, _BLOCK_ROWS)
    block_row += pieces.first_row[part]
    # No row of the block reads beyond the last row's own position.
    block_end = np.minimum(end[part], positions[block_row + block_rows - 1] + 1)

    num_ranges = -(-(block_end - start[part]) // max_len[part])
    block = np.repeat(np.arange(len(part)), num_ranges)
    part, number = part[block], within(num_ranges)
    range_start = start[part] + number * max_len[part]
    range_end = np.minimum(range_start + max_len[part], block_end[block])
    return _Cuts(
        block_row[block], block_rows[block], pieces.table_row[part], range_start, range_end, wave[part] + number
    )


def _group(pieces: _Cuts, num_heads: int, size_of_position: int) -> Iterator[Int64Array]:
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


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of positions.

    Args:
        outs: [num_parts, ..., head_dim] output over each set. Read only where the part weighs something: an empty
            part's may be anything.
        lses: [num_parts, ...] natural logarithm of the sum of the exponentials of each set's scaled scores; -inf
            where the set is empty.

    Returns:
        Output [..., head_dim] and log-sum-exp [...] over the union, in the parts' dtypes; zeros and -inf where all
        parts are empty.
    """
    lse = torch.logsumexp(lses, dim=0)
    # -inf less -inf is NaN: nothing is the reference point where every part is empty.
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
    out = torch.where(weights == 0, 0.0, outs * weights).sum(dim=0)
    return out.to(outs.dtype), lse
