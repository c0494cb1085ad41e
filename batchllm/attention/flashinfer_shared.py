"""Attention over shared prefixes with FlashInfer's kernels: one batch per level of nesting, merged by log-sum-exp.

Knows: `BatchPrefillWithPagedKVCacheWrapper` and `merge_state` of FlashInfer 0.6, with pages of one token, which is how
SGLang's table names KV. Must not know: SGLang. Invariant: the same result as every other backend for the same layout.

FlashInfer's own `MultiLevelCascadeAttentionWrapper` (flashinfer/cascade.py) wants every query token on every level.
Here sequences are nested differently deep, and some share nothing: each level is a batch of only the sequences that
have a segment there. Levels beyond the third are read with the private part, by each sequence for itself.

Not run so far: anything on a GPU. The calls are checked against the signatures of the installed package, and the
batches by computing them in torch. Not for CUDA graphs: numbers and sizes of the batches change from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from batchllm.attention.base import LayerShape
from batchllm.attention.layout import AttentionLayout
from batchllm.attention.pieces import indptr, ordered_rows, sum_of_enclosing
from batchllm.errors import ConfigError
from batchllm.tokens import Int32Array, Int64Array

_MAX_LEVELS = 3

# What FlashInfer recommends for its workspace.
_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one FlashInfer call computes: entry ``b`` of B lets some query tokens read one KV range.

    Attributes:
        tokens: [n] the query tokens of all entries, by their index in the step's batch.
        qo_indptr: [B + 1] those of entry ``b`` are ``tokens[qo_indptr[b]:qo_indptr[b + 1]]``.
        table_row: [B] row of the request-to-token table.
        kv_start: [B] first position.
        kv_end: [B] position behind the last.
        is_causal: Whether the last query token of an entry reads all of the range, and each before it one less.
    """

    tokens: Int64Array
    qo_indptr: Int64Array
    table_row: Int64Array
    kv_start: Int64Array
    kv_end: Int64Array
    is_causal: bool


def level_batches(layout: AttentionLayout, max_levels: int = _MAX_LEVELS) -> list[Batch]:
    """The private parts of all sequences, then the segments of each level, outermost first."""
    row_indptr, rows = ordered_rows(layout)
    level, _ = sum_of_enclosing(layout, np.ones(len(layout.segment_readers), np.int64))
    (first, last), (start, end) = layout.segment_readers.T, layout.segment_span.T
    private_start = layout.private_start[layout.order]
    for g in np.flatnonzero(level == max_levels):
        private_start[first[g] : last[g]] = start[g]
    table_rows, kv_len = layout.table_rows[layout.order], layout.kv_len[layout.order]
    batches = [_batch(rows, row_indptr[:-1], row_indptr[1:], table_rows, private_start, kv_len, is_causal=True)]
    for depth in range(min(max_levels, int(level.max(initial=-1)) + 1)):
        g = level == depth
        readers = row_indptr[first[g]], row_indptr[last[g]]
        batches.append(_batch(rows, *readers, layout.segment_table_row[g], start[g], end[g], is_causal=False))
    return [batch for batch in batches if len(batch.tokens)]


def _batch(
    rows: Int64Array,
    first: Int64Array,
    last: Int64Array,
    table_row: Int32Array,
    kv_start: Int32Array,
    kv_end: Int32Array,
    *,
    is_causal: bool,
) -> Batch:
    """The entries that have query tokens; entry ``b`` has ``rows[first[b]:last[b]]``."""
    kept = last > first
    first, num_rows = first[kept], (last - first)[kept]
    qo_indptr = indptr(num_rows)
    tokens = rows[np.arange(qo_indptr[-1]) + np.repeat(first - qo_indptr[:-1], num_rows)]
    row, start, end = (array[kept].astype(np.int64) for array in (table_row, kv_start, kv_end))
    return Batch(tokens, qo_indptr, row, start, end, is_causal)


class FlashInferSharedAttention:
    """`StepAttention` of FlashInfer's kernels."""

    def __init__(self, shape: LayerShape, device: torch.device | str, *, max_levels: int = _MAX_LEVELS) -> None:
        """Make one FlashInfer wrapper per level, and one for the private parts; they share a workspace.

        Args:
            shape: The layers; float16 or bfloat16, without a window.
            device: A CUDA device.
            max_levels: Levels of nesting that are read once for all readers.

        Raises:
            ConfigError: FlashInfer is not installed, or cannot be imported.
        """
        self._flashinfer = _import_flashinfer()
        self._shape = shape
        self._device, self._max_levels = torch.device(device), max_levels
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers = [
            self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD") for _ in range(1 + max_levels)
        ]
        self._planned: list[tuple[Any, torch.Tensor]] = []
        self._num_tokens = 0

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Plan FlashInfer's wrappers for a step, on the current stream; see `StepAttention`."""
        shape = self._shape
        self._planned = []
        self._num_tokens = int(layout.qo_indptr[-1])
        for wrapper, batch in zip(self._wrappers, level_batches(layout, self._max_levels), strict=False):
            kv_len = batch.kv_end - batch.kv_start
            kv_indptr = indptr(kv_len)
            wrapper.plan(
                torch.from_numpy(batch.qo_indptr.astype(np.int32)),
                torch.from_numpy(kv_indptr.astype(np.int32)),
                self._slots(table, batch, kv_indptr),
                torch.ones(len(kv_len), dtype=torch.int32),
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                1,
                causal=batch.is_causal,
                sm_scale=shape.scale,
                logits_soft_cap=shape.logit_cap or None,
                q_data_type=shape.dtype,
                kv_data_type=shape.dtype,
            )
            self._planned.append((wrapper, torch.from_numpy(batch.tokens).to(self._device, non_blocking=True)))

    def _slots(self, table: torch.Tensor, batch: Batch, kv_indptr: Int64Array) -> torch.Tensor:
        """int32 [KV tokens] of all entries; gathered on the device, which has the table."""
        begin = batch.table_row * table.stride(0) + batch.kv_start - kv_indptr[:-1]
        of_entry = torch.from_numpy(np.stack([begin, np.diff(kv_indptr)])).to(self._device, non_blocking=True)
        # The size is known here: without it torch would wait for the device.
        num_tokens = int(kv_indptr[-1])
        index = torch.repeat_interleave(of_entry[0], of_entry[1], output_size=num_tokens)
        return table.as_strided((table.stride(0) * len(table),), (1,))[
            index + torch.arange(num_tokens, device=self._device)
        ]

    def run(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Compute one layer of the planned step; see `StepAttention`."""
        if len(query) < self._num_tokens:
            raise ValueError(f"planned for {self._num_tokens} query tokens, got {len(query)}")
        pages = key_cache.unsqueeze(1), value_cache.unsqueeze(1)
        # The first are the private parts: every query token has one, so this writes all that is read below.
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        for index, (wrapper, tokens) in enumerate(self._planned):
            part, part_lse = wrapper.run(query[tokens], pages, return_lse=True)
            if index > 0:
                part, part_lse = self._flashinfer.merge_state(output[tokens], lse[tokens], part, part_lse)
            output[tokens], lse[tokens] = part, part_lse


def _import_flashinfer() -> Any:
    try:
        return import_module("flashinfer")
    except ImportError as error:
        raise ConfigError(
            f"attention of kind `cascade` needs FlashInfer ({error}); install flashinfer-python, or use `shared`"
        ) from None
