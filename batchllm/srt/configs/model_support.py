"""Models that SGLang 0.5.17 would answer wrongly, or die on, are refused before any process is started. Runs in the
engine's or the server's process.

Knows: a model's configuration, as SGLang has read it, and the device. Must not know: its files
(`batchllm.srt.model_loader.model_files`), its weights (`batchllm.srt.model_loader.filled_parameters`).
Invariant: what is refused is in the table of `batchllm.srt.configs.model_faults`.
"""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.configs.model_config import ModelImpl

from batchllm.errors import ConfigError
from batchllm.srt.compat import SGLANG_VERSION
from batchllm.srt.configs import model_traits as traits
from batchllm.srt.configs import rotary_traits
from batchllm.srt.configs.model_faults import FAULTS
from batchllm.srt.configs.model_traits import Model
from batchllm.srt.model_loader import model_files
from batchllm.srt.model_loader.model_registry import find_architectures


def check(config: Any, *, model_path: str, is_on_cpu: bool, has_our_operators: bool) -> None:
    """Refuse a model that the table names.

    Args:
        config: SGLang's ``ModelConfig`` of it.
        model_path: The path as the user gave it.
        is_on_cpu: It is to run on a CPU.
        has_our_operators: By our attention and operators, not SGLang's own.

    Raises:
        ConfigError: One line with the model, the value at fault, why, and what to do.
    """
    architectures = config.hf_config.architectures
    model = Model(config, architectures[0], _is_native(config), is_on_cpu, has_our_operators)
    for fault in FAULTS:
        value = fault.applies(model)
        if value is not None:
            values = {
                "window": model.window_len,
                "max_len": model.get("max_position_embeddings"),
                "original_len": model.original_len,
            }
            remedy = fault.remedy.format(**values, ours=traits.drop_backend(model))
            raise ConfigError(f"-m {model_path}: {model.architecture} with {value}: {fault.reason}; {remedy}")


def first_context_len(config: Any) -> int | None:
    """Tokens of the context that a model with LongRoPE was first trained with, where the engine's is longer; else None.

    In that context, which is the default, heads are turned as Hugging Face does; in a longer one only those of prompts
    that are longer too (`batchllm.srt.layers.long_rope`).

    Args:
        config: SGLang's ``ModelConfig`` of it.
    """
    model = Model(config, "", is_native=True, is_on_cpu=True, has_our_operators=True)
    return model.original_len if rotary_traits.long_rope(model) else None


def no_config(model_path: str) -> str:
    """Why SGLang could not read the configuration in a folder, as far as its architecture says.

    Args:
        model_path: The folder.
    """
    architecture = model_files.architecture(model_path)
    if architecture in find_architectures():
        return f"SGLang cannot read the config.json of this {architecture}"
    return f"{architecture}: sglang {SGLANG_VERSION} has no such model, and transformers cannot read its config.json"


def _is_native(config: Any) -> bool:
    if config.model_impl == ModelImpl.TRANSFORMERS:
        return False
    if os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE"):  # whatever is in there
        return True
    return not find_architectures().keys().isdisjoint(config.hf_config.architectures)
