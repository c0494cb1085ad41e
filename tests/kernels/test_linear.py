"""The compiled linear layers do what plain torch does, on every instruction set, with one thread and with two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchllm.kernels import cpu
from batchllm.kernels.cpu import CpuKernels
from tests.kernels.levels import DTYPES, LEVELS, random_tensor

# Rows, inputs, outputs. Below, at and between multiples of what the kernel works by: vectors, tiles of rows, panels,
# inputs in the cache, blocks of rows.
SHAPES = [(1, 1, 2), (5, 33, 70), (7, 64, 64), (13, 1027, 24), (250, 96, 130), (301, 520, 320)]


def _check_close(actual: torch.Tensor, expected: torch.Tensor, scale: float) -> None:
    """Added up in float32, and rounded once."""
    rtol = 1e-5 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, atol=1e-6 * scale, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SHAPES)
def test_linear(kernels: CpuKernels, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    """With a weight packed or as it is, the same to the bit."""
    x, bias = random_tensor(num_rows, num_inputs, dtype=dtype), random_tensor(num_outputs, dtype=dtype, seed=2)
    weight = random_tensor(num_outputs, num_inputs, dtype=dtype, seed=1)
    for b in (bias, None):
        out = kernels.linear(x, kernels.pack(weight), b)
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        _check_close(out, expected, num_inputs)
        assert torch.equal(kernels.linear(x, weight, b), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SHAPES)
def test_a_gated_weight(
    kernels: CpuKernels, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype
) -> None:
    """SwiGLU of the outputs, which are not rounded before."""
    x, weight = (
        random_tensor(num_rows, num_inputs, dtype=dtype),
        random_tensor(num_outputs, num_inputs, dtype=dtype, seed=1),
    )
    weight *= num_inputs**-0.5
    out = kernels.linear(x, kernels.pack(weight, is_gated=True))
    gate, up = F.linear(x.double(), weight.double()).chunk(2, dim=-1)
    _check_close(out, gate * gate.sigmoid() * up, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SHAPES)
def test_a_packed_weight_can_be_unpacked(
    kernels: CpuKernels, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype
) -> None:
    weight = random_tensor(num_outputs, num_inputs + num_rows, dtype=dtype)[:, :num_inputs]
    for is_gated in (False, True):
        unpacked = torch.zeros_like(weight)
        kernels.unpack(kernels.pack(weight, is_gated), unpacked)
        assert torch.equal(unpacked, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_those_beside_it(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """To the bit: else what a request is answered would depend on what else runs."""
    x, weight = random_tensor(600, 1100, dtype=dtype), random_tensor(200, 1100, dtype=dtype, seed=1)
    packed = kernels.pack(weight)
    expected = kernels.linear(x, packed)
    for num_rows in (*range(1, 20), 100, 241, 512):
        assert torch.equal(kernels.linear(x[:num_rows], packed), expected[:num_rows])


def test_what_does_not_belong_together_is_refused(kernels: CpuKernels) -> None:
    """The kernel takes addresses: it would read whatever lies there."""
    x, weight = torch.ones(3, 8), torch.ones(5, 8)
    assert kernels.linear(x[:0], weight).shape == (0, 5)
    for other in (torch.ones(5, 9), weight.bfloat16(), torch.ones(8, 5).T):
        with pytest.raises(ValueError, match="a product of"):
            kernels.linear(x, other)
    with pytest.raises(ValueError, match="a bias of"):
        kernels.linear(x, weight, torch.ones(4))
    with pytest.raises(ValueError, match="a weight of"):
        kernels.unpack(kernels.pack(weight), torch.ones(5, 9))
    with pytest.raises(ValueError, match="rows are not contiguous"):
        kernels.pack(torch.ones(8, 5).T)


@pytest.mark.skipif("avx512_bf16" not in LEVELS, reason="the processor has no products of bfloat16")
@pytest.mark.parametrize(("plain_s", "level"), [(1.0, "avx512_bf16"), (0.81, "avx512_bf16"), (0.79, "avx512")])
def test_products_of_bfloat16_are_taken_unless_float32_is_much_faster(
    monkeypatch: pytest.MonkeyPatch, plain_s: float, level: str
) -> None:
    monkeypatch.setattr(cpu, "best_seconds", lambda paired, plain: [1.0, plain_s])
    chosen = cpu.load.__wrapped__()
    assert isinstance(chosen, CpuKernels) and chosen.level == level
