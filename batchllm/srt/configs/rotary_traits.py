"""What the table of `batchllm.srt.configs.model_faults` asks of a model's rotary embedding. Runs in the engine's or the
server's process.

Knows: the configuration, as transformers reads it. Must not know: tensors, what is told to the user.
Invariant: as in `batchllm.srt.configs.model_traits`.
"""

from __future__ import annotations

import math

from sglang.srt.layers.rotary_embedding.yarn import yarn_get_mscale

from batchllm.srt.configs.model_traits import Model


def rope_scaling(model: Model) -> str | None:
    """A rotary embedding that is scaled."""
    rope_type = model.rope.get("rope_type", "default")
    return None if rope_type == "default" else f"rope_type {rope_type}"


def dynamic_rope(model: Model) -> str | None:
    """A rotary embedding that Hugging Face changes with the length of the prompt."""
    rope = model.rope
    is_wrong = rope.get("rope_type") == "dynamic" and "alpha" not in rope and rope.get("factor", 1) != 1
    return f"rope_type dynamic, factor {rope['factor']}" if is_wrong else None


def long_rope(model: Model) -> str | None:
    """A rotary embedding that Hugging Face changes behind so many tokens, in a context that is longer."""
    original_len = model.original_len
    if model.rope.get("rope_type") != "longrope" or original_len is None or original_len >= model.config.context_len:
        return None
    return f"rope_type longrope, original_max_position_embeddings {original_len}"


def attention_factor(model: Model) -> str | None:
    """A factor of cosines and sines that is not the one that SGLang computes itself."""
    rope = model.rope
    given = rope.get("attention_factor")
    if given is None or not model.is_native or rope["rope_type"] not in ("longrope", "yarn"):
        return None
    of_parts = (rope.get("mscale"), rope.get("mscale_all_dim"))
    numerator, denominator = (yarn_get_mscale(rope["factor"], part) for part in (of_parts if all(of_parts) else (1, 0)))
    is_same = rope["rope_type"] == "yarn" and math.isclose(given, numerator / denominator, rel_tol=1e-4)
    return None if is_same else f"attention_factor {given}"


def hidden_partial_rotary(model: Model) -> str | None:
    """A part of heads that is turned, where only ``rope_parameters`` say so, as files of transformers 5 do."""
    part = model.rope.get("partial_rotary_factor", 1)
    is_seen = part == 1 or model.get("partial_rotary_factor") == part
    return None if is_seen else f"partial_rotary_factor {part} within rope_parameters"
