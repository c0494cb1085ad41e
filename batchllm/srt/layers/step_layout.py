"""What each step shares, for the attention backends: from the scheduler's `SharedPrefixes` to a checked layout. Runs in
the scheduler's process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.radix_attention import AttentionType

from batchllm.attention.layout import AttentionLayout, check_layout, plan_layout
from batchllm.srt.mem_cache.shared_prefixes import SharedPrefixes
from batchllm.tokens import Int32Array


class StepPlanner:
    """Plans steps; knows which rows were checked last.

    Args:
        min_segment_len: See `plan_layout`.
        max_nested_segments: See `plan_layout`.

    Attributes:
        prefixes: What rows share; nothing until it is set.
    """

    def __init__(self, *, min_segment_len: int, max_nested_segments: int) -> None:
        self.prefixes = SharedPrefixes.empty()
        self._min_segment_len, self._max_nested_segments = min_segment_len, max_nested_segments
        self._checked_rows = b""
        # The first call of a process loads compiled code; not while requests wait.
        nothing = np.empty(0, np.int32)
        self.plan(nothing, nothing, nothing)

    def plan(self, rows: Int32Array, qo_len: Int32Array, kv_len: Int32Array) -> AttentionLayout:
        """The layout of a step.

        Args:
            rows: [S] row of each sequence in the request-to-token table.
            qo_len: [S] query tokens of each sequence.
            kv_len: [S] tokens of each sequence, query tokens included.

        Raises:
            LayoutError: The lengths contradict each other, or a row names a prefix that is not there.
        """
        return plan_layout(
            table_rows=rows,
            qo_len=qo_len,
            kv_len=kv_len,
            leaf=self.prefixes.leaf_of(rows),
            paths=self.prefixes.paths,
            min_segment_len=self._min_segment_len,
            max_nested_segments=self._max_nested_segments,
        )

    def check(self, layout: AttentionLayout, read_table: Callable[[], Int32Array]) -> None:
        """Check a layout against the table if anything is shared and other rows came together than at the last check.

        Args:
            layout: The layout of this step.
            read_table: Gives the request-to-token table, on the host.

        Raises:
            LayoutError: Rows do not share what the plan says.
        """
        rows = layout.table_rows.tobytes()
        if len(layout.segment_span) and rows != self._checked_rows:
            # The same rows were found right when they came together; what is shared does not change while they run.
            check_layout(layout, read_table())
            self._checked_rows = rows


class SharesPrefixes:
    """An attention backend whose steps are planned by a `StepPlanner`; what the scheduler tells it."""

    _planner: StepPlanner

    def follow(self, prefixes: SharedPrefixes) -> None:
        """Share what these rows share. Without a call nothing is shared."""
        self._planner.prefixes = prefixes

    def begin_step(self, rows: Int32Array) -> None:
        """Say which rows of the request-to-token table the next step has, for a backend that cannot see them.

        Args:
            rows: [S] in the order of the batch, without padding.
        """


def why_unsupported(layer: Any, q: torch.Tensor, key_buffer: torch.Tensor) -> str | None:
    """Why a layer is not one for `batchllm.attention`; None if it is. Windows, caps and the elements
    of values are left to the caller.
    """
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        return "not causal self-attention"
    if key_buffer.dtype != q.dtype:
        return f"{q.dtype} queries over {key_buffer.dtype} KV"
    return None
