"""Attention over shared prefixes on a CPU: the compiled kernels, or plain torch where these cannot be had.

Knows: layouts, tensors on the CPU, the two implementations. Must not know: SGLang.
Invariant: both take the same calls and agree within the tolerance of ``cpu``; which one runs is decided once, and a
reason is given where it is the slower one.
"""

from __future__ import annotations

import numpy as np
import torch

from batchllm.attention.base import LayerShape, StepAttention
from batchllm.attention.layout import AttentionLayout
from batchllm.attention.pieces import ordered_rows
from batchllm.attention.torch_shared import TorchSharedAttention
from batchllm.kernels import cpu


class CompiledSharedAttention:
    """`StepAttention` of compiled kernels, for the shapes of heads and dtypes that they support.

    Attributes:
        shape: Of the layers.
        step: What was planned last, as the kernels read it.
    """

    def __init__(self, kernels: cpu.CpuKernels, shape: LayerShape) -> None:
        self._kernels, self.shape = kernels, shape
        self.step: cpu.AttentionStep | None = None

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Hand a step to the kernels; see `StepAttention`."""
        row_indptr, tokens = ordered_rows(layout)
        place = np.repeat(np.arange(len(layout.order)), np.diff(row_indptr))
        # A sequence's last row sees all of it, each one before that a token less.
        num_after = row_indptr[1:][place] - 1 - np.arange(len(tokens))
        self.step = cpu.AttentionStep(
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
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attention of one layer; see `StepAttention`.

        Raises:
            ValueError: No step is planned, or a tensor is not what the kernels read: they take its address.
        """
        if self.step is None or len(output) < self.step.num_query_tokens:
            raise ValueError("plan() a step first, with no more query tokens than the output has rows")
        shape = self.shape
        for tensor, num_heads in (
            (query, shape.num_heads),
            (key_cache, shape.num_kv_heads),
            (value_cache, shape.num_kv_heads),
            (output, shape.num_heads),
        ):
            _, heads, head_dim = tensor.shape
            _, head_stride, stride = tensor.stride()
            is_dense = stride == 1 and (head_stride == head_dim or heads == 1) and tensor.is_cpu
            if not is_dense or (heads, head_dim) != (num_heads, shape.head_dim) or tensor.dtype != shape.dtype:
                raise ValueError(
                    f"a tensor of {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}: must be "
                    f"{shape.dtype} [..., {num_heads}, {shape.head_dim}] on the CPU with the heads of a token side by "
                    "side"
                )
        self._kernels.attention(
            self.step, query, key_cache, value_cache, output, shape.scale, shape.logit_cap, shape.window
        )


def make_cpu_attention(shape: LayerShape) -> tuple[StepAttention, str | None]:
    """Make the fastest attention that there is for layers of this shape.

    Returns:
        The attention, and, where it is not the compiled one, one sentence that says why.
    """
    kernels = cpu.load()
    if isinstance(kernels, str):
        return TorchSharedAttention(shape), kernels
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype)
    if shape.output_dim == shape.head_dim and cpu.supports_heads(*heads):
        return CompiledSharedAttention(kernels, shape), None
    reason = "the compiled kernels do not take {} heads over {} of {} elements of {}".format(*heads)
    if shape.output_dim != shape.head_dim:
        reason += f" with values of {shape.output_dim}"
    return TorchSharedAttention(shape), reason
