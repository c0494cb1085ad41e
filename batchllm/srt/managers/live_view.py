"""The scheduler's live state as what a decision may see. Runs in the scheduler's process."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from batchllm.scheduler import SchedulerView
from batchllm.scheduler.running_kv import PromptInPieces, project
from batchllm.scheduler.token_batching import prefill_budget
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.tokens import page_ceil


def _chunk_tokens(scheduler: Any) -> int:
    """Tokens of a full step."""
    chunk: int = scheduler.max_prefill_tokens
    if scheduler.chunked_prefill_size is not None:
        return min(chunk, scheduler.chunked_prefill_size)
    if scheduler.planned_window:  # no prompt may be cut: the first is taken whatever its length
        return max(chunk, scheduler.planned_window[0].prefill_len)
    return chunk


def step_budget(scheduler: Any, running: list[Any]) -> int:
    """Prefill tokens that the coming step may carry, a prompt in pieces included."""
    return prefill_budget(
        chunk_tokens=_chunk_tokens(scheduler),
        num_decoding=len(running),
        kv_free_tokens=free_kv_tokens(scheduler),
        is_mixed=scheduler.is_mixed_chunk,
        page_size=scheduler.page_size,
    )


def free_kv_tokens(scheduler: Any) -> int:
    """Slots that are free, or hold KV that nobody planned and nobody runs on."""
    return int(scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size())


def make_view(scheduler: Any, running: list[Any], num_step_tokens: int) -> SchedulerView:
    """What `PlannedPolicy` decides on.

    Args:
        scheduler: A `BatchScheduler`.
        running: Requests that decode.
        num_step_tokens: Prompt tokens that the coming step may compute of planned requests that start in it.
    """
    chunked, page_size = scheduler.chunked_req, scheduler.page_size
    chunk_tokens, is_mixed = _chunk_tokens(scheduler), scheduler.is_mixed_chunk
    num_free_slots = scheduler.get_num_allocatable_reqs(len(running))
    aside = [] if scheduler.coserving is None else scheduler.coserving.aside.reqs
    admitted = [*scheduler.prefill.ending_reqs, *running, *aside]
    shared_tokens = scheduler.max_total_num_tokens - free_kv_tokens(scheduler)
    in_pieces = None
    if chunked is not None:
        admitted.append(chunked)
        num_free_slots -= 1
        # It will own what is left of its prompt, and the tree the prefixes that it leads.
        led = chunked.led_prefix_ids if isinstance(chunked, PlannedReq) else ()
        led_tokens = scheduler.tree_cache.ledger.end_len(led[-1]) - chunked.cache_protected_len if led else 0
        shared_tokens += led_tokens
        in_pieces = PromptInPieces(chunked.seqlen, led_tokens, chunk_tokens, is_mixed)
    stored = [req.kv.kv_allocated_len for req in admitted]
    shared = [req.cache_protected_len for req in admitted]
    shared_tokens -= sum(page_ceil(n, page_size) for n in stored) - sum(shared)
    return SchedulerView(
        waiting=scheduler.planned_window,
        ledger=scheduler.tree_cache.ledger,
        lengths=scheduler.output_lengths,
        running=project(
            scheduler.output_lengths,
            [req.output for req in admitted],
            prompt_len=[len(req.origin_input_ids) for req in admitted],
            num_generated=[len(req.output_ids) for req in admitted],
            stored_len=stored,
            shared_len=shared,
            longest_total_len=max((req.total_len for req in admitted if isinstance(req, PlannedReq)), default=0),
            page_size=page_size,
            release_lag=release_lag(scheduler),
            in_pieces=in_pieces,
            fixed_remaining=[_live_remaining(scheduler, req) for req in admitted],
        ),
        kv_limit_tokens=scheduler.kv_limit_tokens,
        kv_shared_tokens=shared_tokens,
        num_free_slots=num_free_slots,
        num_step_tokens=num_step_tokens,
        chunk_tokens=chunk_tokens,
        can_chunk=scheduler.chunked_prefill_size is not None and chunked is None,
        is_mixed=is_mixed,
        page_size=page_size,
        release_lag=release_lag(scheduler),
        lora_ids=frozenset(req.lora_id for req in admitted),
        max_lora_ids=scheduler.max_planned_lora_ids,
    )


def release_lag(scheduler: Any) -> int:
    """Steps for which KV of a request stays taken after its last one: with overlap, the next starts before it ends."""
    return int(scheduler.enable_overlap)


def _live_remaining(scheduler: Any, req: Any) -> int:
    """Decode steps left of a request outside any plan as SGLang reckons them, -1 for a planned one.

    Most name a limit far beyond what they will need. One that needs it takes it from what it decodes with, or from pins
    that nobody reads, so it is no reason to open nothing.
    """
    if isinstance(req, PlannedReq):
        return -1
    left = min(max(req.output.max_new_len - len(req.output_ids), 1), CLIP_MAX_NEW_TOKENS)
    return int(left * scheduler.new_token_ratio_tracker.current)
