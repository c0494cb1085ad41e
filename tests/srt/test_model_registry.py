"""SGLang's registry of models, read from the text of its modules."""

from __future__ import annotations

import sys

import pytest

from batchllm.srt.model_loader import model_registry


def test_architectures_are_those_that_sglang_finds_by_importing_everything() -> None:
    """Each in the same module. (A module that cannot be imported here has none in SGLang's.)"""
    from sglang.srt.models.registry import import_model_classes  # importing it imports all of them

    imported = {name: model.__module__ for name, model in import_model_classes("sglang.srt.models").items()}
    found = model_registry.find_architectures()
    assert imported.items() <= {name: module for name, module in found.items()}.items()
    assert {module for name, module in found.items() if name not in imported}.isdisjoint(sys.modules)


def test_a_model_is_imported_when_it_is_asked_for() -> None:
    models = model_registry.LazyModels(model_registry.find_architectures())
    assert "LlamaForCausalLM" in models
    assert models["LlamaForCausalLM"].__name__ == "LlamaForCausalLM"
    with pytest.raises(KeyError):
        models["NoSuchModel"]


def test_modules_that_the_user_has_switched_off_are_not_found() -> None:
    """As SGLANG_DISABLED_MODEL_ARCHS says."""
    assert "LlamaForCausalLM" not in model_registry.find_architectures("llama, qwen2")
