"""A weight that no tensor of the checkpoint fills is found, however its parameter is filled."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import nn

from batchllm.errors import ConfigError
from batchllm.srt.model_loader import filled_parameters
from tests.sizes import sized


class _Layer(nn.Module):
    """Three projections in one parameter, experts in another, a norm, and a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv_proj = nn.Parameter(torch.empty(6, 4, dtype=dtype))
        self.experts = nn.Parameter(torch.empty(3, 4, 4, dtype=dtype))
        self.norm = nn.Parameter(torch.ones(4, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(4, dtype=dtype))


class _Model(nn.Module):
    """Embeddings that are also the head, two layers, a buffer and whole numbers that no checkpoint has."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.empty(8, 4, dtype=dtype))
        self.lm_head = self.embed
        self.layers = nn.ModuleList([_Layer(dtype) for _ in range(2)])
        self.register_buffer("inv_freq", torch.ones(2))
        self.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        """Each name is a parameter and, where it has parts, the number of one."""
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            name, _, part = name.partition("@")
            parameter = parameters[name].data
            rows = {"qkv_proj": 2, "experts": 1}.get(name.rpartition(".")[2])
            if rows is not None:
                parameter = parameter[int(part) * rows : (int(part) + 1) * rows]
            parameter.copy_(weight)


def _checkpoint(model: _Model) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        rows = {"qkv_proj": 2, "experts": 1}.get(name.rpartition(".")[2])
        if parameter.dtype == torch.int64:
            continue
        if rows is None:
            tensors[name] = torch.randn(parameter.shape)
            continue
        for part in range(3):
            tensors[f"{name}@{part}"] = torch.randn(rows, *parameter.shape[1:])
    return tensors


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    filled_parameters.mark(model)
    model.load_weights(iter(tensors.items()))
    filled_parameters.check_filled(model, "MODEL")


_NAMES = sorted(_checkpoint(_Model()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_checkpoint_is_loaded_as_it_is(dtype: torch.dtype) -> None:
    model = _Model(dtype)
    tensors = _checkpoint(model)
    _load(model, tensors)
    assert torch.equal(model.embed.data, tensors["embed"].to(dtype))
    assert torch.equal(model.layers[1].experts.data[2:], tensors["layers.1.experts@2"].to(dtype))
    assert torch.equal(model.counts.data, torch.zeros(3, dtype=torch.int64)) and torch.equal(
        model.inv_freq, torch.ones(2)
    )


@settings(max_examples=sized(50, 1000), deadline=None)
@given(missing=st.sets(st.sampled_from(_NAMES), min_size=1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_exactly_what_is_missing_is_named(missing: set[str], dtype: torch.dtype) -> None:
    """Whole parameters and parts of them; a bias that no layer has is zero, as in Hugging Face."""
    model = _Model(dtype)
    tensors = {name: tensor for name, tensor in _checkpoint(model).items() if name not in missing}
    biases = {name for name in missing if name.endswith("bias")}
    at_fault = {name.partition("@")[0] for name in (missing - biases if len(biases) == 2 else missing)}
    if at_fault:
        with pytest.raises(ConfigError, match="-m MODEL: no tensor") as refused:
            _load(model, tensors)
        named = re.findall(r"(?:embed|layers\.\d\.\w+)", str(refused.value))
        assert set(named) <= at_fault and len(named) == min(len(at_fault), 5)
    else:
        _load(model, tensors)
        assert not any(layer.bias.any() for layer in model.layers)


def test_how_much_is_missing_is_said() -> None:
    model = _Model()
    tensors = _checkpoint(model)
    del tensors["layers.1.experts@1"]
    with pytest.raises(ConfigError, match=r"fills layers\.1\.experts \(33 % of it\); "):
        _load(model, tensors)


def test_a_nan_of_the_checkpoint_is_not_a_missing_weight() -> None:
    """Whatever computes with it: that is the checkpoint's."""
    model = _Model()
    tensors = _checkpoint(model)
    tensors["embed"] = torch.full((8, 4), torch.nan)
    tensors["layers.0.norm"] = torch.tensor([torch.inf, -torch.inf, -torch.nan, 0.0])
    _load(model, tensors)


class _Quantised:
    quantization: str | None = "fp8"
    model_path = "MODEL"


class _Plain(_Quantised):
    quantization = None


@pytest.mark.parametrize(("config", "is_checked"), [(_Quantised(), False), (_Plain(), True)])
def test_where_it_stands_in_sglangs_loader(
    monkeypatch: pytest.MonkeyPatch, config: _Quantised, is_checked: bool
) -> None:
    """Plain checkpoints when a model is loaded; not those of quantised models, nor weights that are updated later."""
    model = _Model()
    tensors = _checkpoint(model)
    del tensors["embed"]
    loader = DefaultModelLoader(SimpleNamespace(model_loader_extra_config={}, load_format="auto"))

    def stock(self: Any, *, model_config: Any, device_config: Any) -> None:
        self.load_weights_and_postprocess(model, iter(tensors.items()), torch.device("cpu"))

    monkeypatch.setattr(filled_parameters, "_stock_load_model", stock)
    if is_checked:
        with pytest.raises(ConfigError, match="fills embed"):
            filled_parameters._load_model(loader, model_config=config, device_config=None)
    else:
        filled_parameters._load_model(loader, model_config=config, device_config=None)
    loader.load_weights_and_postprocess(model, iter(tensors.items()), torch.device("cpu"))
    assert "load_weights" not in vars(model)
