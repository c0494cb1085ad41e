"""The two verbs of an attention over shared prefixes."""

from __future__ import annotations

from typing import Protocol

import torch

from batchllm.attention.layout import AttentionLayout


class StepAttention(Protocol):
    """Attention planned once a step and run once a layer."""

    def plan(self, layout: AttentionLayout, table: torch.Tensor) -> None:
        """Get ready for a step; what `run` computes until the next call.

        Args:
            layout: Of the step.
            table: int32[rows, positions] KV slots; rows contiguous. Must not change until the last `run` of the step.
        """

    def run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        logit_cap: float = 0.0,
        window: int = 0,
    ) -> None:
        """Attention of one layer; KV of the step's own tokens must be in the caches already.

        Args:
            query: [at least num_query_tokens, num_heads, head_dim]; tokens may have any stride.
            key_cache: [num_slots, num_kv_heads, head_dim]; tokens may have any stride.
            value_cache: As ``key_cache``.
            output: As ``query``; rows beyond the layout's query tokens are left as they are.
            scale: What query-key products are multiplied with.
            logit_cap: ``cap * tanh(score / cap)`` of each scaled score; 0: none.
            window: Tokens that a token sees, itself included; 0: all before it.
        """
