"""The two verbs of an attention over shared prefixes, and what is fixed for all of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from batchllm.attention.layout import AttentionLayout


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What layers have in common that the same `StepAttention` computes.

    Attributes:
        num_heads: Query heads; a multiple of ``num_kv_heads``.
        num_kv_heads: KV heads.
        head_dim: Elements of a head of queries and keys.
        dtype: Type of queries, caches and output.
        scale: Factor of query-key products.
        logit_cap: Each scaled score becomes ``cap * tanh(score / cap)``; 0: it stays.
        window: Tokens that a token sees, itself included; 0: all before it.
        value_dim: Elements of a head of values and output, where they are not ``head_dim``; 0: they are.

    Raises:
        ValueError: Query heads are no multiple of KV heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    logit_cap: float = 0.0
    window: int = 0
    value_dim: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} KV heads")

    @property
    def output_dim(self) -> int:
        """Elements of a head of values and output."""
        return self.value_dim or self.head_dim


class StepAttention(Protocol):
    """Attention planned once a step and run once a layer."""

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Fix what `run` computes until the next call.

        Args:
            layout: The step.
            table: int32[rows, positions] KV slots; rows contiguous. Must not change until the last `run` of the step.
        """

    def run(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Compute one layer of the step; KV of the step's own tokens must be in the caches already.

        Args:
            query: [at least num_query_tokens, num_heads, head_dim]; tokens may have any stride.
            key_cache: [num_slots, num_kv_heads, head_dim]; tokens may have any stride.
            value_cache: As ``key_cache``, of ``output_dim`` elements.
            output: As ``query``, of ``output_dim`` elements; rows beyond the layout's query tokens stay as they are.

        Raises:
            ValueError: A tensor is not what was planned for.
        """
