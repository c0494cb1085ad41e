"""Attention over shared prefixes on a CPU: the compiled kernels, or plain torch where these cannot be had.

Knows: layouts, tensors on the CPU, the two implementations. Must not know: SGLang.
Invariant: both take the same calls and agree within the tolerance of ``cpu``; which one runs is decided once, and a
reason is given where it is the slower one.
"""

from __future__ import annotations

import numpy as np
import torch

from batchllm.attention.base import StepAttention
from batchllm.attention.layout import AttentionLayout
from batchllm.attention.pieces import ordered_rows
from batchllm.attention.torch_shared import TorchSharedAttention
from batchllm.kernels import cpu


class CompiledSharedAttention:
    """`StepAttention` of compiled kernels, for the shapes of heads and dtypes that they support."""

    def __init__(self, kernels: cpu.CpuKernels, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Fix the shape of the heads.

        Args:
            kernels: Of an instruction set that the processor has.
            num_heads: Query heads; a multiple of ``num_kv_heads``.
            num_kv_heads: KV heads.
            head_dim: Of queries, keys and values.
        """
        self._kernels = kernels
        self._query_heads, self._kv_heads = (num_heads, head_dim), (num_kv_heads, head_dim)
        self._step: cpu.AttentionStep | None = None

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Hand a step to the kernels; see `StepAttention`."""
        row_indptr, tokens = ordered_rows(layout)
        place = np.repeat(np.arange(len(layout.order)), np.diff(row_indptr))
        # A sequence's last row sees all of it, each one before that a token less.
        num_after = row_indptr[1:][place] - 1 - np.arange(len(tokens))
        self._step = cpu.AttentionStep(
            table,
            row_place=place,
            row_token=tokens,
            row_visible_end=layout.kv_len[layout.order][place] - num_after,
            table_rows=layout.table_rows,
            order=layout.order,
            private_start=layout.private_start,
            segment_readers=layout.segment_readers,
            segment_span=layout.segment_span,
            segment_table_row=layout.segment_table_row,
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
        """Attention of one layer; see `StepAttention`.

        Raises:
            ValueError: No step is planned, or a tensor is not what the kernels read: they take its address.
        """
        if self._step is None or len(output) < self._step.num_query_tokens:
            raise ValueError("plan() a step first, with no more query tokens than the output has rows")
        for tensor, heads in (
            (query, self._query_heads),
            (key_cache, self._kv_heads),
            (value_cache, self._kv_heads),
            (output, self._query_heads),
        ):
            if tensor.shape[1:] != heads or tensor.dtype != query.dtype or not _has_dense_tokens(tensor):
                raise ValueError(
                    f"a tensor of {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}: must be "
                    f"{query.dtype} [..., {heads[0]}, {heads[1]}] on the CPU with the heads of a token side by side"
                )
        self._kernels.attention(self._step, query, key_cache, value_cache, output, scale, logit_cap, window)


def make_cpu_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[StepAttention, str | None]:
    """The fastest attention that there is for a model.

    Args:
        num_heads: Query heads; a multiple of ``num_kv_heads``.
        num_kv_heads: KV heads.
        head_dim: Of queries, keys and values.
        dtype: Of queries and caches.

    Returns:
        The attention, and, where it is not the compiled one, one sentence that says why.
    """
    kernels = cpu.load()
    if not isinstance(kernels, str) and cpu.supports_heads(num_heads, num_kv_heads, head_dim, dtype):
        return CompiledSharedAttention(kernels, num_heads, num_kv_heads, head_dim), None
    reason = (
        kernels
        if isinstance(kernels, str)
        else f"the compiled kernels do not take {num_heads} heads over {num_kv_heads} of {head_dim} elements of {dtype}"
    )
    return TorchSharedAttention(num_heads, num_kv_heads, head_dim), reason


def _has_dense_tokens(tensor: torch.Tensor) -> bool:
    _, num_heads, head_dim = tensor.shape
    _, head_stride, stride = tensor.stride()
    is_dense: bool = stride == 1 and (head_stride == head_dim or num_heads == 1)
    return is_dense and tensor.device.type == "cpu"
