"""Decoder layers on a CPU, each in one call of the compiled kernels. Runs in the scheduler's process.

SGLang's modules call some fifteen operators a layer. Each costs some microseconds of Python: in a decode step of a few
rows that adds up to as much as small models compute. The model's own loop over its layers stays.

(Upstream: ``srt/models/llama.py``, ``qwen2.py``, ``qwen3.py``.)

INVARIANT: a layer gives what SGLang's code gives, bit for bit: the same kernels run in the same order. Where anything
of a layer or of a step is not as it was read, that code runs.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from batchllm.attention.cpu_shared import CompiledSharedAttention
from batchllm.kernels.decoder import Buffers, DecoderLayer, DecoderStep, Heads, Norm, Rotary
from batchllm.srt.compat import digest
from batchllm.srt.layers.attention_backend import SharedCpuAttnBackend
from batchllm.srt.layers.cpu_linear import FUSED, is_gated, kernels_for, packed_weight
from batchllm.srt.layers.cpu_ops import is_plain_norm

logger = logging.getLogger(__name__)

_READ = {
    "LlamaDecoderLayer": {
        "sglang.srt.models.llama:LlamaDecoderLayer.forward": "0c20f4d1a720",
        "sglang.srt.models.llama:LlamaAttention.forward": "232b19ff5008",
        "sglang.srt.models.llama:LlamaAttention.forward_prepare_native": "eb09e68f522b",
        "sglang.srt.models.llama:LlamaMLP.forward": "682b54dac399",
    },
    "Qwen2DecoderLayer": {
        "sglang.srt.models.qwen2:Qwen2DecoderLayer.forward": "0c20f4d1a720",
        "sglang.srt.models.qwen2:Qwen2Attention.forward": "41849402eca6",
        "sglang.srt.models.qwen2:Qwen2MLP.forward": "b99edb0cd1b7",
    },
    "Qwen3DecoderLayer": {
        "sglang.srt.models.qwen3:Qwen3DecoderLayer.forward": "df493ded35e7",
        "sglang.srt.models.qwen3:Qwen3Attention.forward": "82b23774de34",
        "sglang.srt.models.qwen3:Qwen3Attention.forward_prepare_native": "8c0f40419376",
        "sglang.srt.models.utils:apply_qk_norm": "00e19e9b462b",
        "sglang.srt.models.qwen2:Qwen2MLP.forward": "b99edb0cd1b7",
        "sglang.srt.layers.communicator:LayerCommunicator": "7fcc7e0402df",
        "sglang.srt.layers.communicator:CommunicateSimpleFn": "a71d17a52bad",
        "sglang.srt.layers.communicator:CommunicateWithAllReduceAndLayerNormFn": "f75a5faab08c",
        "sglang.srt.layers.communicator:CommunicateSummableTensorPairFn": "d625c1fefab9",
    },
}
"""The layers of SGLang's that were read: the functions that compute them, with their `compat.digest`."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def fuse_layers(model: torch.nn.Module, backend: SharedCpuAttnBackend) -> None:
    """Have the layers of a loaded model that are of a kind that was read computed in one call each.

    Args:
        model: The model, whose layers `cpu_linear.mark_layers` has marked.
        backend: Its attention.
    """
    steps = _Steps()
    for layer in model.modules():
        kind: Any = type(layer)
        if _was_read(kind) and _is_plain(layer):
            layer.forward = _FusedLayer(layer, backend, steps).forward


@functools.cache
def _was_read(kind: Any) -> bool:
    """A layer of SGLang's, and nobody has changed it since."""
    functions = _READ.get(kind.__name__, {})
    if f"{kind.__module__}:{kind.__qualname__}.forward" not in functions:
        return False
    changed = [name for name, expected in functions.items() if digest(name) != expected]
    if changed:
        logger.warning("%s: changed; its layers are computed by SGLang's code, which takes longer", ", ".join(changed))
    return not changed


def _is_plain(layer: Any) -> bool:
    """Nothing of the layer does anything else than in the model that was read."""
    attention, mlp = layer.self_attn, layer.mlp
    products = (
        (attention.qkv_proj, QKVParallelLinear),
        (attention.o_proj, RowParallelLinear),
        (mlp.gate_up_proj, MergedColumnParallelLinear),
        (mlp.down_proj, RowParallelLinear),
    )
    has_hooks = any(getattr(module, hooks) for module in layer.modules() for hooks in _HOOKS)
    rotary = attention.rotary_emb
    return (
        not has_hooks
        and all(type(module) is kind and module.tp_size == 1 and not module.skip_bias_add for module, kind in products)
        and is_gated(mlp.gate_up_proj)
        and type(mlp.act_fn) is SiluAndMul
        and all(type(norm) is RMSNorm and is_plain_norm(norm) and not norm.fp32_residual for norm in _norms(layer))
        and isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and type(attention.attn) is RadixAttention
        and not attention.attn.is_cross_attention
    )


