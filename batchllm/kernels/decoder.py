"""A decoder layer of Llama's kind as one call of the compiled kernels (``decoder_layer.cpp``).

Knows tensors on the CPU and packed weights. Must not know: SGLang, models, how attention is laid out.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from batchllm.kernels import bindings
from batchllm.kernels.cpu import AttentionStep, CpuKernels, PackedWeight, lacks_position

_ALIGNMENT = 64
"""Bytes of a cache line: buffers begin with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMS norm.

    Attributes:
        weight: As long as what is normed: [hidden_size], or [head_dim].
    """

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """A rotary embedding.

    Attributes:
        cos_sin_cache: [num_positions, rotary_dim], cosines before sines.
        rotary_dim: Elements of a head that are turned, the first ones.
        is_neox: Pairs are halves of a head; else neighbours.
    """

    cos_sin_cache: torch.Tensor
    rotary_dim: int
    is_neox: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Attention's shape, and where the layer's KV is.

    Attributes:
        key_cache: [num_slots, num_kv_heads, head_dim].
        value_cache: The same shape.
        scale: Factor of the scores.
        logit_cap: ``cap * tanh(score / cap)`` of each scaled score; 0: none.
        window: Tokens that a token sees, itself included; 0: all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    scale: float
    logit_cap: float
    window: int


Product = tuple[PackedWeight, torch.Tensor | None]
"""A linear layer's weight and bias."""


