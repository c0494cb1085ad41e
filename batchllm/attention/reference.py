"""What attention over a step must be, twice: as if nothing were shared, and segment by segment.

The specification of every backend, in plain torch and float64; slow. The two ways have in common the softmax over
one set of positions, and which query heads read which KV head.

Knows: tensors of one layer, the request-to-token table, the layout. Must not know: tiles, devices, engines.
Invariant: both ways agree to rounding in float64, whatever the layout, as long as it passes `check_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchllm.attention.layout import AttentionLayout
from batchllm.attention.merge_state import merge_states


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


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    layout: AttentionLayout,
    scale: float,
    logit_cap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention, each sequence for itself; of the layout only lengths and table rows are read.

    Args:
        q: [num_query_tokens, num_heads, head_dim], any float dtype, as the caches.
        k_cache: [num_slots, num_kv_heads, head_dim]; query head ``h`` reads KV head
            ``h // (num_heads // num_kv_heads)``.
        v_cache: [num_slots, num_kv_heads, head_dim].
        table: int32[rows, positions] KV slots.
        layout: Of the step.
        scale: What query-key products are multiplied with.
        logit_cap: ``cap * tanh(score / cap)`` of each scaled score; 0: none.
        window: Tokens that a token sees, itself included; 0: all before it.

    Returns:
        float64[num_query_tokens, num_heads, head_dim].
    """
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for s, (row, kv_len) in enumerate(zip(layout.table_rows.tolist(), layout.kv_len.tolist(), strict=True)):
        first, last = layout.qo_indptr[s : s + 2].tolist()
        slots = table[row, :kv_len].long()
        seen = _causal_mask(_positions_of(layout, s), 0, kv_len, window).to(q.device)
        out[first:last], _ = _attend(q[first:last], k_cache[slots], v_cache[slots], seen, scale, logit_cap)
    return out


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


def _tokens_of(layout: AttentionLayout, sequence: int) -> torch.Tensor:
    return torch.arange(int(layout.qo_indptr[sequence]), int(layout.qo_indptr[sequence + 1]))


def _positions_of(layout: AttentionLayout, sequence: int) -> torch.Tensor:
    """Of the query tokens of a sequence, in it."""
    kv_len = int(layout.kv_len[sequence])
    return torch.arange(kv_len - len(_tokens_of(layout, sequence)), kv_len)


def _causal_mask(own: torch.Tensor, start: int, end: int, window: int) -> torch.Tensor:
    """bool[len(own), end - start]: which of the positions the tokens at ``own`` see."""
    distance = own[:, None] - torch.arange(start, end)[None, :]
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, logit_cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over one set of positions, in float64.

    Args:
        q: [n, num_heads, head_dim].
        k: [m, num_kv_heads, head_dim].
        v: [m, num_kv_heads, head_dim].
        seen: bool[n, m].
        scale: What query-key products are multiplied with.
        logit_cap: As of `attention`.

    Returns:
        Output [n, num_heads, head_dim] and log-sum-exp [n, num_heads].
    """
    group = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(group, dim=1)
    values = v.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,mhd->nhm", q.double(), keys) * scale
    if logit_cap:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores = scores.masked_fill(~seen[:, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("nhm,mhd->nhd", weights, values), lse