def _norms(layer: Any) -> tuple[Any, ...]:
    """Those of the layer's two halves, and of queries and keys where it has such."""
    attention = layer.self_attn
    of_heads = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
    return (layer.input_layernorm, layer.post_attention_layernorm, *of_heads)


class _Steps:
    """The step at hand, which all layers with the same attention and of the same shape share."""

    def __init__(self) -> None:
        self._buffers = Buffers()
        self._step: DecoderStep | None = None

    def of(
        self, layer: DecoderLayer, attention: CompiledSharedAttention, positions: torch.Tensor, slots: torch.Tensor
    ) -> DecoderStep | None:
        """None where its arrays are not such as the kernels read."""
        step, planned = self._step, attention.step
        if (
            step is not None
            and step.attention is planned
            and step.positions is positions
            and step.row_bytes == layer.row_bytes
        ):
            return step
        shape = None if planned is None else (planned.num_query_tokens,)
        if planned is None or any(array.shape != shape or array.dtype != torch.int64 for array in (positions, slots)):
            return None
        self._step = DecoderStep(layer, planned, positions.contiguous(), slots.contiguous(), self._buffers)
        return self._step


class _FusedLayer:
    """A layer of SGLang's, and the same for the kernels once its weights have been packed."""

    def __init__(self, layer: Any, backend: SharedCpuAttnBackend, steps: _Steps) -> None:
        self._host_forward = layer.forward
        self._layer, self._backend, self._steps = layer, backend, steps
        self._layer_id: int = layer.self_attn.attn.layer_id
        attention, mlp = layer.self_attn, layer.mlp
        self._products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        self._norms = _norms(layer)
        self._rotary = attention.rotary_emb

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: Any,
        residual: torch.Tensor | None,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As SGLang's; ``hidden_states`` and ``residual`` are overwritten, which nobody reads behind it."""
        attention = self._backend.compiled_attention(self._layer_id)
        fused = None if attention is None else self._fused_layer(attention)
        if attention is not None and fused is not None and not any(value is not None for value in more.values()):
            step = self._steps.of(fused, attention, positions, forward_batch.out_cache_loc)
            if step is not None and fused.takes(hidden_states, step.num_rows):
                return fused.run(step, hidden_states, residual)
        outputs: tuple[torch.Tensor, torch.Tensor] = self._host_forward(
            positions, hidden_states, forward_batch, residual, **more
        )
        return outputs

    def _fused_layer(self, attention: CompiledSharedAttention) -> DecoderLayer | None:
        """The layer for the kernels; made again where its weights, its KV or its cosines are others than before."""
        pool, layer_id = self._backend.token_to_kv_pool, self._layer_id
        # The pool waits here until KV is there that comes from somewhere else.
        keys, values, cosines = (
            pool.get_key_buffer(layer_id),
            pool.get_value_buffer(layer_id),
            self._rotary.cos_sin_cache,
        )
        found = self._layer.__dict__.get(FUSED)
        if found is not None:
            fused, *made_of = found
            if made_of[0] is keys and made_of[1] is values and made_of[2] is cosines:
                return fused
        fused = self._make(attention, keys, values, cosines)
        if fused is not None:
            self._layer.__dict__[FUSED] = (fused, keys, values, cosines)
        return fused

    def _make(
        self, attention: CompiledSharedAttention, keys: torch.Tensor, values: torch.Tensor, cosines: torch.Tensor
    ) -> DecoderLayer | None:
        """None where something is not packed yet, or of another type."""
        shape, kernels = attention.shape, kernels_for(attention.shape.dtype)
        products = [(packed, layer.bias) for layer in self._products if (packed := packed_weight(layer)) is not None]
        others = (keys, values, cosines, *(norm.weight for norm in self._norms))
        if (
            kernels is None
            or len(products) < len(self._products)
            or any(tensor.dtype != shape.dtype for tensor in others)
        ):
            return None
        qkv, output, gate_up, down = products
        input_norm, post_norm, *head_norms = (
            Norm(weight=norm.weight, epsilon=norm.variance_epsilon) for norm in self._norms
        )
        return DecoderLayer(
            kernels,
            qkv=qkv,
            output=output,
            gate_up=gate_up,
            down=down,
            input_norm=input_norm,
            head_norms=(head_norms[0], head_norms[1]) if head_norms else None,
            post_norm=post_norm,
            rotary=Rotary(
                cos_sin_cache=cosines, rotary_dim=self._rotary.rotary_dim, is_neox=self._rotary.is_neox_style
            ),
            heads=Heads(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                key_cache=keys,
                value_cache=values,
                scale=shape.scale,
                logit_cap=shape.logit_cap,
                window=shape.window,
            ),
        )
