"""LoRA adapters of the embedded model, made from a seed; and what its network is with one of them merged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def make_adapter(folder: Path, network: Any, *, seed: int, rank: int = 4) -> Path:
    """An adapter of every linear layer, in PEFT's format, strong enough to change every answer."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in network.named_modules():
        if name.rpartition(".")[2] in _MODULES["self_attn"] + _MODULES["mlp"]:
            num_out, num_in = layer.weight.shape
            place = f"base_model.model.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, num_in, generator=draw) * 0.1
            tensors[f"{place}.lora_B.weight"] = torch.randn(num_out, rank, generator=draw) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name for names in _MODULES.values() for name in names],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(network: Any, folder: Path) -> None:
    """Add an adapter to the weights of a network, in place."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in network.named_modules():
        place = f"base_model.model.{name}"
        if f"{place}.lora_A.weight" in tensors:
            with torch.no_grad():
                layer.weight += scaling * tensors[f"{place}.lora_B.weight"] @ tensors[f"{place}.lora_A.weight"]
