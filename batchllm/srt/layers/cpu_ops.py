"""What lies between the attention layers on a CPU: linear layers (`cpu_linear`), and compiled norms, activations and
rotary embeddings; torch for two operators that SGLang has as Triton kernels only. Runs in the scheduler's process.

(Upstream: ``srt/layers/utils/multi_platform.py``, ``layernorm.py``, ``activation.py``, ``rotary_embedding/base.py``.)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from sglang.kernels.ops.elementwise import elementwise
from sglang.srt.layers import logits_processor
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.utils.multi_platform import MultiPlatformOp

from batchllm.kernels.cpu import CpuKernels, load
from batchllm.srt.layers import cpu_linear
from batchllm.srt.platforms.platform_cpu import CpuPlatform

_DISPATCH_KEY = CpuPlatform().get_dispatch_key_name()
logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)
_ADD_GATED = "fused_gate_sigmoid_mul_add"


def install() -> None:
    """Register our operators with SGLang in this process."""
    cpu_linear.install()
    logits_processor.fused_softcap = _cap_logits
    elementwise.fused_gate_sigmoid_mul_add = _add_gated
    for module in sys.modules.values():  # those that have imported it by name
        if getattr(module, "__name__", "").startswith("sglang.srt.models.") and hasattr(module, _ADD_GATED):
            setattr(module, _ADD_GATED, _add_gated)
    kernels = load()
    if isinstance(kernels, str):
        logger.warning("%s; torch's own operators run meanwhile, several times slower", kernels)
        return
    MultiPlatformOp.register_oot_forward(RMSNorm, _rms_norm(kernels), _DISPATCH_KEY)
    MultiPlatformOp.register_oot_forward(SiluAndMul, _silu_and_mul(kernels), _DISPATCH_KEY)
    rotary = _rotary_embedding(kernels)
    for variant in (RotaryEmbedding, *RotaryEmbedding.__subclasses__()):
        # They differ in their tables of cosines; those that turn in another way have a forward of their own.
        if variant.forward_native is RotaryEmbedding.forward_native:
            MultiPlatformOp.register_oot_forward(variant, rotary, _DISPATCH_KEY)


def _cap_logits(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """In place."""
    return logits.div_(cap).tanh_().mul_(cap)


def _add_gated(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor, output: torch.Tensor
) -> None:
    """Add what a gate lets through of the shared expert's output, in place.

    Args:
        hidden_states: [num_tokens, hidden_size], as all but the gate.
        gate_weight: [hidden_size].
        shared_output: Output of the shared expert.
        output: Output of the other experts.
    """
    output.add_(torch.sigmoid(hidden_states @ gate_weight)[:, None] * shared_output)


def is_plain_norm(norm: Any) -> bool:
    """Whether an `RMSNorm` is what the compiled one computes."""
    return norm.variance_size_override is None and norm.override_orig_dtype is None and not norm.cast_x_before_out_mul


def _rms_norm(kernels: CpuKernels) -> Callable[..., Any]:
    def forward(
        self: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        post_residual_addition: torch.Tensor | None = None,
    ) -> Any:
        weight = self.weight
        is_ours = (
            x.dtype in _DTYPES
            and weight.dtype == x.dtype
            and x.shape[-1] == self.hidden_size
            and x.is_contiguous()
            and is_plain_norm(self)
            and post_residual_addition is None
        )
        if residual is not None:
            is_ours = is_ours and residual.dtype == x.dtype and residual.is_contiguous() and not self.fp32_residual
        if not is_ours:
            return self.forward_native(x, residual, post_residual_addition)
        out = kernels.rms_norm(x, weight, self.variance_epsilon, residual)
        return out if residual is None else (out, residual)

    return forward


def _silu_and_mul(kernels: CpuKernels) -> Callable[..., Any]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if cpu_linear.is_activated(x):
            return x
        if x.dtype in _DTYPES and x.is_contiguous():
            return kernels.silu_and_mul(x)
        return self.forward_native(x)

    return forward


def _rotary_embedding(kernels: CpuKernels) -> Callable[..., Any]:
    def forward(
        self: Any,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        offsets: torch.Tensor | None = None,
        fused_set_kv_buffer_arg: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_ours = (
            query.dtype in _DTYPES
            and key.dtype == query.dtype == self.cos_sin_cache.dtype
            and query.dim() == key.dim() == 2
            and query.stride(1) == key.stride(1) == 1
            and positions.dim() == 1
            and positions.dtype == torch.int64
            and offsets is None
        )
        if not is_ours:
            return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
        kernels.rotary_embedding(
            positions,
            query,
            key,
            self.cos_sin_cache,
            head_dim=self.head_size,
            rotary_dim=self.rotary_dim,
            is_neox=self.is_neox_style,
        )
        return query, key

    return forward
