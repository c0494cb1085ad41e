"""Attention over a whole from attention over its parts.

Knows: outputs and log-sum-exps. Must not know: segments, sequences, KV.
Invariant: however positions are cut into parts, the merged output is that over all of them, up to rounding.
Source: FlashInfer, https://docs.flashinfer.ai/tutorials/recursive_attention.html.
"""

from __future__ import annotations

import torch


def merge_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of positions.

    Args:
        outs: [num_parts, ..., head_dim] output over each set. Read only where the part weighs something: an empty
            part's may be anything.
        lses: [num_parts, ...] natural logarithm of the sum of the exponentials of each set's scaled scores; -inf
            where the set is empty.

    Returns:
        Output [..., head_dim] and log-sum-exp [...] over the union, in the parts' dtypes; zeros and -inf where all
        parts are empty.
    """
    lse = torch.logsumexp(lses, dim=0)
    # -inf less -inf is NaN: nothing is the reference point where every part is empty.
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0)).unsqueeze(-1)
    out = torch.where(weights > 0, outs * weights, 0.0).sum(dim=0)
    return out.to(outs.dtype), lse
