"""What the table of `batchllm.srt.configs.model_faults` asks of a model: the value of its configuration that is at
fault. Runs in the engine's or the server's process.

Knows: SGLang's ``ModelConfig``, the device. Must not know: weights, what is told to the user.
Invariant: the text that a function returns names the key and the value, as a user finds them in ``config.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch, is_hybrid_swa_model
from sglang.srt.model_loader.utils import resolve_transformers_arch

from batchllm.srt.configs import model_windows

LATENT_ON_CPU = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"})
"""SGLang's own models with latent attention that answer with our attention as Hugging Face's do; they were compared
(``tests/srt/test_architectures.py``)."""

_ONE_KV_SIZE = frozenset({"MellumForCausalLM"})
"""Models that SGLang keeps KV of two sizes for, but need not: compared without."""

_OTHER_HEADS = (
    "Embedding",
    "ForClassification",
    "ForMaskedLM",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "RewardModel",
)
"""In the names of architectures that generate no text."""


@dataclass(frozen=True, slots=True)
class Model:
    """What entries look at.

    Attributes:
        config: SGLang's ``ModelConfig``.
        architecture: The first one that the model's configuration names.
        is_native: SGLang's own code runs it, not its adapter for transformers' code.
        is_on_cpu: It is to run on a CPU.
        has_our_operators: By our attention and operators, not SGLang's own.
    """

    config: Any
    architecture: str
    is_native: bool
    is_on_cpu: bool
    has_our_operators: bool

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the configuration of the language model."""
        return getattr(self.config.hf_text_config, key, default)

    @property
    def window_len(self) -> int | None:
        """Tokens that a token sees at most, itself included, in some layer; None if it sees all of the context."""
        window, layer_types = self.get("sliding_window"), self.get("layer_types")
        if layer_types is not None and "sliding_attention" not in layer_types:
            return None
        if not window or self.get("use_sliding_window", True) is False or window >= self.config.context_len:
            return None
        return int(window)

    @property
    def rope(self) -> dict[str, Any]:
        """Parameters of the rotary embedding of all layers; empty where layers differ, or have none."""
        parameters = self.get("rope_parameters") or {}
        return parameters if "rope_type" in parameters else {}

    @property
    def original_len(self) -> int | None:
        """Tokens of the context that a scaled rotary embedding was trained with, where it says so."""
        return self.rope.get("original_max_position_embeddings")


def is_not(key: str, *fine: Any) -> Callable[[Model], str | None]:
    """At fault unless the value is one of these, or not there."""

    def find(model: Model) -> str | None:
        value = model.get(key)
        return None if value is None or value in fine else f"{key} {_text(value)}"

    return find


def lacks(key: str, written: str) -> Callable[[Model], str | None]:
    """At fault without the value, which ``config.json`` calls ``written``."""
    return lambda model: f"no {written} in its config.json" if model.get(key) in (None, "") else None


def on_cpu(find: Callable[[Model], str | None]) -> Callable[[Model], str | None]:
    """At fault on CPUs only."""
    return lambda model: find(model) if model.is_on_cpu else None


def of_adapter(find: Callable[[Model], str | None]) -> Callable[[Model], str | None]:
    """At fault only where SGLang has no code of its own for the model."""
    return lambda model: None if model.is_native else find(model)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def window(model: Model) -> str | None:
    """Layers whose tokens see fewer than the whole context."""
    return None if model.window_len is None else f"sliding_window {model.window_len}"


def window_not_ours(model: Model) -> str | None:
    """The same, where our attention does not take the window from the configuration itself."""
    return None if _obeys_windows(model) else window(model)


def _obeys_windows(model: Model) -> bool:
    return model.is_on_cpu and model.has_our_operators and model.architecture in model_windows.OBEYED


def drop_backend(model: Model) -> str:
    """The beginning of a remedy, where our attention computes what is at fault and was declined; else empty."""
    computed = model_windows.OBEYED | LATENT_ON_CPU
    is_declined = model.is_on_cpu and not model.has_our_operators and model.architecture in computed
    return "drop --attention-backend, or " if is_declined else ""


def score_cap(model: Model) -> str | None:
    """A cap of attention scores."""
    cap = model.get("attn_logit_softcapping")
    return f"attn_logit_softcapping {cap}" if cap else None


