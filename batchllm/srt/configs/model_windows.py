"""Which tokens the layers of a model see, as Hugging Face's own code has it. Runs in the engine's, the server's or the
scheduler's process.

SGLang's code of many models gives its attention no window, or one that is a token too long. What is read here replaces
what it gives, where our attention computes (`batchllm.srt.layers.attention_backend`).

Knows: configurations of models as transformers reads them. Must not know: engines, tensors.
Invariant: an architecture is named below if its answers were compared with those of transformers' code, with prompts
longer than the window (``tests/srt/test_architectures.py``).
"""

from __future__ import annotations

from typing import Any

_EVERY_LAYER = frozenset(
    {
        *("Ministral3ForCausalLM", "MistralForCausalLM", "MistralModel", "MixtralForCausalLM", "Phi3ForCausalLM"),
        *("Qwen3MoeForCausalLM", "Starcoder2ForCausalLM"),
    }
)
"""One window for all layers, or none."""
_LAYER_TYPES = frozenset(
    {
        *("Cohere2ForCausalLM", "Gemma2ForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM"),
        *("Qwen3Model", "SmolLM3ForCausalLM"),
    }
)
"""A window for the layers that ``layer_types`` calls ``sliding_attention``."""

OBEYED = _EVERY_LAYER | _LAYER_TYPES
"""Architectures, in SGLang's code or its adapter for transformers', whose windows our attention takes from here."""


def layer_windows(config: Any, architecture: str) -> list[int] | None:
    """Tokens that a token sees in each layer, itself included; 0: all before it.

    Args:
        config: Of the language model, as transformers reads it.
        architecture: The first that the model's configuration names.

    Returns:
        None where SGLang's layers say it themselves.
    """
    if architecture not in OBEYED:
        return None
    window = config.sliding_window or 0
    if architecture in _EVERY_LAYER:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in config.layer_types]
