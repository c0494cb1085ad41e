"""The shape of a decoder-only transformer, and the counts that follow from it.

Knows: sizes of a dense model with grouped-query attention and a gated MLP. Must not know: devices, time, weights.
Invariant: a count leaves out biases (below 0.1 % of any model here), and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from batchllm.errors import ConfigError
from batchllm.perf_model.fields import check_positive, lookup

_BYTES_16_BIT = 2.0

# One scale of 16 bits and one zero point of 4 for every 128 weights of 4 bits.
_BYTES_GPTQ4 = (4 + (16 + 4) / 128) / 8

# Fields of a configuration that say that the model is not of this family.
_OTHER_FAMILIES = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention",
    "state_size": "a state space model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        name: Name of the model.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads of a layer.
        num_kv_heads: Key and value heads of a layer; divides ``num_heads``.
        head_dim: Width of a head.
        intermediate_size: Width inside a gated MLP, which has three matrices.
        vocab_size: Rows of the embedding and of the output layer.
        is_tied: The output layer is the embedding, so it is stored once.
        weight_bytes_per_param: Bytes of a weight of a transformer layer, as stored.
        head_bytes_per_param: Bytes of a weight of the embedding and the output layer, which quantized models keep in 16
            bits.
        kv_bytes_per_value: Bytes of one number of a key or value.

    Raises:
        ConfigError: A size is not above 0, or the key heads do not divide the query heads.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    weight_bytes_per_param: float = _BYTES_16_BIT
    head_bytes_per_param: float = _BYTES_16_BIT
    kv_bytes_per_value: float = _BYTES_16_BIT

    def __post_init__(self) -> None:
        owner = f"model {self.name!r}"
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        del sizes["name"], sizes["is_tied"]
        check_positive(owner, **sizes)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{owner}: num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")

    @property
    def num_linear_params(self) -> int:
        """Weights of all matrices of the transformer layers; each is used once for every token."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_lm_head_params(self) -> int:
        """Weights of the output layer; used once for every sampled row."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """Weights of the whole model: layers, norms, embedding and, if it is not the embedding, the output layer."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.num_linear_params + norms + self._num_head_copies * self.num_lm_head_params

    @property
    def linear_weight_bytes(self) -> float:
        """Bytes of the matrices of the transformer layers, which every step reads."""
        return self.num_linear_params * self.weight_bytes_per_param

    @property
    def lm_head_weight_bytes(self) -> float:
        """Bytes of the output layer, which every step that samples reads."""
        return self.num_lm_head_params * self.head_bytes_per_param

    @property
    def weight_bytes(self) -> float:
        """Memory that the whole model takes. Norms are stored in 16 bits."""
        norms = (2 * self.num_layers + 1) * self.hidden_size * _BYTES_16_BIT
        return self.linear_weight_bytes + norms + self._num_head_copies * self.lm_head_weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes_per_value

    @property
    def linear_flops_per_token(self) -> int:
        """FLOP of the matrices of the transformer layers for one token; without embedding and output layer."""
        return 2 * self.num_linear_params

    @property
    def lm_head_flops_per_row(self) -> int:
        """FLOP of the output layer for one sampled row."""
        return 2 * self.num_lm_head_params

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOP of attention in all layers for one token and one token it attends to: scores, and their weighted sum."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    @property
    def _num_head_copies(self) -> int:
        return 1 if self.is_tied else 2

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any],
        name: str,
        *,
        weight_bytes_per_param: float | None = None,
        kv_bytes_per_value: float = _BYTES_16_BIT,
    ) -> ModelShape:
        """The shape that a Hugging Face ``config.json`` states.

        Where absent or null, ``head_dim`` is the hidden size over the heads, ``num_key_value_heads`` the heads, and
        ``tie_word_embeddings`` false.

        Args:
            config: The parsed file.
            name: Name of the model.
            weight_bytes_per_param: Bytes of a weight of a layer; None takes them from ``quantization_config``, and 2
                where there is none.
            kv_bytes_per_value: Bytes of one number of a key or value.

        Raises:
            ConfigError: A field is missing or not a number, the heads do not divide, the model is of another family
                (mixture of experts, latent attention, state space), or its quantization does not state its bits.
        """
        where = f"config of model {name!r}"
        for field, family in _OTHER_FAMILIES.items():
            if config.get(field):
                raise ConfigError(f"{where}: it is {family} ({field} {config[field]!r}); its cost is not modelled")
        hidden_size, num_heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(
                f"{where}: field 'head_dim' is missing, and num_attention_heads {num_heads} does not divide "
                f"hidden_size {hidden_size}"
            )
        if weight_bytes_per_param is None:
            weight_bytes_per_param = _stored_bytes(config, where)
        return cls(
            name=name,
            num_layers=_size(config, "num_hidden_layers", where),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=_size(config, "num_key_value_heads", where, default=num_heads),
            head_dim=_size(config, "head_dim", where, default=hidden_size // num_heads),
            intermediate_size=_size(config, "intermediate_size", where),
            vocab_size=_size(config, "vocab_size", where),
            is_tied=bool(config.get("tie_word_embeddings")),
            weight_bytes_per_param=weight_bytes_per_param,
            kv_bytes_per_value=kv_bytes_per_value,
        )


def _size(config: Mapping[str, Any], field: str, where: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{where}: field {field!r} is missing")
    if type(value) is not int or value < 1:  # to Python, true is a number
        raise ConfigError(f"{where}: {field} must be a whole number of at least 1, not {value!r}")
    return value


def _stored_bytes(config: Mapping[str, Any], where: str) -> float:
    quantization = config.get("quantization_config")
    if not quantization:
        return _BYTES_16_BIT
    if quantization.get("quant_method") == "fp8":
        return 1.0
    bits = quantization.get("bits")
    if type(bits) not in (int, float):
        raise ConfigError(f"{where}: quantization_config states no number of 'bits'; give weight_bytes_per_param")
    return float(bits) / 8


MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape(
                name="Llama-3.1-8B",
                num_layers=32,
                hidden_size=4096,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=14336,
                vocab_size=128256,
                is_tied=False,
            ),
            ModelShape(
                name="Llama-3.1-70B",
                num_layers=80,
                hidden_size=8192,
                num_heads=64,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=28672,
                vocab_size=128256,
                is_tied=False,
                weight_bytes_per_param=_BYTES_GPTQ4,
            ),
            ModelShape(
                name="Qwen2.5-7B",
                num_layers=28,
                hidden_size=3584,
                num_heads=28,
                num_kv_heads=4,
                head_dim=128,
                intermediate_size=18944,
                vocab_size=152064,
                is_tied=False,
            ),
            ModelShape(
                name="Qwen2.5-14B",
                num_layers=48,
                hidden_size=5120,
                num_heads=40,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=13824,
                vocab_size=152064,
                is_tied=False,
            ),
        )
    }
)
"""The models of the BatchLLM paper (arXiv 2412.03594) by name, from their published ``config.json``.

All in 16 bits but ``Llama-3.1-70B``: its 141 GB in 16 bits do not fit one card, and the paper ran it on one A100 in
4-bit GPTQ. It stands here as that, in groups of 128, with embedding and output layer in 16 bits: 40 GB. For 16 bits
on several cards, ``dataclasses.replace(MODELS["Llama-3.1-70B"], weight_bytes_per_param=2.0)``.
"""


def find_model(name_or_path: str) -> ModelShape:
    """A known model by name, or the one whose ``config.json``, or folder with one, is at this path.

    Raises:
        ConfigError: The name is not known, or the file cannot be read or describes no model that is understood.
    """
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        return get_model(name_or_path)
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the model's config cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a model's config is a JSON object, and this is none")
    return ModelShape.from_hf_config(config, path.parent.name)


def get_model(name: str) -> ModelShape:
    """The known model of that name.

    Raises:
        ConfigError: There is none; names the nearest and lists all.
    """
    return lookup("model", name, MODELS)
