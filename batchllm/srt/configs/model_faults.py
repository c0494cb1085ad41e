"""Models that SGLang 0.5.17 would answer wrongly, or die on: a table. Runs in the engine's or the server's process.

(Upstream: ``srt/configs/model_config.py`` and ``srt/models``; each entry names its place there.)

Knows: what is asked of a configuration (`batchllm.srt.configs.model_traits`, `batchllm.srt.configs.rotary_traits`).
Must not know: who asks.
Invariant: an entry speaks of models whose answers were found to differ from those of Hugging Face's own code, or whose
engine was found to die, when the upstream code that it names was read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batchllm.srt.compat import SGLANG_VERSION
from batchllm.srt.configs import model_traits as traits
from batchllm.srt.configs import rotary_traits
from batchllm.srt.configs.model_traits import Model

ELSEWHERE = "run it with Hugging Face transformers"
_ADAPTER = "give --model-impl transformers, or " + ELSEWHERE


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


@dataclass(frozen=True, slots=True)
class Fault:
    """An entry of the table.

    Attributes:
        find: What in a configuration is at fault, e.g. ``sliding_window 4096``; None if nothing is.
        reason: What SGLang does with it.
        remedy: What to do; ``{window}`` stands for the window, ``{ours}`` for dropping a flag that declines our
            attention, where that would do.
        source: Where upstream does it.
        architectures: SGLang's own models that have the fault; None for all, and for those of its adapter.
    """

    find: Callable[[Model], str | None]
    reason: str
    remedy: str
    source: str
    architectures: frozenset[str] | None = None

    def applies(self, model: Model) -> str | None:
        """What of this model is at fault, or None."""
        if self.architectures is not None and not (model.is_native and model.architecture in self.architectures):
            return None
        return self.find(model)


_SHORTER = "{ours}give --context-length {window}, or less, or " + ELSEWHERE

IGNORE_WINDOWS = _names(
    *("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration", "MistralForCausalLM", "MistralModel"),
    *("MixtralForCausalLM", "Phi3ForCausalLM", "Phi4MMForCausalLM", "PhiMoEForCausalLM", "Qwen2ForCausalLM"),
    *("Qwen2MoeForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    *("Qwen3ForCausalLM", "Qwen3Model", "Qwen3MoeForCausalLM", "Starcoder2ForCausalLM"),
)
"""SGLang's code never reads the window, and Hugging Face's does."""
MISREAD_WINDOWS = _names("Cohere2ForCausalLM", "Cohere2MoeForCausalLM", "ExaoneMoEForCausalLM")
"""SGLang's windows have a token more than Hugging Face's."""

FAULTS: tuple[Fault, ...] = (
    Fault(
        traits.encoder_decoder,
        "plans are for models that only decode",
        ELSEWHERE,
        "configs/model_config.py::is_encoder_decoder_model",
    ),
    Fault(
        traits.no_text,
        "plans are for models that generate text, or embed by the last token of causal attention; of others nothing is "
        "shared, or they were not read",
        "run it with `python -m sglang.launch_server --is-embedding`",
        "configs/model_config.py::is_generation_model; layers/pooler.py::Pooler",
    ),
    Fault(
        traits.unknown,
        f"sglang {SGLANG_VERSION} has no such model, and the installed transformers has none that can run in it",
        "name another model, or " + ELSEWHERE,
        "model_loader/utils.py::resolve_transformers_arch",
    ),
    Fault(
        traits.unpinnable_cache,
        "plans cannot pin what such a model keeps of a prefix",
        "run it with `python -m sglang.launch_server`",
        "mem_cache/kv_cache_builder.py; configs/hybrid_arch.py::mambaish_config",
    ),
    Fault(
        traits.latent_attention,
        "SGLang hands the prompts of multi-head latent attention to an attention that a CPU has not, and the answers "
        "would be wrong",
        "{ours}run it on a GPU",
        "models/deepseek_common/attention_backend_handler.py::handle_attention_triton",
    ),
    Fault(
        traits.on_cpu(traits.quantization),
        "SGLang has no kernels for quantised weights on a CPU without sgl_kernel, and would end in the first step",
        "run it on a GPU, or take the model's weights that are not quantised",
        "layers/quantization/__init__.py",
    ),
    Fault(
        traits.window_not_ours,
        "SGLang ignores the window, and tokens would see more than the model was trained to",
        _SHORTER,
        "models/llama.py, models/qwen2.py, ...: LlamaAttention.__init__ gives RadixAttention no window",
        IGNORE_WINDOWS,
    ),
    Fault(
        traits.window_not_ours,
        "SGLang makes the window a token longer than it is",
        _SHORTER,
        "models/commandr.py::CohereAttention.__init__: sliding_window, where others give sliding_window - 1",
        MISREAD_WINDOWS,
    ),
    Fault(
        traits.of_adapter(traits.window_not_ours),
        "SGLang has no such model, and its adapter for transformers' code misreads the window",
        _SHORTER,
        "models/transformers.py::TransformersBase._create_attention_instances",
    ),
    Fault(
        traits.layer_types_of_gemma2,
        "SGLang gives every other layer a window, whatever layer_types says",
        _SHORTER,
        "models/gemma2.py::Gemma2Attention.__init__",
        _names("Gemma2ForCausalLM"),
    ),
    Fault(
        traits.needs_our_operators,
        "SGLang's own attention on a CPU leaves the cap out, or ends in the first step",
        "drop --attention-backend",
        "layers/attention/torch_native_backend.py; layers/logits_processor.py::LogitsProcessor._get_logits",
    ),
    Fault(
        traits.lacks("hidden_act", "hidden_act"),
        "SGLang reads it, and ends without it",
        '--json-model-override-args \'{{"hidden_act": "gelu_pytorch_tanh"}}\' gives it',
        "models/gemma2.py::Gemma2DecoderLayer.__init__",
        _names("Gemma2ForCausalLM"),
    ),
    Fault(
        traits.chunked_attention,
        "attention in chunks is not computed on a CPU",
        "give --context-length of at most the chunk, or run it on a GPU",
        "layers/attention/torch_native_backend.py has no use_irope",
    ),
    Fault(
        traits.of_adapter(traits.score_cap),
        "SGLang has no such model, and its adapter for transformers' code ignores the cap of attention scores",
        ELSEWHERE,
        "models/transformers.py::TransformersBase._create_attention_instances",
    ),
    Fault(
        traits.score_cap,
        "SGLang ignores the cap of attention scores",
        ELSEWHERE,
        "models/gemma3_causal.py::Gemma3Attention.__init__: logit_cap=0.0",
        _names("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    ),
    Fault(
        traits.on_cpu(traits.always("scores that depend on the position")),
        "SGLang's attention on a CPU leaves them out",
        "run it on a GPU",
        "models/grok.py::Grok1Attention.__init__: xai_temperature_len",
        _names("Grok1ForCausalLM", "Grok1ModelForCausalLM"),
    ),
    Fault(
        traits.on_cpu(traits.always("experts that are chosen by corrected scores")),
        "SGLang's choice of experts on a CPU ends in the first step",
        "run it on a GPU, or " + ELSEWHERE,
        "models/ernie4.py::MoEGate: a correction of two dimensions; layers/moe/topk.py::fused_topk_torch_native",
        _names("Ernie4_5_MoeForCausalLM"),
    ),
    Fault(
        rotary_traits.dynamic_rope,
        "SGLang turns all positions as at the longest context, Hugging Face only those of longer ones",
        "for prompts of up to {max_len} tokens give --context-length {max_len} and --json-model-override-args "
        '\'{{"rope_parameters": {{"rope_type": "default", "rope_theta": ...}}}}\'',
        "layers/rotary_embedding/rope_variant.py::DynamicNTKScalingRotaryEmbedding",
    ),
    Fault(
        traits.of_adapter(rotary_traits.long_rope),
        "transformers' code turns all tokens of a step by the long factors where one of them is far behind, and by the "
        "short ones elsewhere",
        "give --context-length {original_len}, or less",
        "models/transformers.py: leaves the rotary embedding to transformers' longrope_frequency_update",
    ),
    Fault(
        rotary_traits.attention_factor,
        "SGLang does not read it",
        _ADAPTER,
        "layers/rotary_embedding/factory.py::get_rope",
    ),
    Fault(
        rotary_traits.hidden_partial_rotary,
        "SGLang looks for it outside, and turns heads otherwise",
        "--json-model-override-args '{{\"partial_rotary_factor\": ...}}' gives it there",
        "models/llama.py::LlamaAttention.__init__; models/stablelm.py::StablelmAttention.__init__",
        _names("PersimmonForCausalLM", "Phi3ForCausalLM", "StableLmForCausalLM"),
    ),
    Fault(
        rotary_traits.rope_scaling,
        "SGLang ignores the scaling of its rotary embedding",
        ELSEWHERE,
        "models/mixtral.py::MixtralAttention.__init__: get_rope without rope_scaling",
        _names(
            "BaichuanForCausalLM",
            "DbrxForCausalLM",
            "Gemma2ForCausalLM",
            "GemmaForCausalLM",
            "GraniteMoeForCausalLM",
            "MixtralForCausalLM",
            "OlmoForCausalLM",
            "PersimmonForCausalLM",
            "PhiForCausalLM",
            "StableLmForCausalLM",
            "Starcoder2ForCausalLM",
        ),
    ),
    Fault(
        traits.is_not("mlp_bias", False),
        "SGLang leaves the bias out",
        _ADAPTER,
        "models/llama.py::LlamaMLP.__init__: bias=False",
        _names("ArceeForCausalLM", "GraniteForCausalLM", "LlamaEmbeddingModel", "LlamaForCausalLM", "MistralModel"),
    ),
    Fault(
        traits.is_not("attention_bias", False),
        "SGLang leaves the bias out",
        _ADAPTER,
        "models/granite.py::GraniteAttention.__init__: bias=False",
        _names(
            "Cohere2ForCausalLM",
            "CohereForCausalLM",
            "GemmaForCausalLM",
            "GraniteForCausalLM",
            "GraniteMoeForCausalLM",
            "OlmoeForCausalLM",
        ),
    ),
    Fault(
        traits.output_bias,
        "SGLang leaves the bias out",
        ELSEWHERE,
        "layers/logits_processor.py::LogitsProcessor._get_logits: without an embedding_bias, no bias",
    ),
    Fault(
        traits.other_output_name,
        "SGLang has no such model, and its adapter for transformers' code ends on that name",
        ELSEWHERE,
        "models/transformers.py::TransformersBase.load_weights",
    ),
    Fault(
        traits.lacks("rope_parameters", "rope_scaling"),
        "SGLang's own class for this configuration reads rope_theta and rope_scaling only, and ends without",
        "write them into config.json as the model's publisher does",
        "models/olmo2.py::Olmo2Attention.__init__; configs/olmo3.py",
        _names("Olmo2ForCausalLM"),
    ),
    Fault(
        traits.is_not("lm_head_bias", False),
        "SGLang leaves the bias out",
        ELSEWHERE,
        "layers/logits_processor.py::LogitsProcessor._get_logits: without an embedding_bias, no bias",
        _names("PhiMoEForCausalLM"),
    ),
    Fault(
        traits.is_not("tie_word_embeddings", True),
        "SGLang takes the input embeddings for lm_head, and ignores the checkpoint's",
        ELSEWHERE,
        "models/gemma.py::GemmaForCausalLM.load_weights: skips lm_head.weight",
        _names(
            "Cohere2ForCausalLM",
            "CohereForCausalLM",
            "GPT2LMHeadModel",
            "GPTBigCodeForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "GemmaForCausalLM",
        ),
    ),
    Fault(
        traits.is_not("qk_layernorm", False),
        "SGLang leaves the norms of queries and keys out",
        ELSEWHERE,
        "models/stablelm.py, models/phi.py: the attention has no norms",
        _names("PhiForCausalLM", "StableLmForCausalLM"),
    ),
    Fault(
        traits.is_not("use_parallel_residual", False),
        "SGLang computes attention and MLP one after the other",
        ELSEWHERE,
        "models/stablelm.py::StablelmDecoderLayer.forward",
        _names("StableLmForCausalLM"),
    ),
    Fault(
        traits.grouped_kv_heads,
        "SGLang takes as many KV heads as query heads",
        ELSEWHERE,
        "models/phi.py::PhiAttention.__init__",
        _names("PhiForCausalLM"),
    ),
    Fault(
        traits.is_not("clip_qkv"),
        "SGLang does not clip queries, keys and values",
        ELSEWHERE,
        "models/olmoe.py::OlmoeAttention.forward",
        _names("OlmoeForCausalLM"),
    ),
    Fault(
        traits.is_not("norm_topk_prob", False),
        "SGLang does not normalise the experts' weights",
        ELSEWHERE,
        "models/olmoe.py::OlmoeMoE.__init__: renormalize=False",
        _names("OlmoeForCausalLM"),
    ),
    Fault(
        traits.is_not("scale_attn_weights", True),
        "SGLang scales attention scores all the same",
        ELSEWHERE,
        "models/gpt2.py::GPT2Attention.__init__",
        _names("GPT2LMHeadModel", "GPTBigCodeForCausalLM"),
    ),
    Fault(
        traits.is_not("activation_function", "gelu_new", "gelu_pytorch_tanh"),
        "SGLang computes gelu_new",
        ELSEWHERE,
        "models/gpt2.py::GPT2MLP.__init__: NewGELU",
        _names("GPT2LMHeadModel"),
    ),
    Fault(
        traits.is_not("hidden_act", "silu", "swish"),
        "SGLang computes silu",
        ELSEWHERE,
        "models/mixtral.py, models/stablelm.py, ...: SiluAndMul, whatever hidden_act says",
        _names(
            "Cohere2ForCausalLM",
            "CohereForCausalLM",
            "GraniteMoeForCausalLM",
            "MiniMaxM2ForCausalLM",
            "MixtralForCausalLM",
            "OlmoForCausalLM",
            "OlmoeForCausalLM",
            "PhiMoEForCausalLM",
            "StableLmForCausalLM",
        ),
    ),
    Fault(
        traits.is_not("use_bidirectional_attention", False),
        "SGLang computes causal attention",
        ELSEWHERE,
        "models/gemma.py::GemmaAttention.__init__",
        _names("Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM"),
    ),
    Fault(
        traits.is_not("is_causal", True),
        "SGLang computes causal attention",
        ELSEWHERE,
        "models/qwen2.py, ...: RadixAttention without attn_type",
    ),
    Fault(
        traits.alibi,
        "SGLang's attention leaves ALiBi's slopes out",
        ELSEWHERE,
        "models/baichuan.py::BaiChuanAttention.__init__: slopes are passed on NPUs only",
    ),
)
"""Checked in order; the first that applies is reported."""
