"""SGLang's decoder layers in one call each: what they give, and which of them are left alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.models.llama import LlamaDecoderLayer
from sglang.srt.models.qwen2 import Qwen2DecoderLayer
from sglang.srt.models.qwen3 import Qwen3DecoderLayer
from sglang.srt.server_args import ServerArgs
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from batchllm.default_model import DEFAULT, cached_model_path
from batchllm.kernels.cpu import CpuKernels, load
from batchllm.srt.layers import cpu_linear, cpu_ops, decoder_layer
from batchllm.srt.layers.attention_backend import SharedCpuAttnBackend
from batchllm.srt.layers.decoder_layer import fuse_layers

_SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
KINDS: list[Callable[[int], Any]] = [
    lambda number: LlamaDecoderLayer(LlamaConfig(**_SIZES), layer_id=number),
    lambda number: LlamaDecoderLayer(LlamaConfig(**_SIZES, attention_bias=True), layer_id=number),
    lambda number: Qwen2DecoderLayer(Qwen2Config(**_SIZES), layer_id=number),
    lambda number: Qwen3DecoderLayer(Qwen3Config(**_SIZES), layer_id=number),
]


@pytest.fixture(scope="module")
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What SGLang's layers ask for when they are made."""
    args = ServerArgs(model_path=cached_model_path(DEFAULT), device="cpu")
    runtime_context.get_context().set_server_args(args)
    path = tmp_path_factory.mktemp("rank") / "rendezvous"
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{path}", backend="gloo"
    )
    parallel_state.initialize_model_parallel()
    initialize_dp_attention(args, ModelConfig.from_server_args(args))
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's processor would choose."""
    kernels = load()
    assert isinstance(kernels, CpuKernels)
    monkeypatch.setattr(cpu_linear, "_KERNELS", dict.fromkeys(cpu_linear._DTYPES, kernels))
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", cpu_linear._linear)


pytestmark = pytest.mark.usefixtures("_one_rank", "_compiled")


def _use_compiled(model: torch.nn.Module) -> None:
    """What SGLang chooses when it makes these modules on our platform."""
    kernels = load()
    assert isinstance(kernels, CpuKernels)
    forward = {
        RMSNorm: cpu_ops._rms_norm(kernels),
        SiluAndMul: cpu_ops._silu_and_mul(kernels),
        RotaryEmbedding: cpu_ops._rotary_embedding(kernels),
    }
    for module in model.modules():
        if type(module) in forward:
            module._forward_method = forward[type(module)].__get__(module)


class _Model:
    """Two layers with KV of their own, which decode."""

    def __init__(self, make: Callable[[int], Any], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([make(number) for number in range(2)]).to(dtype).requires_grad_(False)
        for parameter in self.layers.parameters():
            parameter.normal_(std=0.1)
        _use_compiled(self.layers)
        cpu_linear.mark_layers(self.layers)
        self.pool = MHATokenToKVPool(128, 1, dtype, 2, 32, 2, "cpu", enable_memory_saver=False)
        self._rows = ReqToTokenPool(4, 32, "cpu", enable_memory_saver=False)
        self._rows.req_to_token[1:] = torch.randperm(128).view(4, 32)
        hf_config = SimpleNamespace(architectures=[], get_text_config=lambda: None)
        config = SimpleNamespace(
            hf_config=hf_config, hf_text_config=hf_config, num_hidden_layers=2, attention_arch=None
        )
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=self._rows, token_to_kv_pool=self.pool, model_config=config
        )
        self.backend = SharedCpuAttnBackend(runner)

    def steps(self, first: int, last: int) -> list[torch.Tensor]:
        """Hidden states and residual behind steps at these positions."""
        outputs = []
        for position in range(first, last):
            rows, num_tokens = torch.arange(1, 5), torch.full((4,), position + 1)
            batch = SimpleNamespace(
                forward_mode=ForwardMode.DECODE,
                req_pool_indices=rows,
                seq_lens=num_tokens,
                seq_lens_cpu=num_tokens,
                out_cache_loc=self._rows.req_to_token[1:, position].long(),
            )
            self.backend.init_forward_metadata(batch)
            hidden = torch.randn(4, 96, generator=torch.Generator().manual_seed(position))
            hidden, residual = hidden.to(self.pool.dtype), None
            with forward_context(ForwardContext(attn_backend=self.backend)):
                for layer in self.layers:
                    hidden, residual = layer(num_tokens - 1, hidden, batch, residual)
            assert residual is not None
            outputs += [hidden.clone(), residual.clone()]
        return outputs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that SGLang's own code has called for its products."""
    called: list[str] = []
    product = cpu_linear._product

    def _counted(*args: Any) -> Any:
        called.append("product")
        return product(*args)

    monkeypatch.setattr(cpu_linear, "_product", _counted)
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", KINDS)
def test_a_layer_gives_what_the_host_gives(make: Callable[[int], Any], dtype: torch.dtype, calls: list[str]) -> None:
    """To the bit, KV included. SGLang's code runs in the first step only, in which weights are packed."""
    host, fused = _Model(make, dtype), _Model(make, dtype)
    fuse_layers(fused.layers, fused.backend)
    expected = host.steps(0, 6)
    calls.clear()
    actual = fused.steps(0, 1)
    assert len(calls) == 8
    actual += fused.steps(1, 6)
    assert len(calls) == 8
    assert all(map(torch.equal, expected, actual))
    for number in range(2):
        for a, b in zip(host.pool.get_kv_buffer(number), fused.pool.get_kv_buffer(number), strict=True):
            assert torch.equal(a, b)


