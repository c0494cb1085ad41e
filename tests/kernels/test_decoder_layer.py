"""A decoder layer in one call gives, to the bit, what its kernels give one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from batchllm.attention.base import LayerShape
from batchllm.attention.cpu_shared import CompiledSharedAttention
from batchllm.attention.layout import PrefixPaths, plan_layout
from batchllm.kernels.cpu import CpuKernels
from batchllm.kernels.decoder import Buffers, DecoderLayer, DecoderStep, Heads, Norm, Rotary
from tests.kernels.levels import DTYPES, random_tensor

_HEADS, _KV_HEADS, _HEAD_DIM, _HIDDEN, _INNER = 4, 2, 32, 72, 40
_WIDTH, _KV_WIDTH = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
_NUM_SLOTS, _NUM_POSITIONS = 200, 64


class _Parts(NamedTuple):
    """A layer's parts, for both ways to compute it."""

    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    norms: list[Norm]
    rotary: Rotary
    heads: Heads
    head_norms: tuple[Norm, Norm] | None


def _parts(dtype: torch.dtype, *, is_rich: bool, is_neox: bool, window: int) -> _Parts:
    shapes = [(_WIDTH + 2 * _KV_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH), (2 * _INNER, _HIDDEN), (_HIDDEN, _INNER)]
    weights = [random_tensor(*shape, dtype=dtype, seed=i) * shape[1] ** -0.5 for i, shape in enumerate(shapes)]
    biases = [
        random_tensor(shape[0], dtype=dtype, seed=9) if is_rich and i < 2 else None for i, shape in enumerate(shapes)
    ]
    norms = [Norm(weight=random_tensor(_HIDDEN, dtype=dtype, seed=20 + i), epsilon=10.0**-i) for i in (5, 6)]
    rotary = Rotary(
        cos_sin_cache=random_tensor(_NUM_POSITIONS, 16, dtype=dtype, seed=30), rotary_dim=16, is_neox=is_neox
    )
    keys, values = (random_tensor(_NUM_SLOTS, _KV_HEADS, _HEAD_DIM, dtype=dtype, seed=40 + i) for i in range(2))
    heads = Heads(
        num_heads=_HEADS,
        num_kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        key_cache=keys,
        value_cache=values,
        scale=0.2,
        logit_cap=0.0,
        window=window,
    )
    head_norms = None
    if is_rich:
        query_norm, key_norm = (
            Norm(weight=random_tensor(_HEAD_DIM, dtype=dtype, seed=60 + i), epsilon=10.0**-i) for i in (4, 6)
        )
        head_norms = (query_norm, key_norm)
    return _Parts(weights, biases, norms, rotary, heads, head_norms)


def _attention(kernels: CpuKernels, heads: Heads) -> CompiledSharedAttention:
    """Of three sequences that decode and one that has five more tokens."""
    kv_len = np.array([3, 17, 40, 9], np.int32)
    layout = plan_layout(
        table_rows=np.arange(4, dtype=np.int32),
        qo_len=np.array([1, 1, 1, 5], np.int32),
        kv_len=kv_len,
        leaf=np.full(4, -1, np.int32),
        paths=PrefixPaths(),
    )
    shape = LayerShape(_HEADS, _KV_HEADS, _HEAD_DIM, heads.key_cache.dtype, heads.scale, heads.logit_cap, heads.window)
    attention = CompiledSharedAttention(kernels, shape)
    table = torch.randperm(_NUM_SLOTS, generator=torch.Generator().manual_seed(0)).int()[:160].view(4, 40)
    attention.plan(layout, table)
    return attention


