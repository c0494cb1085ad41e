"""How many tokens should the coming step carry?

(BatchLLM, arXiv 2412.03594, section 4.3.3: a token batch is limited by KV memory and by the chunk, never by a count
of requests.)
"""

from __future__ import annotations

import math

_MIN_PREFILL_SHARE = 8
"""Decoding rows may fill a chunk, but this part of one is always left to prefill."""


def decode_lag(num_prefill_tokens: int, chunk_tokens: int, *, is_mixed: bool) -> int:
    """Most decode steps that others may do while so many prompt tokens are computed, the coming step included.

    None where prefill makes decoding rows wait.
    """
    if not is_mixed:
        return 0
    return -(-num_prefill_tokens // max(chunk_tokens // _MIN_PREFILL_SHARE, 1))


def prefill_budget(
    *,
    chunk_tokens: int,
    num_decoding: int,
    kv_free_tokens: int,
    is_mixed: bool,
    page_size: int,
) -> int:
    """Prefill tokens that a step may carry beside its decoding rows.

    Args:
        chunk_tokens: Tokens of a full step.
        num_decoding: Rows that decode in the same step where it is mixed, a token each.
        kv_free_tokens: Slots that can be allocated in this step.
        is_mixed: Whether decoding rows are part of the step; they must find their slots first.
        page_size: A decoding row takes a page when its last one is full; prefill is cut at a page.

    Returns:
        0 or at least a page, never more than the slots there are: where decoding rows fill the chunk, prefill goes
        on in part of one; where they need the last slots, there is none, and the scheduler makes room first.
    """
    budget = chunk_tokens
    if is_mixed:
        budget = max(chunk_tokens - num_decoding, chunk_tokens // _MIN_PREFILL_SHARE, page_size)
        # Where nothing decodes, a prompt may need every slot: the last page of what it shares, a second time, too.
        kv_free_tokens -= num_decoding * page_size + page_size - 1 if num_decoding else 0
    budget = min(budget, kv_free_tokens)
    return budget if budget >= page_size else 0


def is_worth_a_pass(num_admitted: int, num_running: int, mean_remaining_len: float) -> bool:
    """Are there enough to start to make the running ones wait a step for them?

    Where prefill and decode take turns, each prefill pass costs about what a decode step costs beside its tokens, and
    each request that could run but waits leaves a row of the decode steps empty. With f finishes a step and n running,
    starting them k at a time costs ``f / k`` passes a step and ``k / 2`` empty rows of n; the sum is least at
    ``k = sqrt(2 * n * f)``, and f is n over the mean length.
    """
    return num_admitted >= num_running * math.sqrt(2.0 / max(mean_remaining_len, 2.0))
