"""What attention over a step must be: the specification of every backend, in plain torch and float64; slow.

Knows: tensors of one layer, the request-to-token table, lengths. Must not know: segments, tiles, devices, engines.
Invariant: the result is that of each sequence by itself. (`tests/attention` computes it segment by segment too.)
"""

from __future__ import annotations

import torch

from batchllm.attention.layout import AttentionLayout


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
        v_cache: [num_slots, num_kv_heads, value_dim].
        table: int32[rows, positions] KV slots.
        layout: The step.
        scale: What query-key products are multiplied with.
        logit_cap: ``cap * tanh(score / cap)`` of each scaled score; 0: none.
        window: Tokens that a token sees, itself included; 0: all before it.

    Returns:
        float64[num_query_tokens, num_heads, value_dim].
    """
    out = torch.empty(*q.shape[:2], v_cache.shape[2], dtype=torch.float64, device=q.device)
    for s, (row, kv_len) in enumerate(zip(layout.table_rows.tolist(), layout.kv_len.tolist(), strict=True)):
        first, last = layout.qo_indptr[s : s + 2].tolist()
        slots = table[row, :kv_len].long()
        seen = _causal_mask(_positions_of(layout, s), 0, kv_len, window).to(q.device)
        out[first:last], _ = _attend(q[first:last], k_cache[slots], v_cache[slots], seen, scale, logit_cap)
    return out


def _tokens_of(layout: AttentionLayout, sequence: int) -> torch.Tensor:
    return torch.arange(int(layout.qo_indptr[sequence]), int(layout.qo_indptr[sequence + 1]))


def _positions_of(layout: AttentionLayout, sequence: int) -> torch.Tensor:
    """Positions of a sequence's query tokens in the sequence."""
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
        logit_cap: See `attention`.

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
