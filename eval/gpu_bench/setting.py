"""What is measured on: model, pool, workloads; on a GPU, and small enough for a CPU to see that it all runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchllm import default_model
from batchllm.perf_model import DeviceSpec, ModelShape, get_device, get_model

# The published config.json of both, but for lengths and names of tokens.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_1B = ModelShape(
    name="Llama-3.2-1B",
    num_layers=16,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128_256,
    is_tied=True,
)
_MODELS = {"8b": get_model("Llama-3.1-8B"), "1b": _1B}

# The shape of 1B, with weights by which one changed prompt token changes the answer: dummy weights say nothing.
_CHECKED_1B = default_model.RandomModelShape(
    name="1b",
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Sizes of one kind of run.

    Attributes:
        is_dry: On a CPU, small.
        shape: Of the model whose speed is measured.
        server_args: Of every engine that is measured, ours and stock's.
        checked_shape: Of the model whose answers are compared.
        checked_args: Of the engines whose answers are compared.
        checked: The workload whose answers are compared, over `eval.workloads`.
        stock_backends: Attention backends of stock.
        stock_runs: Schedule policy, whether prompts are sorted, whether chunks are mixed; backends are compared by the
            first.
        ours: Names of ours, and the server arguments that each adds.
        workloads: By part, a line of `batchllm.sim.parse_workload`.
        policy_specs: By part, a smaller one to choose stock's policy by, on ``policy_pool`` tokens of KV.
        policy_pool: See there.
        profiled_steps: First step that is profiled, and how many.
    """

    is_dry: bool
    shape: ModelShape
    server_args: dict[str, Any]
    checked_shape: default_model.RandomModelShape
    checked_args: dict[str, Any]
    checked: str
    stock_backends: tuple[str, ...]
    stock_runs: tuple[tuple[str, bool, bool], ...]
    ours: dict[str, dict[str, Any]]
    workloads: dict[str, str]
    policy_specs: dict[str, str]
    policy_pool: int
    profiled_steps: tuple[int, int]

    def model_path(self, folder: Path) -> str:
        """A folder with nothing but the configuration: weights are made up on the card."""
        if self.is_dry:
            return default_model.cached_model_path(self.checked_shape)
        path = folder / "models" / self.shape.name
        path.mkdir(parents=True, exist_ok=True)
        config = _LLAMA | {
            "hidden_size": self.shape.hidden_size,
            "intermediate_size": self.shape.intermediate_size,
            "num_hidden_layers": self.shape.num_layers,
            "num_attention_heads": self.shape.num_heads,
            "num_key_value_heads": self.shape.num_kv_heads,
            "head_dim": self.shape.head_dim,
            "vocab_size": self.shape.vocab_size,
            "tie_word_embeddings": self.shape.is_tied,
        }
        (path / "config.json").write_text(json.dumps(config, indent=1))
        return str(path)

    def checked_model_path(self) -> str:
        """Built on first use: minutes and gigabytes for a large shape."""
        return default_model.cached_model_path(self.checked_shape)


BOUNDS = {"short": 1.5, "long": 3.0, "snippet": 1.2, "unshared": 0.98}
"""By workload, how many times faster than the best of stock ours is to be."""

_COMMON: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "grammar_backend": "none",
    "sampling_backend": "pytorch",
    "random_seed": 0,
    "log_level": "warning",
}


def gpu(model: str, pool: int) -> Setting:
    """On a card of 80 GB or more.

    Args:
        model: ``8b``, or ``1b`` for quick runs.
        pool: KV tokens of each engine. A whole 80 GB card holds about 370,000 of 8B; with more, as many requests as
            fit into some minutes would share a cache that never has to forget.
    """
    args = _COMMON | {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "context_length": 17_408,
        "max_total_tokens": pool,
        "mem_fraction_static": 0.9,
        "chunked_prefill_size": 8192,
        "disable_custom_all_reduce": True,
    }
    specs = {
        "short": "shared:prefix=2000,private=200,sharing=16,requests={},output=100",
        "long": "shared:prefix=16000,private=200,sharing=16,requests={},output=100",
        "snippet": "snippet:delay=300,requests={},output=100",
        "unshared": "unshared:prompt=1000,requests={},output=100",
    }
    # Of small ones twelve runs, and four starts of engines, are to end within nine minutes.
    full, small = (3200, 640, 1600, 1200), (400, 80, 200, 160)
    return Setting(
        is_dry=False,
        shape=_MODELS[model],
        server_args=args,
        checked_shape=_CHECKED_1B,
        checked_args=_COMMON | {"max_total_tokens": 6000, "chunked_prefill_size": 512},
        checked="two_level(0)",
        stock_backends=("triton", "flashinfer", "fa3"),
        # fcfs in the given order loses wherever it ran.
        stock_runs=tuple(
            (policy, is_sorted, is_mixed)
            for is_mixed in (False, True)
            for policy, is_sorted in (
                ("dfs-weight", False),
                ("lof", False),
                ("lpm", False),
                ("fcfs", True),
                ("lpm", True),
            )
        ),
        ours={"ours": {"attention_backend": "batchllm"}, "ours, SGLang's attention": {}},
        workloads={name: spec.format(n) for (name, spec), n in zip(specs.items(), full, strict=True)},
        policy_specs={name: spec.format(n) for (name, spec), n in zip(specs.items(), small, strict=True)},
        policy_pool=pool // 4,
        profiled_steps=(150, 60),
    )


def dry() -> Setting:
    """The embedded model on a CPU: two layers of it, and as few requests as make every part run."""
    shape = default_model.RandomModelShape(name="two-layers", num_hidden_layers=2)
    args = _COMMON | {"dtype": "float32", "max_total_tokens": 4000, "chunked_prefill_size": 512, "device": "cpu"}
    specs = {
        "short": "shared:prefix=200,private=20,sharing=8,requests={},output=10",
        "long": "shared:prefix=900,private=20,sharing=8,requests={},output=10",
        "snippet": "snippet:delay=4,requests={},output=10",
        "unshared": "unshared:prompt=100,requests={},output=10",
    }
    return Setting(
        is_dry=True,
        shape=ModelShape(
            name="two layers",
            num_layers=shape.num_hidden_layers,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_attention_heads,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            is_tied=False,
            weight_bytes_per_param=4.0,
            head_bytes_per_param=4.0,
            kv_bytes_per_value=4.0,
        ),
        server_args=args,
        checked_shape=shape,
        checked_args=_COMMON | {"max_total_tokens": 2000, "chunked_prefill_size": 128, "device": "cpu"},
        checked="two_level(0, 2, 3, 4)",
        stock_backends=("torch_native",),
        stock_runs=(("lpm", False, False), ("fcfs", True, False)),
        ours={"ours": {}},
        workloads={name: spec.format(32) for name, spec in specs.items()},
        policy_specs={name: spec.format(16) for name, spec in specs.items()},
        policy_pool=3000,
        profiled_steps=(10, 8),
    )


def device_spec(card: dict[str, Any], *, is_measured: bool) -> DeviceSpec:
    """The card as `batchllm.perf_model` knows it: by its data sheet, or by what it reached in this run."""
    known = next((name for name in ("H200", "H100", "A100") if name in card["name"]), None)
    if known is not None and not is_measured:
        return get_device("A100-80GB" if known == "A100" else known)
    return DeviceSpec(
        name=card["name"],
        dense_flops=card["matmul_flops"],
        memory_bandwidth=card["copy_bytes_per_s"],
        memory_bytes=card["memory_bytes"],
    )
