"""Claims about SGLang's linear layers on a CPU: which code computes them, and where their weights are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sglang.srt import runtime_context
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.models.llama import LlamaMLP
from sglang.srt.server_args import ServerArgs

from batchllm.default_model import DEFAULT, cached_model_path
from batchllm.kernels.cpu import CpuKernels, load
from batchllm.srt.layers import cpu_linear

_METHOD = UnquantizedLinearMethod()


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever this machine's processor would choose."""
    kernels = load()
    assert isinstance(kernels, CpuKernels)
    chosen = dict.fromkeys(cpu_linear._DTYPES, kernels) if request.param == "compiled" else {}
    monkeypatch.setattr(cpu_linear, "_KERNELS", chosen)


def _layer(dtype: torch.dtype) -> torch.nn.Linear:
    """One that owns its weight."""
    layer = torch.nn.Linear(256, 96, dtype=dtype).requires_grad_(False)
    setattr(layer, cpu_linear._OWNERS, (layer,))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_a_row_does_not_depend_on_those_beside_it(dtype: torch.dtype) -> None:
    """To the bit, but for torch's in float32. Torch computes it for few numbers of rows; what is behind the rows in the
    buffer is of earlier calls.
    """
    layer = _layer(dtype)
    x = torch.randn(1000, 256, dtype=dtype)
    stock = layer(x)
    expected = cpu_linear._linear(_METHOD, layer, x, layer.bias)
    torch.testing.assert_close(expected, stock)
    shapes = set()
    for num_rows in [*range(1, 140), 300, 513, 7]:
        output = cpu_linear._linear(_METHOD, layer, x[:num_rows], layer.bias)
        assert output.is_contiguous()
        if cpu_linear._KERNELS or dtype == torch.bfloat16:
            assert torch.equal(output, expected[:num_rows])
        torch.testing.assert_close(output, expected[:num_rows])
        shapes.add(cpu_linear._padded_rows(num_rows))
    assert len(shapes) < 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_in_memory_once_and_can_be_had_back(dtype: torch.dtype) -> None:
    """Packed, it has no numbers that anybody could read by mistake. What is loaded into it then is computed with."""
    model = torch.nn.Sequential(_layer(dtype))
    layer, x = model[0], torch.randn(3, 256, dtype=dtype)
    before = layer.weight.clone()
    layer.weight.weight_loader = "its own"
    expected = cpu_linear._linear(_METHOD, layer, x)
    is_packed = bool(cpu_linear._KERNELS)
    assert layer.weight.is_meta == is_packed
    cpu_linear.restore_weights(model)
    assert torch.equal(layer.weight, before) and layer.weight.weight_loader == "its own"
    assert torch.equal(cpu_linear._linear(_METHOD, layer, x), expected)
    cpu_linear.restore_weights(model)
    layer.weight.data.copy_(2 * before)
    assert torch.equal(cpu_linear._linear(_METHOD, layer, x), 2 * expected)


def test_a_weight_of_others_too_stays_as_it_is() -> None:
    """An embedding that is the output layer as well is read by token."""
    layer = _layer(torch.float32)
    delattr(layer, cpu_linear._OWNERS)
    x = torch.randn(3, 256)
    torch.testing.assert_close(cpu_linear._linear(_METHOD, layer, x), F.linear(x, layer.weight))
    assert not layer.weight.is_meta
    layer.weight.data.mul_(2)
    torch.testing.assert_close(cpu_linear._linear(_METHOD, layer, x), F.linear(x, layer.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_layer(dtype: torch.dtype) -> None:
    """Options of SGLang's that the kernel does not know are not ignored."""
    head, x = _layer(dtype), torch.randn(3, 256, dtype=dtype)
    expected = F.linear(x, head.weight)
    processor = SimpleNamespace(use_fp32_lm_head=False, rl_on_policy_target=None)
    for name, value, result_dtype in (("use_fp32_lm_head", True, torch.float32), ("use_fp32_lm_head", False, dtype)):
        other = SimpleNamespace(**{**vars(processor), name: value})
        output = cpu_linear._compute_lm_head(other, x, head)
        assert output.dtype == result_dtype
        torch.testing.assert_close(output.to(dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_is_computed_with_the_layer_before_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SGLang's own module, as a model that was loaded has it."""
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", cpu_linear._linear)
    runtime_context.get_context().set_server_args(ServerArgs(model_path=cached_model_path(DEFAULT), device="cpu"))
    mlp = LlamaMLP(256, 96, "silu", tp_rank=0, tp_size=1).to(dtype).requires_grad_(False)
    mlp.gate_up_proj.weight.data.normal_(std=0.1)
    x = torch.randn(5, 256, dtype=dtype)
    expected = SiluAndMul().forward_native(F.linear(x, mlp.gate_up_proj.weight))
    cpu_linear.mark_layers(torch.nn.ModuleList([mlp]))
    output, _ = mlp.gate_up_proj(x)
    assert cpu_linear.is_activated(output) == bool(cpu_linear._KERNELS)
    torch.testing.assert_close(output if cpu_linear.is_activated(output) else mlp.act_fn(output), expected)