def needs_our_operators(model: Model) -> str | None:
    """What SGLang's own attention, or kernels that a CPU has not, would be needed for."""
    if not model.is_on_cpu or model.has_our_operators:
        return None
    cap = model.get("final_logit_softcapping")
    return score_cap(model) or (f"final_logit_softcapping {cap}" if cap else None)


def chunked_attention(model: Model) -> str | None:
    """Layers whose tokens see no further back than their chunk, on a CPU."""
    chunk = model.config.attention_chunk_size
    is_short = model.is_on_cpu and chunk and chunk < model.config.context_len
    return f"attention_chunk_size {chunk}" if is_short else None


def always(what: str) -> Callable[[Model], str | None]:
    """Whatever the configuration says."""
    return lambda model: what


def output_bias(model: Model) -> str | None:
    """A bias of the output embeddings that every model of an architecture has, in whoever's code."""
    return "a bias of lm_head" if model.architecture in ("GPTJForCausalLM", "PhiForCausalLM") else None


def other_output_name(model: Model) -> str | None:
    """Output embeddings under a name of their own, in a model that SGLang has no code of its own for."""
    return "output embeddings called embed_out" if model.architecture == "GPTNeoXForCausalLM" else None


_EMBEDDERS = frozenset(
    {
        *("LlamaEmbeddingModel", "LlamaForCausalLM", "MistralForCausalLM", "MistralModel"),
        *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3Model"),
    }
)
"""SGLang's own models that were read: causal, and the vector is the last token's hidden state, normalised."""


def no_text(model: Model) -> str | None:
    """A model for something else than generating text, which a plan has no use for either."""
    if not model.config.is_generation and model.is_native and model.architecture in _EMBEDDERS:
        return None
    is_other = not model.config.is_generation or any(word in model.architecture for word in _OTHER_HEADS)
    return "no language model's head" if is_other else None


def unknown(model: Model) -> str | None:
    """Nobody's: SGLang falls back to transformers' code where that can run in it."""
    if model.is_native:
        return None
    try:
        resolve_transformers_arch(model.config, list(model.config.hf_config.architectures))
    except ValueError:
        return f"model_type {model.config.hf_config.model_type}"
    return None


def unpinnable_cache(model: Model) -> str | None:
    """What a model keeps of a prompt, where that is not one row of keys and values a token."""
    is_hybrid = is_hybrid_swa_model(model.config.hf_config.architectures, model.config.hf_text_config)
    if model.config.is_hybrid_swa or (is_hybrid and model.architecture not in _ONE_KV_SIZE):
        return "a KV cache of two sizes for its sliding windows"
    return None if mambaish_config(model.config) is None else "state-space or linear-attention layers"


def latent_attention(model: Model) -> str | None:
    """Keys and values that are kept compressed, on a CPU, but for models that were read and compared there."""
    if not model.is_on_cpu or model.config.attention_arch != AttentionArch.MLA:
        return None
    is_compared = model.has_our_operators and model.is_native and model.architecture in LATENT_ON_CPU
    return None if is_compared else f"kv_lora_rank {model.get('kv_lora_rank')}"


def quantization(model: Model) -> str | None:
    """Weights that are quantised."""
    return None if model.config.quantization is None else f"quantization {model.config.quantization}"


def encoder_decoder(model: Model) -> str | None:
    """A model of two halves."""
    is_one = model.config.is_encoder_decoder or getattr(model.config.hf_config, "is_encoder_decoder", False)
    return "an encoder before its decoder" if is_one else None


def grouped_kv_heads(model: Model) -> str | None:
    """Fewer KV heads than query heads."""
    num_kv_heads = model.get("num_key_value_heads")
    is_fine = num_kv_heads in (None, model.get("num_attention_heads"))
    return None if is_fine else f"num_key_value_heads {num_kv_heads}"


def alibi(model: Model) -> str | None:
    """Positions as slopes of the attention scores."""
    if model.architecture in ("BaichuanForCausalLM", "BaiChuanForCausalLM"):
        hidden_size = model.get("hidden_size")
        return f"hidden_size {hidden_size}, which has ALiBi" if hidden_size != 4096 else None
    return "alibi true" if not model.is_native and model.get("alibi") else None


def layer_types_of_gemma2(model: Model) -> str | None:
    """Layers that do not take turns as they usually do."""
    types = model.get("layer_types") or []
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(types))]
    is_fine = model.window_len is None or types == usual or _obeys_windows(model)
    return None if is_fine else f"layer_types {types}"