def _one_by_one(
    kernels: CpuKernels,
    parts: _Parts,
    attention: CompiledSharedAttention,
    positions: torch.Tensor,
    slots: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    qkv, output, gate_up, down = (kernels.pack(weight, i == 2) for i, weight in enumerate(parts.weights))
    heads, first, second = parts.heads, *parts.norms
    normed = kernels.rms_norm(x, first.weight, first.epsilon, residual)
    residual = x if residual is None else residual
    query, key, value = kernels.linear(normed, qkv, parts.biases[0]).split([_WIDTH, _KV_WIDTH, _KV_WIDTH], dim=-1)
    if parts.head_norms is not None:
        query, key = (
            kernels.rms_norm(heads_of.reshape(-1, _HEAD_DIM), norm.weight, norm.epsilon).view(heads_of.shape)
            for heads_of, norm in zip((query, key), parts.head_norms, strict=True)
        )
    kernels.rotary_embedding(
        positions,
        query,
        key,
        parts.rotary.cos_sin_cache,
        head_dim=_HEAD_DIM,
        rotary_dim=parts.rotary.rotary_dim,
        is_neox=parts.rotary.is_neox,
    )
    kernels.store_kv(
        key.view(-1, _KV_HEADS, _HEAD_DIM),
        value.view(-1, _KV_HEADS, _HEAD_DIM),
        heads.key_cache,
        heads.value_cache,
        slots,
    )
    attended = x.new_empty(len(x), _HEADS, _HEAD_DIM)
    attention.run(query.view(-1, _HEADS, _HEAD_DIM), heads.key_cache, heads.value_cache, attended)
    hidden = kernels.linear(attended.view(-1, _WIDTH), output, parts.biases[1])
    normed = kernels.rms_norm(hidden, second.weight, second.epsilon, residual)
    return kernels.linear(kernels.linear(normed, gate_up), down), residual


def _fused(kernels: CpuKernels, parts: _Parts) -> DecoderLayer:
    products = [
        (kernels.pack(weight, i == 2), bias)
        for i, (weight, bias) in enumerate(zip(parts.weights, parts.biases, strict=True))
    ]
    return DecoderLayer(
        kernels,
        qkv=products[0],
        output=products[1],
        gate_up=products[2],
        down=products[3],
        input_norm=parts.norms[0],
        post_norm=parts.norms[1],
        rotary=parts.rotary,
        heads=parts.heads,
        head_norms=parts.head_norms,
    )


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("is_rich", "is_neox", "window"), [(False, True, 0), (True, False, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer(
    kernels: CpuKernels, dtype: torch.dtype, is_rich: bool, is_neox: bool, window: int, is_first: bool
) -> None:
    """Hidden states, residual and KV, twice, with a residual and without. A rich one has biases, and norms of heads."""
    buffers, outputs = Buffers(), []
    positions, slots = torch.tensor([2, 16, 39, 4, 5, 6, 7, 8]), torch.arange(0, 64, 8)
    for is_fused in (False, True):
        parts = _parts(dtype, is_rich=is_rich, is_neox=is_neox, window=window)
        attention = _attention(kernels, parts.heads)
        x = random_tensor(8, _HIDDEN, dtype=dtype, seed=50)
        residual = None if is_first else random_tensor(8, _HIDDEN, dtype=dtype, seed=51)
        for _ in range(2):
            if is_fused:
                layer = _fused(kernels, parts)
                assert attention.step is not None
                step = DecoderStep(layer, attention.step, positions, slots, buffers)
                x, residual = layer.run(step, x, residual)
            else:
                x, residual = _one_by_one(kernels, parts, attention, positions, slots, x, residual)
        outputs.append((x, residual, parts.heads.key_cache, parts.heads.value_cache))
    for expected, actual in zip(*outputs, strict=True):
        assert torch.equal(expected, actual)


def test_a_position_that_the_model_lacks_is_an_error(kernels: CpuKernels) -> None:
    parts = _parts(torch.float32, is_rich=False, is_neox=True, window=0)
    attention, layer = _attention(kernels, parts.heads), _fused(kernels, parts)
    assert attention.step is not None
    step = DecoderStep(layer, attention.step, torch.full((8,), _NUM_POSITIONS), torch.arange(8), Buffers())
    with pytest.raises(IndexError, match="positions 64 to 64: the model has 64"):
        layer.run(step, torch.zeros(8, _HIDDEN), None)


def test_what_does_not_belong_together_is_refused(kernels: CpuKernels) -> None:
    """Kernels take addresses, and would read beyond what is there."""
    parts = _parts(torch.float32, is_rich=False, is_neox=True, window=0)
    attention, layer = _attention(kernels, parts.heads), _fused(kernels, parts)
    assert attention.step is not None
    with pytest.raises(ValueError, match="positions must be int64"):
        DecoderStep(layer, attention.step, torch.arange(7), torch.arange(8), Buffers())
    with pytest.raises(ValueError, match="slots must be int64"):
        DecoderStep(layer, attention.step, torch.arange(8), torch.arange(8).int(), Buffers())
    assert not layer.takes(torch.zeros(8, _HIDDEN, dtype=torch.bfloat16), 8)
    assert not layer.takes(torch.zeros(7, _HIDDEN), 8)
    other = parts._replace(weights=[parts.weights[0], *parts.weights[:1], *parts.weights[2:]])
    with pytest.raises(ValueError, match="are no layer of 4 heads"):
        _fused(kernels, other)