class Buffers:
    """Memory for what a layer computes in between; layers and steps use it in turn.

    Attributes:
        memory: Where what was taken last is.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, *sizes: int) -> list[int]:
        """Addresses of pieces of so many bytes; what was taken before is overwritten."""
        whole = [aligned(size) for size in sizes]
        if len(self.memory) < sum(whole) + _ALIGNMENT:
            self.memory = torch.empty(sum(whole) + _ALIGNMENT, dtype=torch.uint8)
        address = aligned(self.memory.data_ptr())
        return [address + sum(whole[:i]) for i in range(len(whole))]


def aligned(size: int) -> int:
    """So many bytes, in whole lines of the cache."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class DecoderStep:
    """What a step says to each of its layers. Keeps what it points to alive.

    Args:
        layer: Any of the layers that have one shape.
        attention: Attention's step.
        positions: [num_rows] int64.
        slots: Where in the pool the KV of each row goes, [num_rows] int64.
        buffers: Memory for the layers.

    Attributes:
        attention: As given, like `positions`.
        num_rows: Rows of the step.
        row_bytes: The layers' (`DecoderLayer`).

    Raises:
        ValueError: The arrays do not belong together.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        attention: AttentionStep,
        positions: torch.Tensor,
        slots: torch.Tensor,
        buffers: Buffers,
    ) -> None:
        num_rows = attention.num_query_tokens
        for name, array in (("positions", positions), ("slots", slots)):
            if array.shape != (num_rows,) or array.dtype != torch.int64 or not array.is_contiguous():
                raise ValueError(f"{name} must be int64 [{num_rows}], not {array.dtype} {tuple(array.shape)}")
        self.attention, self.positions, self._slots = attention, positions, slots
        self.num_rows, self.row_bytes = num_rows, layer.row_bytes
        of_normed, of_qkv, of_attended, of_activated = (num_rows * width for width in layer.row_bytes)
        # Queries, keys and values are not needed any more when the MLP is computed, nor is attention's output.
        normed, qkv = buffers.take(of_normed, max(aligned(of_qkv) + of_attended, of_activated))
        self._memory = buffers.memory
        self.struct = bindings.DecoderStep(
            attention=ctypes.pointer(attention.struct),
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            num_rows=num_rows,
            normed=normed,
            qkv=qkv,
            attended=qkv + aligned(of_qkv),
            activated=qkv,
        )


class DecoderLayer:
    """One layer: norm, attention, norm and gated MLP, with the residual beside them.

    Args:
        kernels: The kernels.
        qkv: Queries, keys and values.
        output: What follows attention.
        gate_up: Packed as gated.
        down: What follows the activation.
        head_norms: Norms of each head's queries and of its keys, before they are turned; None without.

    Attributes:
        row_bytes: Of a row in the buffers of a step.

    Raises:
        ValueError: Types or shapes do not belong together.
    """

    def __init__(
        self,
        kernels: CpuKernels,
        *,
        qkv: Product,
        output: Product,
        gate_up: Product,
        down: Product,
        input_norm: Norm,
        post_norm: Norm,
        rotary: Rotary,
        heads: Heads,
        head_norms: tuple[Norm, Norm] | None = None,
    ) -> None:
        products = (qkv, output, gate_up, down)
        dtype = qkv[0].data.dtype
        norms = (input_norm, post_norm, *(head_norms or ()))
        tensors = [*(norm.weight for norm in norms), rotary.cos_sin_cache, heads.key_cache, heads.value_cache]
        tensors += [tensor for packed, bias in products for tensor in (packed.data, bias) if tensor is not None]
        if any(tensor.dtype != dtype or tensor.stride(-1) != 1 for tensor in tensors):
            raise ValueError(f"all weights and KV must be dense and {dtype}: {[tensor.dtype for tensor in tensors]}")
        width, kv_width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
        (num_qkv, hidden_size), num_gated = qkv[0].shape, gate_up[0].shape[0]
        shapes = [packed.shape for packed, _ in products]
        wanted = [(width + 2 * kv_width, hidden_size), (hidden_size, width)]
        wanted += [(num_gated, hidden_size), (hidden_size, num_gated // 2)]
        if shapes != wanted or [packed.is_gated for packed, _ in products] != [False, False, True, False]:
            raise ValueError(f"weights of {shapes} are no layer of {heads.num_heads} heads of {heads.head_dim}")
        sizes = [hidden_size, hidden_size, heads.head_dim, heads.head_dim]
        if any(len(norm.weight) != size for norm, size in zip(norms, sizes, strict=False)):
            raise ValueError(f"norms of {[len(norm.weight) for norm in norms]} elements")
        self._keeps = (products, norms, rotary, heads)
        self._dtype, self._hidden_size = dtype, hidden_size
        self._cos_sin_cache = rotary.cos_sin_cache
        self._function = kernels.function("decoder_layer", dtype)
        element_bytes = qkv[0].data.element_size()
        self.row_bytes = [size * element_bytes for size in (hidden_size, num_qkv, width, num_gated // 2)]
        self._struct = bindings.DecoderLayer(
            qkv=_linear(*qkv),
            output=_linear(*output),
            gate_up=_linear(*gate_up),
            down=_linear(*down),
            attention=bindings.Layer(
                key_cache=heads.key_cache.data_ptr(),
                value_cache=heads.value_cache.data_ptr(),
                key_stride=heads.key_cache.stride(0),
                value_stride=heads.value_cache.stride(0),
                num_heads=heads.num_heads,
                num_kv_heads=heads.num_kv_heads,
                head_dim=heads.head_dim,
                scale=heads.scale,
                logit_cap=heads.logit_cap,
                window=heads.window,
            ),
            input_norm=input_norm.weight.data_ptr(),
            post_norm=post_norm.weight.data_ptr(),
            input_epsilon=input_norm.epsilon,
            post_epsilon=post_norm.epsilon,
            cos_sin_cache=rotary.cos_sin_cache.data_ptr(),
            num_positions=len(rotary.cos_sin_cache),
            rotary_dim=rotary.rotary_dim,
            is_neox=rotary.is_neox,
            element_bytes=element_bytes,
        )
        if head_norms is not None:  # else they are null
            query_norm, key_norm = head_norms
            self._struct.query_norm, self._struct.query_epsilon = query_norm.weight.data_ptr(), query_norm.epsilon
            self._struct.key_norm, self._struct.key_epsilon = key_norm.weight.data_ptr(), key_norm.epsilon

    def takes(self, x: torch.Tensor, num_rows: int) -> bool:
        """Whether these are a step's hidden states as the layer reads them."""
        return bool(x.dtype == self._dtype and x.shape == (num_rows, self._hidden_size) and x.is_contiguous())

    def run(
        self, step: DecoderStep, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output and its residual, which are to be added up by whoever reads them.

        Args:
            step: The step.
            x: What the layer before has computed, [num_rows, hidden_size]; is overwritten.
            residual: What it is to be added to, which is done in place; None for the first layer, whose ``x`` becomes
                the residual.

        Raises:
            IndexError: The cache of cosines lacks a position.
            ValueError: The shape of the heads is not supported.
        """
        out = torch.empty_like(x) if residual is None else x
        problem = self._function(
            self._struct,
            step.struct,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
        )
        if problem == 1:
            raise lacks_position(step.positions, self._cos_sin_cache)
        if problem:
            raise ValueError("attention does not support heads of this shape")
        return out, x if residual is None else residual


def _linear(packed: PackedWeight, bias: torch.Tensor | None) -> bindings.Linear:
    num_outputs, num_inputs = packed.shape
    return bindings.Linear(
        weight=packed.data.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        is_gated=packed.is_gated,
    )
