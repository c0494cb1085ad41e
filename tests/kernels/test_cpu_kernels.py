"""The compiled kernels do what plain torch does, on every instruction set, with one thread and with two."""

from __future__ import annotations

import pytest
import torch

from batchllm.kernels.cpu import CpuKernels
from tests.kernels.levels import DTYPES, random_tensor

# Sizes below, at, and between multiples of all widths of vectors. The last is given to several threads.
SHAPES = [(3, 1), (3, 15), (3, 16), (3, 33), (700, 201)]


def _check_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Computed in float32, within some units in the last place, and rounded once."""
    rtol = 2e-6 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=rtol)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_rms_norm(kernels: CpuKernels, num_rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = random_tensor(num_rows, size, dtype=dtype), random_tensor(size, dtype=dtype, seed=1)
    before = x.clone()
    _check_close(kernels.rms_norm(x, weight, 1e-6), _rms_norm(x.double(), weight, 1e-6))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_rms_norm_adds_to_the_residual_first(kernels: CpuKernels, num_rows: int, size: int, dtype: torch.dtype) -> None:
    """In place, rounded once; the norm is that of the sum before it is rounded."""
    x, residual = random_tensor(num_rows, size, dtype=dtype), random_tensor(num_rows, size, dtype=dtype, seed=1)
    weight = random_tensor(size, dtype=dtype, seed=2)
    total = x.float() + residual.float()
    out = kernels.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total.to(dtype))
    _check_close(out, _rms_norm(total.double(), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_tiny_and_of_huge_rows(kernels: CpuKernels, dtype: torch.dtype) -> None:
    for factor in (0.0, 1e-12, 1e15):
        x, weight = random_tensor(2, 40, dtype=dtype) * factor, random_tensor(40, dtype=dtype, seed=1)
        _check_close(kernels.rms_norm(x, weight, 1e-6), _rms_norm(x.double(), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), SHAPES)
def test_silu_and_mul(kernels: CpuKernels, num_rows: int, size: int, dtype: torch.dtype) -> None:
    x = random_tensor(num_rows, 2 * size, dtype=dtype) * 4
    gate, up = x.double().chunk(2, dim=-1)
    _check_close(kernels.silu_and_mul(x), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_has_no_nan_where_the_exponential_overflows(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Each value in whole vectors and in the rest of a row."""
    for value in (-1e30, -1000.0, -100.0, -88.0, -87.0, -20.0, -0.0, 0.0, 20.0, 88.0, 100.0, 1000.0, 1e30):
        x = torch.full((2, 2 * 37), value, dtype=dtype)
        x[:, 37:] = 0.5
        gate, up = x.double().chunk(2, dim=-1)
        _check_close(kernels.silu_and_mul(x), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("shape", [(0, 8), (3, 4, 14)])
def test_silu_and_mul_of_any_leading_dimensions(kernels: CpuKernels, shape: tuple[int, ...]) -> None:
    x = random_tensor(*shape, dtype=torch.float32)
    out = kernels.silu_and_mul(x)
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    _check_close(out, torch.nn.functional.silu(x.double()[..., : shape[-1] // 2]) * x.double()[..., shape[-1] // 2 :])


def _rotated(x: torch.Tensor, angle: torch.Tensor, rotary_dim: int, is_neox: bool) -> torch.Tensor:
    """[tokens, heads, head_dim] turned as complex numbers by [tokens, rotary_dim / 2]."""
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = turned.unflatten(-1, (2, -1)).transpose(-1, -2) if is_neox else turned.unflatten(-1, (-1, 2))
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle[:, None])
    turned = (pairs.transpose(-1, -2) if is_neox else pairs).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 32), (64, 20), (80, 80), (16, 2)])
@pytest.mark.parametrize("num_tokens", [3, 900])
def test_rotary_embedding_turns_queries_and_keys_within_a_wider_tensor(
    kernels: CpuKernels, num_tokens: int, head_dim: int, rotary_dim: int, is_neox: bool, dtype: torch.dtype
) -> None:
    """Values beside them, and the elements of a head behind ``rotary_dim``, stay as they are."""
    qkv = random_tensor(num_tokens, 8 * head_dim, dtype=dtype)
    before = qkv.clone()
    angles = torch.arange(500.0)[:, None] / 10000 ** (torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    positions = torch.randint(0, 500, (num_tokens,), generator=torch.Generator().manual_seed(1))
    kernels.rotary_embedding(
        positions,
        qkv[:, : 4 * head_dim],
        qkv[:, 4 * head_dim : 6 * head_dim],
        cache,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        is_neox=is_neox,
    )
    cos, sin = cache.double()[positions].chunk(2, dim=-1)
    heads = before[:, : 6 * head_dim].double().view(num_tokens, 6, head_dim)
    expected = _rotated(heads, torch.complex(cos, sin), rotary_dim, is_neox).flatten(1)
    _check_close(qkv[:, : 6 * head_dim], expected)
    assert torch.equal(qkv[:, 6 * head_dim :], before[:, 6 * head_dim :])
    after, original = (x[:, : 6 * head_dim].view(num_tokens, 6, head_dim)[..., rotary_dim:] for x in (qkv, before))
    assert torch.equal(after, original)


@pytest.mark.parametrize("position", [-1, 9, 1 << 40])
def test_a_position_that_the_model_lacks_is_an_error(kernels: CpuKernels, position: int) -> None:
    """And nothing is turned: beside the table is other memory."""
    query, key = random_tensor(3, 64, dtype=torch.float32), random_tensor(3, 32, dtype=torch.float32)
    before, cache = query.clone(), torch.ones(9, 32)
    with pytest.raises(IndexError, match="the model has 9"):
        positions = torch.tensor([0, 8, position])
        kernels.rotary_embedding(positions, query, key, cache, head_dim=32, rotary_dim=32, is_neox=True)
    assert torch.equal(query, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 50, 8000])
def test_store_kv_writes_the_slots_and_no_other(kernels: CpuKernels, num_tokens: int, dtype: torch.dtype) -> None:
    """From views into a wider tensor, into caches of their own and into such as are interleaved with others. Values may
    have another width than keys.
    """
    wide = random_tensor(num_tokens, 8 * 17, dtype=dtype)
    keys, values = wide[:, 17 : 3 * 17].view(num_tokens, 2, 17), wide[:, 51:73].view(num_tokens, 2, 11)
    num_slots = 2 * num_tokens + 1
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))[:num_tokens]
    for is_interleaved in (False, True):
        pools = [torch.zeros(num_slots, 1 + is_interleaved, 2, width, dtype=dtype) for width in (17, 11)]
        caches = [pool[:, -1] for pool in pools]
        kernels.store_kv(keys, values, *caches, slots)
        for rows, cache, pool in zip((keys, values), caches, pools, strict=True):
            expected = torch.zeros_like(cache)
            expected[slots] = rows
            assert torch.equal(cache, expected)
            assert not is_interleaved or not pool[:, 0].any()
