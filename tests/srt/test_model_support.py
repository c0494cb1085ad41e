"""Models that SGLang would answer wrongly, or die on, are refused by name before anything is started."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import sglang.srt
import transformers.models
from sglang.srt.configs.model_config import is_hybrid_swa_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from batchllm.errors import ConfigError
from batchllm.srt.configs import model_faults
from batchllm.srt.model_loader.model_registry import find_architectures
from batchllm.srt.server_args import make_server_args

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
_WINDOW = {"sliding_window": 64}
_AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}
_FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}}


_LONG = {
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    "original_max_position_embeddings": 64,
}


def _yarn(**more: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **more}}


def _part(factor: float) -> dict[str, Any]:
    """A configuration as transformers 5 writes it."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}}


def _ask(folder: Path, architecture: str, model_type: str, changes: dict[str, Any], **server_args: Any) -> Any:
    """The arguments of an engine for a model of which there is only a configuration."""
    config = {"architectures": [architecture], "model_type": model_type, **_TINY, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return make_server_args(str(folder), skip_tokenizer_init=True, load_format="dummy", **server_args)


_USED = _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
_IGNORED, _MISREAD = "sliding_window 64: SGLang ignores", "sliding_window 64: SGLang makes the window a token longer"
# What our attention computes on a CPU, and SGLang's own does not.
OURS = [
    ("MistralForCausalLM", "mistral", _WINDOW, _IGNORED),
    ("Ministral3ForCausalLM", "ministral3", _WINDOW, _IGNORED),
    ("MixtralForCausalLM", "mixtral", _WINDOW, _IGNORED),
    ("Phi3ForCausalLM", "phi3", _WINDOW, _IGNORED),
    ("Starcoder2ForCausalLM", "starcoder2", _WINDOW, _IGNORED),
    ("Qwen2ForCausalLM", "qwen2", _USED, _IGNORED),
    ("Qwen2MoeForCausalLM", "qwen2_moe", _USED, _IGNORED),
    ("Qwen3ForCausalLM", "qwen3", _USED, _IGNORED),
    ("Qwen3MoeForCausalLM", "qwen3_moe", _USED, _IGNORED),
    ("MistralModel", "mistral", _WINDOW, _IGNORED),
    ("Qwen3Model", "qwen3", _USED, _IGNORED),
    ("Cohere2ForCausalLM", "cohere2", _WINDOW, _MISREAD),
    (
        "SmolLM3ForCausalLM",
        "smollm3",
        _WINDOW | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
        "sliding_window 64: SGLang has no such model",
    ),
    (
        "Gemma2ForCausalLM",
        "gemma2",
        _WINDOW
        | {"hidden_act": "gelu_pytorch_tanh", "layer_types": ["full_attention", "sliding_attention"]}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "layer_types ['full_attention', 'sliding_attention']: SGLang gives every other layer a window",
    ),
    ("DeepseekV2ForCausalLM", "deepseek_v2", {}, "kv_lora_rank 512: SGLang hands the prompts"),
    ("DeepseekV3ForCausalLM", "deepseek_v3", {}, "kv_lora_rank 512: SGLang hands the prompts"),
]


@pytest.mark.parametrize(("architecture", "model_type", "changes", "said"), OURS)
def test_what_our_attention_computes_is_refused_without_it(
    architecture: str, model_type: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Windows, and keys and values that are kept compressed. `tests/srt/test_architectures.py` runs these models."""
    _ask(tmp_path, architecture, model_type, changes)
    with pytest.raises(ConfigError) as refused:
        _ask(tmp_path, architecture, model_type, changes, attention_backend="torch_native")
    message = str(refused.value)
    assert message.startswith(f"-m {tmp_path}: {architecture} with ")
    assert said in message and "\n" not in message and "; drop --attention-backend, or " in message


REFUSED = [
    ("LlamaForCausalLM", "llama", {"mlp_bias": True}, "mlp_bias true: SGLang leaves the bias out"),
    ("GraniteForCausalLM", "granite", {"attention_bias": True}, "attention_bias true"),
    ("CohereForCausalLM", "cohere", {"attention_bias": True}, "attention_bias true"),
    ("PhiForCausalLM", "phi", {}, "a bias of lm_head"),
    ("GPTJForCausalLM", "gptj", {}, "a bias of lm_head"),
    ("GemmaForCausalLM", "gemma", {"tie_word_embeddings": False}, "tie_word_embeddings false"),
    ("GPT2LMHeadModel", "gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings false"),
    ("GPT2LMHeadModel", "gpt2", {"activation_function": "relu"}, "activation_function relu"),
    ("GPT2LMHeadModel", "gpt2", {"scale_attn_weights": False}, "scale_attn_weights false"),
    ("GPTNeoXForCausalLM", "gpt_neox", {}, "embed_out"),
    ("Olmo3ForCausalLM", "olmo3", {}, "no rope_scaling"),
    ("MixtralForCausalLM", "mixtral", {"hidden_act": "gelu"}, "hidden_act gelu: SGLang computes silu"),
    ("StableLmForCausalLM", "stablelm", {"use_parallel_residual": True}, "use_parallel_residual true"),
    ("StableLmForCausalLM", "stablelm", {"qk_layernorm": True}, "qk_layernorm true"),
    ("OlmoeForCausalLM", "olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("OlmoeForCausalLM", "olmoe", {"norm_topk_prob": True}, "norm_topk_prob true"),
    ("LlamaForCausalLM", "llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", {}, "experts that are chosen by corrected scores"),
    ("LlamaForCausalLM", "llama", _yarn(attention_factor=0.7), "attention_factor 0.7: SGLang does not read it"),
    ("Phi3ForCausalLM", "phi3", _part(0.5), "partial_rotary_factor 0.5 within rope_parameters"),
    ("MixtralForCausalLM", "mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear"),
    ("Gemma3ForCausalLM", "gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
    ("Gemma2ForCausalLM", "gemma2", {}, "no hidden_act"),
    ("LlamaForCausalLM", "llama", _AWQ, "quantization awq"),
    ("LlamaForCausalLM", "llama", _FP8, "quantization fp8"),
    ("FalconH1ForCausalLM", "falcon_h1", {}, "state-space or linear-attention layers"),
    ("Qwen3NextForCausalLM", "qwen3_next", {}, "state-space or linear-attention layers"),
    ("Lfm2ForCausalLM", "lfm2", {}, "state-space or linear-attention layers"),
    ("GptOssForCausalLM", "gpt_oss", {}, "a KV cache of two sizes"),
    ("Llama4ForCausalLM", "llama4_text", {"attention_chunk_size": 64}, "attention_chunk_size 64"),
    ("MambaForCausalLM", "mamba", {}, "sglang 0.5.17 has no such model"),
    ("NoSuchForCausalLM", "llama", {}, "NoSuchForCausalLM with model_type llama: sglang 0.5.17 has no such model"),
    ("T5ForConditionalGeneration", "t5", {}, "an encoder before its decoder"),
    ("BertModel", "bert", {}, "plans are for models that generate text, or embed"),
    ("LlamaForSequenceClassification", "llama", {}, "plans are for models that generate text, or embed"),
    ("Qwen2ForCausalLM", "qwen2", {"is_causal": False}, "is_causal false: SGLang computes causal attention"),
    ("Qwen2ForRewardModel", "qwen2", {}, "plans are for models that generate text, or embed"),
]


@pytest.mark.parametrize(("architecture", "model_type", "changes", "said"), REFUSED)
def test_what_is_refused(
    architecture: str, model_type: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """In one line that names the folder, the architecture, the value, the reason and what to do."""
    with pytest.raises(ConfigError) as refused:
        _ask(tmp_path, architecture, model_type, changes)
    message = str(refused.value)
    # SGLang calls OLMo 3 by the name of OLMo 2.
    assert message.startswith(f"-m {tmp_path}: {architecture.replace('Olmo3', 'Olmo2')} with ")
    assert said in message and "\n" not in message and "; " in message


@pytest.mark.parametrize(
    ("architecture", "model_type", "changes", "server_args"),
    [
        ("LlamaForCausalLM", "llama", {"mlp_bias": False, "attention_bias": True}, {}),
        ("LlamaForCausalLM", "llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}, {}),
        ("LlamaForCausalLM", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {}),
        ("LlamaForCausalLM", "llama", {"mlp_bias": True}, {"model_impl": "transformers"}),
        ("Phi3ForCausalLM", "phi3", _LONG, {"context_length": 64, "model_impl": "transformers"}),
        ("LlamaForCausalLM", "llama", _yarn(attention_factor=None), {}),
        ("LlamaForCausalLM", "llama", _yarn(attention_factor=1.138629), {}),
        ("Phi3ForCausalLM", "phi3", _part(0.5) | {"partial_rotary_factor": 0.5}, {}),
        ("Phi3ForCausalLM", "phi3", _part(0.5), {"json_model_override_args": '{"partial_rotary_factor": 0.5}'}),
        ("MistralForCausalLM", "mistral", {"sliding_window": None}, {}),
        ("MistralForCausalLM", "mistral", {"sliding_window": 512}, {}),
        ("MistralForCausalLM", "mistral", _WINDOW, {"context_length": 64, "attention_backend": "torch_native"}),
        ("Qwen2ForCausalLM", "qwen2", _WINDOW, {}),
        ("Qwen2ForCausalLM", "qwen2", _WINDOW | {"use_sliding_window": True, "max_window_layers": 2}, {}),
        ("Qwen2MoeForCausalLM", "qwen2_moe", {}, {}),
        ("MellumForCausalLM", "mellum", _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, {}),
        ("Gemma2ForCausalLM", "gemma2", _WINDOW | {"hidden_act": "gelu_pytorch_tanh"}, {}),
        ("Gemma2ForCausalLM", "gemma2", {}, {"json_model_override_args": '{"hidden_act": "gelu_pytorch_tanh"}'}),
        ("Gemma3ForCausalLM", "gemma3_text", _WINDOW, {}),
        ("GPT2LMHeadModel", "gpt2", {}, {}),
        ("SmolLM3ForCausalLM", "smollm3", {}, {}),
        ("LlamaForCausalLM", "llama", _WINDOW, {}),
        ("LlamaForCausalLM", "llama", {"is_causal": True}, {"is_embedding": True}),
        *((name, "mistral", {"sliding_window": None}, {}) for name in ("LlamaEmbeddingModel", "MistralModel")),
        ("Qwen3Model", "qwen3", {}, {}),
    ],
)
def test_what_is_not_refused(
    architecture: str, model_type: str, changes: dict[str, Any], server_args: dict[str, Any], tmp_path: Path
) -> None:
    """Values that are harmless, that SGLang does obey, or that the remedies have made so."""
    _ask(tmp_path, architecture, model_type, changes, **server_args)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("GPT2LMHeadModel", "gpt2"), ("Gemma3ForCausalLM", "gemma3_text"), ("SmolLM3ForCausalLM", "smollm3")],
)
def test_a_model_that_pools_otherwise_does_not_embed(architecture: str, model_type: str, tmp_path: Path) -> None:
    """Or does not pool at all, or was not read; it generates."""
    with pytest.raises(ConfigError, match=r"or embed by the last token of causal attention; .*--is-embedding"):
        _ask(tmp_path, architecture, model_type, {}, is_embedding=True)


def test_the_remedy_for_a_window_is_accepted_and_a_token_more_is_not(tmp_path: Path) -> None:
    backend = "torch_native"
    with pytest.raises(ConfigError, match="drop --attention-backend, or give --context-length 64"):
        _ask(tmp_path, "MistralForCausalLM", "mistral", _WINDOW, context_length=65, attention_backend=backend)
    _ask(tmp_path, "MistralForCausalLM", "mistral", _WINDOW, context_length=64, attention_backend=backend)


def test_the_remedy_for_dynamic_rope_is_accepted(tmp_path: Path) -> None:
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    plain = '{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}'
    with pytest.raises(ConfigError, match="give --context-length 512"):
        _ask(tmp_path, "LlamaForCausalLM", "llama", rope)
    _ask(tmp_path, "LlamaForCausalLM", "llama", rope, context_length=512, json_model_override_args=plain)


def test_the_context_of_long_rope_is_the_first_one_unless_a_longer_one_is_asked_for(tmp_path: Path) -> None:
    """In that one, each prompt is computed as by Hugging Face."""
    for given, taken in (({}, 64), ({"context_length": 48}, 48), ({"context_length": 512}, 512)):
        assert _ask(tmp_path, "Phi3ForCausalLM", "phi3", _LONG, **given).context_length == taken
    with pytest.raises(ConfigError, match=r"original_max_position_embeddings 64: .*; give --context-length 64"):
        _ask(tmp_path, "Phi3ForCausalLM", "phi3", _LONG, model_impl="transformers")
    (tmp_path / "whole").mkdir()
    whole = _LONG | {"original_max_position_embeddings": 512}
    assert _ask(tmp_path / "whole", "Phi3ForCausalLM", "phi3", whole).context_length is None


def test_a_bias_that_the_adapter_has_no_place_for_either_is_refused_there_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PhiForCausalLM with a bias of lm_head"):
        _ask(tmp_path, "PhiForCausalLM", "phi", {}, model_impl="transformers")


def test_caps_are_not_left_to_sglangs_own_attention(tmp_path: Path) -> None:
    """It ignores them on a CPU."""
    changes = {"hidden_act": "gelu_pytorch_tanh"}
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping 50.0: .*drop --attention-backend"):
        _ask(tmp_path, "Gemma2ForCausalLM", "gemma2", changes, attention_backend="torch_native")


def test_the_unknown_is_named(tmp_path: Path) -> None:
    """Also where SGLang cannot read the configuration."""
    with pytest.raises(ConfigError, match=r"FooForCausalLM: sglang 0.5.17 has no such model, .*nosuch") as refused:
        _ask(tmp_path, "FooForCausalLM", "nosuch", {})
    assert "\n" not in str(refused.value)


def test_an_unknown_quantisation_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM: Unknown quantization method: nosuch"):
        _ask(tmp_path, "LlamaForCausalLM", "llama", {"quantization_config": {"quant_method": "nosuch"}})


def test_every_entry_says_where_upstream_does_it() -> None:
    folder = Path(sglang.srt.__path__[0])
    for fault in model_faults.FAULTS:
        file = fault.source.partition("::")[0].partition(",")[0].partition(";")[0].partition(":")[0].split()[0]
        assert (folder / file).is_file(), fault.source
        assert fault.architectures is None or fault.architectures <= find_architectures().keys(), fault.source


def test_every_window_that_hugging_face_applies_is_applied_or_refused() -> None:
    """By the text of both: whose mask slides there, and whose attention is given no window here."""
    folder = Path(transformers.models.__path__[0])
    native = find_architectures()
    slides = set()
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        file = folder / model_type / f"modeling_{model_type}.py"
        if architecture in native and file.is_file() and "create_sliding_window_causal_mask" in file.read_text():
            slides.add(architecture)
    obeys = {name for name in slides if "sliding_window_size" in _text(native[name]) or is_hybrid_swa_model([name])}
    listed = model_faults.IGNORE_WINDOWS | model_faults.MISREAD_WINDOWS
    assert len(slides) > 10 and slides - obeys <= listed
    assert all("sliding_window_size=" not in _text(native[name]) for name in model_faults.IGNORE_WINDOWS)


def _text(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()
