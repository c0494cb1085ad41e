"""Counts of a model are those its publishers state, and configurations are read or refused by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchllm.errors import ConfigError
from batchllm.perf_model import MODELS, ModelShape, get_model

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def _without(field: str) -> dict[str, Any]:
    return {key: value for key, value in LLAMA_8B.items() if key != field}


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen2.5-14B", 14_770_033_664),
    ],
)
def test_parameters_are_those_of_the_published_weights(name: str, num_params: int) -> None:
    """Without biases, so Qwen's are a little fewer."""
    model = get_model(name)
    assert model.name == name
    assert model.num_params == pytest.approx(num_params, rel=1e-4)


def test_the_70b_model_is_the_4_bit_one_that_fits_a_card() -> None:
    assert get_model("Llama-3.1-70B").weight_bytes == pytest.approx(39.8e9, rel=0.01)
    assert replace(get_model("Llama-3.1-70B"), weight_bytes_per_param=2.0).weight_bytes == pytest.approx(
        141.1e9, rel=0.01
    )


def test_counts_of_a_token_follow_from_the_shape() -> None:
    model = get_model("Llama-3.1-8B")
    assert model.kv_bytes_per_token == 128 * 1024
    assert model.num_linear_params == model.num_params - 2 * 128256 * 4096 - 65 * 4096
    assert model.linear_flops_per_token == 2 * model.num_linear_params
    assert model.lm_head_flops_per_row == 2 * 128256 * 4096
    assert model.attention_flops_per_pair == 4 * 32 * 4096
    assert model.weight_bytes == 2 * model.num_params


def test_a_tied_output_layer_is_stored_once() -> None:
    model = get_model("Llama-3.1-8B")
    tied = replace(model, is_tied=True)
    assert model.num_params - tied.num_params == model.num_lm_head_params
    assert tied.lm_head_weight_bytes == model.lm_head_weight_bytes


def test_a_published_configuration_gives_the_known_shape() -> None:
    assert ModelShape.from_hf_config(LLAMA_8B, "Llama-3.1-8B") == MODELS["Llama-3.1-8B"]


@pytest.mark.parametrize("absent", [_without("num_key_value_heads"), LLAMA_8B | {"num_key_value_heads": None}])
def test_without_key_heads_every_head_has_its_own(absent: dict[str, Any]) -> None:
    assert ModelShape.from_hf_config(absent, "m").num_kv_heads == 32


def test_a_head_dim_that_is_stated_counts() -> None:
    assert ModelShape.from_hf_config(LLAMA_8B | {"head_dim": 256}, "m").head_dim == 256


def test_tied_embeddings_are_read_and_absent_means_untied() -> None:
    assert ModelShape.from_hf_config(LLAMA_8B | {"tie_word_embeddings": True}, "m").is_tied
    assert not ModelShape.from_hf_config(_without("tie_word_embeddings"), "m").is_tied


@pytest.mark.parametrize(
    ("quantization", "num_bytes"),
    [({"quant_method": "gptq", "bits": 4}, 0.5), ({"quant_method": "fp8"}, 1.0), (None, 2.0)],
)
def test_bytes_of_a_weight_come_from_the_quantization(quantization: dict[str, Any] | None, num_bytes: float) -> None:
    config = LLAMA_8B | {"quantization_config": quantization}
    assert ModelShape.from_hf_config(config, "m").weight_bytes_per_param == num_bytes
    assert ModelShape.from_hf_config(config, "m", weight_bytes_per_param=3).weight_bytes_per_param == 3


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"config of model 'mine': field '{field}' is missing"):
        ModelShape.from_hf_config(_without(field), "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "4096"}, "hidden_size must be a whole number of at least 1, not '4096'"),
        ({"vocab_size": True}, "vocab_size must be a whole number of at least 1, not True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, not 0"),
        ({"num_attention_heads": 33}, "num_attention_heads 33 does not divide hidden_size 4096"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1, not 0"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5 does not divide num_heads 32"),
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "give weight_bytes_per_param"),
        ({"quantization_config": {"bits": "four"}}, "no number of 'bits'"),
    ],
)
def test_a_configuration_that_cannot_be_costed_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape.from_hf_config(LLAMA_8B | change, "mine")


def test_an_unknown_model_is_refused_with_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"model 'llama-8b' is not known\. Did you mean 'Llama-3\.1-8B'\?") as error:
        get_model("llama-8b")
    assert str(error.value).endswith(", ".join(MODELS))


def test_sizes_must_be_above_zero() -> None:
    with pytest.raises(ConfigError, match=r"model 'Qwen2\.5-7B': head_dim must be a finite number above 0, not 0"):
        replace(get_model("Qwen2.5-7B"), head_dim=0)