def test_weights_that_are_loaded_are_computed_with() -> None:
    host, fused = (_Model(KINDS[0], torch.float32) for _ in range(2))
    fuse_layers(fused.layers, fused.backend)
    before = [host.steps(0, 3), fused.steps(0, 3)]
    for model in (host, fused):
        cpu_linear.restore_weights(model.layers)
        for parameter in model.layers.parameters():
            parameter.data.mul_(1.5)
    after = [host.steps(3, 6), fused.steps(3, 6)]
    for expected, actual in (before, after):
        assert all(map(torch.equal, expected, actual))


def test_packed_weights_are_gone_when_weights_are_restored() -> None:
    """They are in memory once, also while others are loaded."""
    model = _Model(KINDS[0], torch.float32)
    fuse_layers(model.layers, model.backend)
    model.steps(0, 3)
    packed = [
        weakref.ref(module.__dict__[cpu_linear._PACKED].data)
        for module in model.layers.modules()
        if cpu_linear._PACKED in vars(module)
    ]
    assert len(packed) == 8
    cpu_linear.restore_weights(model.layers)
    assert [weight() for weight in packed] == [None] * 8


def test_hooks_of_a_user_are_called(calls: list[str]) -> None:
    """A layer with a hook anywhere in it is SGLang's to compute."""
    model, seen = _Model(KINDS[0], torch.float32), []
    model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append("down"))
    fuse_layers(model.layers, model.backend)
    model.steps(0, 1)
    calls.clear()
    model.steps(1, 4)
    assert len(seen) == 4 and len(calls) == 3 * 4


def test_other_layers_are_left_alone() -> None:
    model = _Model(KINDS[0], torch.float32)
    model.layers[0].input_layernorm.cast_x_before_out_mul = True
    model.layers[1].mlp.gate_up_proj.skip_bias_add = True
    fuse_layers(model.layers, model.backend)
    assert all("forward" not in vars(layer) for layer in model.layers)
    assert cpu_ops.is_plain_norm(model.layers[1].input_layernorm)


def test_a_layer_that_was_changed_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By whoever edits or patches SGLang's model; a line of the log says so."""
    forward = LlamaDecoderLayer.forward

    def _changed(self: Any, *args: Any) -> Any:
        return forward(self, *args)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", _changed)
    decoder_layer._was_read.cache_clear()
    model = _Model(KINDS[0], torch.float32)
    with caplog.at_level("WARNING", decoder_layer.__name__):
        fuse_layers(model.layers, model.backend)
    decoder_layer._was_read.cache_clear()
    assert "LlamaDecoderLayer.forward: changed" in caplog.text
    assert all("forward" not in vars(layer) for layer in model.layers)
