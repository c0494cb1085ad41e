"""SGLang's ``PrefillAdder``, told to trust the plan. Runs in the scheduler's process. (Upstream:
``srt/managers/schedule_policy.py``.)
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.tokens import page_floor


class PlannedPrefillAdder(PrefillAdder):
    """Adds planned requests without guessing at memory: `PlannedPolicy` has set theirs aside already.

    Attributes:
        takes_live: A live request has been added in this pass. Its memory is not in the decision for planned ones:
            those behind it take SGLang's own test.
    """

    takes_live = False

    def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        if not isinstance(req, PlannedReq):
            num_tokens = len(req.full_untruncated_fill_ids) - len(req.prefix_indices)
            if has_chunked_req and self.rem_chunk_tokens is not None and num_tokens > self.rem_chunk_tokens:
                return AddReqResult.OTHER  # one prompt at a time may be in pieces
            num_taken = len(self.can_run_list)
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            self.takes_live = self.takes_live or len(self.can_run_list) > num_taken
            return result
        cached_len = len(req.prefix_indices)
        num_tokens = len(req.full_untruncated_fill_ids) - cached_len
        # A prompt may be cut, but only one may be in pieces; without chunking the first is taken whatever its
        # length.
        is_cut = self.rem_chunk_tokens is not None and num_tokens > self.rem_chunk_tokens
        if is_cut:
            num_tokens = page_floor(self.rem_chunk_tokens, self.page_size)
            if num_tokens <= 0 or has_chunked_req or self.new_chunked_req is not None:
                return AddReqResult.OTHER
        elif self.rem_chunk_tokens is None and self.can_run_list and num_tokens > self.rem_input_tokens:
            return AddReqResult.OTHER
        if self.takes_live and self._takes_too_much(req, num_tokens):
            return AddReqResult.OTHER
        if is_cut:
            self.new_chunked_req = req
        req.set_extend_range(cached_len, cached_len + num_tokens)
        self._req_inc_lock_ref(req)
        self.tree_cache.start(req)
        self.can_run_list.append(req)
        self._update_prefill_budget(cached_len, num_tokens, 0, req.retracted_stain)
        is_full = self.rem_input_tokens <= 0 or (self.rem_chunk_tokens is not None and self.rem_chunk_tokens <= 0)
        return AddReqResult.OTHER if is_full else AddReqResult.CONTINUE

    def _takes_too_much(self, req: PlannedReq, num_tokens: int) -> bool:
        total = num_tokens + req.output.max_new_len - req.num_generated + self.page_size
        return bool(total >= self.rem_total_tokens)

    def add_chunked_req(self, req: Any) -> Any:
        """Go on with a prompt in pieces, in all that is left of the chunk; returns it unless this was the last."""
        assert self.rem_chunk_tokens is not None
        limit, req.piece_tokens = getattr(req, "piece_tokens", None), None
        limit = self.rem_chunk_tokens if limit is None else min(limit, self.rem_chunk_tokens)
        num_cached = len(req.prefix_indices)
        if limit < self.page_size:  # the step has no time for it
            req.set_extend_range(num_cached, num_cached)
            return req
        if not isinstance(req, PlannedReq):
            num_beside, self.rem_chunk_tokens = self.rem_chunk_tokens - limit, limit
            req = super().add_chunked_req(req)
            self.rem_chunk_tokens += num_beside
            return req
        num_tokens = len(req.full_untruncated_fill_ids) - num_cached
        is_cut = num_tokens > limit
        if is_cut:
            num_tokens = page_floor(limit, self.page_size)
        req.set_extend_range(num_cached, num_cached + num_tokens)
        self.can_run_list.append(req)
        self._update_prefill_budget(0, num_tokens, 0, req.retracted_stain)
        return req if is_cut else None
