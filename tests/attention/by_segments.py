"""Attention over a step the other way: segment by segment, and merged. The softmax over one set of positions, and which
query heads read which KV head, are those of `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchllm.attention.layout import AttentionLayout
from batchllm.attention.reference import _attend, _causal_mask, _positions_of, _tokens_of
from batchllm.attention.torch_shared import merge_states


@dataclass(frozen=True, slots=True, eq=False)
class PartialAttention:
    """Attention of some query tokens over some of the positions that they see.

    Attributes:
        tokens: int64[n] the query tokens, numbered as in the batch.
        out: float64[n, num_heads, head_dim].
        lse: float64[n, num_heads] log-sum-exp of the scaled scores; -inf where a token sees none of the positions.
    """

    tokens: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def attention_parts(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    logit_cap: float = 0.0,
    window: int = 0,
) -> list[PartialAttention]:
    """Attention over each segment for all its readers, in the layout's order, then over each private part.

    Args: As of `attention`.

    Returns:
        G + S parts: of each segment, tokens in the order of its readers, and of each sequence.
    """
    parts = []
    segments = zip(
        layout.segment_readers.tolist(), layout.segment_span.tolist(), layout.segment_table_row.tolist(), strict=True
    )
    for (first, last), (start, end), row in segments:
        readers = layout.order[first:last].tolist()
        tokens = torch.cat([_tokens_of(layout, s) for s in readers]).to(q.device)
        slots = table[row, start:end].long()
        # All of a segment was in the cache before the step: every query token of its readers comes later.
        own = torch.cat([_positions_of(layout, s) for s in readers])
        seen = _causal_mask(own, start, end, window).to(q.device)
        part = _attend(q[tokens], k_cache[slots], v_cache[slots], seen, scale, logit_cap)
        parts.append(PartialAttention(tokens, *part))
    for s, (row, kv_len) in enumerate(zip(layout.table_rows.tolist(), layout.kv_len.tolist(), strict=True)):
        tokens, start = _tokens_of(layout, s).to(q.device), int(layout.private_start[s])
        slots = table[row, start:kv_len].long()
        seen = _causal_mask(_positions_of(layout, s), start, kv_len, window).to(q.device)
        part = _attend(q[tokens], k_cache[slots], v_cache[slots], seen, scale, logit_cap)
        parts.append(PartialAttention(tokens, *part))
    return parts


def shared_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    logit_cap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention from `attention_parts`, merged by log-sum-exp.

    Args: As of `attention`.

    Returns:
        float64[num_query_tokens, num_heads, head_dim].
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    for part in attention_parts(q, k_cache, v_cache, table, layout, scale, logit_cap, window):
        outs = torch.stack([out[part.tokens], part.out])
        lses = torch.stack([lse[part.tokens], part.lse])
        out[part.tokens], lse[part.tokens] = merge_states(outs, lses)
    return out
