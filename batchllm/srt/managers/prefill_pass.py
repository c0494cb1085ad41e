"""Which prompts the coming step computes. Runs in the scheduler's process. (Upstream: ``srt/managers/scheduler.py``,
``schedule_policy.py``.)

`PlannedPolicy` names the planned requests to start, `LiveQueue` the live ones, `Turns` says who goes first where both
wait, and `Coserving` how much of each where a bound was asked for. SGLang's own prefill pass is shown these, and what
it took is settled with the cache afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder
from sglang.srt.managers.scheduler import NextBatchPlan
from sglang.srt.mem_cache.common import release_kv_cache

from batchllm.scheduler import Decision, PlannedPolicy
from batchllm.scheduler.decision import SettledDecision
from batchllm.scheduler.turns import Turns
from batchllm.srt.managers.coserving import PrefillShare
from batchllm.srt.managers.live_view import make_view, step_budget
from batchllm.srt.managers.schedule_batch import DecodingReqs, PlannedReq
from batchllm.tokens import page_floor


class PrefillPass:
    """Composes the prefill of each step.

    Args:
        scheduler: A `BatchScheduler`.
        run_stock: SGLang's own pass, from the running batch to its plan.
        settled: Forgets the last decision where something changes.

    Attributes:
        ending_reqs: Requests that were dropped, and are not known to have ended yet.
    """

    def __init__(self, scheduler: Any, run_stock: Callable[[Any], NextBatchPlan], settled: SettledDecision) -> None:
        self._scheduler = scheduler
        self._run_stock = run_stock
        self._settled = settled
        self._policy = PlannedPolicy()
        self._turns = Turns()
        self.ending_reqs: list[Any] = []

    def give_planned(self, share: float) -> None:
        """Let planned requests have this part of what they and live ones compete for, at least."""
        self._turns.give_planned(share)
        if self._scheduler.coserving is not None:
            self._scheduler.coserving.give_planned(share)

    def run(self, running_batch: Any) -> NextBatchPlan:
        """The prompts that the coming step computes, and the rows that decode in it or after it."""
        coserving = self._scheduler.coserving
        if coserving is not None:
            running_batch = coserving.start_step(running_batch)
        self._drop_ended(running_batch)
        plan = self._compose(running_batch)
        if coserving is not None and plan.batch_to_run is None and plan.running_batch.is_empty():
            # Rows that were to make room for a prompt which did not fit.
            return _nothing(coserving.aside.bring_back(plan.running_batch))
        return plan

    def _compose(self, running_batch: Any) -> NextBatchPlan:
        window = self._scheduler.planned_window
        if self._waits_for_room(running_batch) and not self._make_room(running_batch):
            if window:
                self._turns.wait()
            if self._scheduler.coserving is not None:
                self._scheduler.coserving.compose(running_batch, may_prefill=False)  # for its rows
            return _nothing(running_batch)
        share = self._share(running_batch)
        if share.num_tokens == 0:
            return _nothing(running_batch)
        live = share.live
        if not live or not window:
            self._turns.reset()
        is_planned_turn = self._turns.is_planned
        decision = share.decision
        if decision is None:
            decision = self.decide(running_batch, share.num_planned_tokens, live)
        if is_planned_turn and decision.lacks_room:
            self._turns.wait()
            live = []  # what becomes free is for the plan
        planned = [admission.request for admission in decision.admissions]
        if not planned and not live and self._scheduler.chunked_req is None:
            return _nothing(running_batch)
        # SGLang stops at the first that does not fit.
        is_stuck = not running_batch.reqs and running_batch.batch_is_full
        queue = planned + live if is_planned_turn or is_stuck else live + planned
        if planned:
            running_batch.batch_is_full = False
        plan, refused = self._show(queue, share.num_tokens, running_batch)
        self._settle(decision, plan.batch_to_run, live)
        self._count_pending(plan.batch_to_run, refused)
        if refused and plan.batch_to_run is None and plan.running_batch.batch_is_full:
            self._give_up_pins(refused[0], plan.running_batch)
        return plan

    # What the step may carry

    def _waits_for_room(self, running_batch: Any) -> bool:
        """Whether live requests wait for KV, with nothing else to do in this step: what becomes free is for them."""
        scheduler = self._scheduler
        waits = scheduler.live_queue is not None and scheduler.waiting_queue and running_batch.reqs
        is_full = running_batch.batch_is_full and not self._turns.is_planned
        return bool(waits and is_full and scheduler.chunked_req is None)

    def _make_room(self, running_batch: Any) -> bool:
        """Take KV from planned rows for the live request that waits first; whether any was taken."""
        coserving = self._scheduler.coserving
        if coserving is None or not coserving.make_room(self._scheduler.waiting_queue[0], running_batch):
            return False
        running_batch.batch_is_full = False
        self._settled.invalidate()
        return True

    def _share(self, running_batch: Any) -> PrefillShare:
        """What the coming step may compute of prompts."""
        scheduler = self._scheduler
        if scheduler.coserving is not None:
            return scheduler.coserving.compose(running_batch)
        budget = step_budget(scheduler, running_batch.reqs)
        if budget == 0:  # what decodes needs the last slots: a prompt in pieces waits, and SGLang makes room
            return PrefillShare()
        return PrefillShare(self.live_to_start(len(running_batch.reqs), budget), budget, budget)

    def live_to_start(self, num_running: int, budget: int) -> list[Any]:
        """Live requests that may start in the coming step, in order."""
        scheduler = self._scheduler
        if scheduler.live_queue is None or not scheduler.waiting_queue:
            return list(scheduler.waiting_queue)
        return list(
            scheduler.live_queue.choose(
                max_requests=scheduler.get_num_allocatable_reqs(num_running),
                max_tokens=budget,
                chunked_req=scheduler.chunked_req,
            )
        )

    def decide(self, running_batch: Any, budget: int, live: list[Any]) -> Decision:
        """Planned requests to start in the coming step.

        Args:
            running_batch: The rows that decode; those that are aside are counted too.
            budget: Prompt tokens that the step may compute of planned requests, one in pieces included.
            live: Live requests that start in it.
        """
        scheduler = self._scheduler
        num_running = len(running_batch.reqs)
        live_lacks_room = live and num_running and running_batch.batch_is_full
        if not scheduler.planned_window or not budget or (live_lacks_room and not self._turns.is_planned):
            return Decision()
        settled = self._settled.get(num_running)
        if settled is not None:
            return settled
        view = make_view(scheduler, running_batch.reqs, budget - self._chunk_tokens(budget))
        decision = self._policy.decide(view)
        self._settled.invalidate()
        if decision.lacks_room:  # what lacks only the budget of this step may have that of the next
            self._settled.keep(decision, num_running)
        return decision

    def _chunk_tokens(self, budget: int) -> int:
        """What a prompt in pieces takes of the budget of planned requests."""
        req = self._scheduler.chunked_req
        if req is None:
            return 0
        num_left = int(req.seqlen - len(req.prefix_indices))
        if self._scheduler.coserving is None:
            return num_left
        return min(num_left, budget) if isinstance(req, PlannedReq) else 0

    # Before the pass

    def _drop_ended(self, running_batch: Any) -> None:
        """Drop what runs no further step: what has ended, and what ends with the step in flight, at its limit.

        SGLang drops the former later, when a decision has counted their memory, and runs the latter once more for
        nothing.
        """
        scheduler = self._scheduler
        if self.ending_reqs:  # they have ended by now: what was true beside them no longer is
            running_batch.batch_is_full = False
            self._settled.invalidate()
        reqs = running_batch.reqs
        left = [i for i, req in enumerate(reqs) if not req.finished()]
        going_on = [i for i in left if not _is_at_its_limit(reqs[i])] if scheduler.enable_overlap else left
        if scheduler.token_to_kv_pool_allocator.available_size() < len(going_on) * scheduler.page_size:
            going_on = left  # SGLang will take slots from somebody: it must find the last one that could give any
        self.ending_reqs = [reqs[i] for i in sorted(set(left).difference(going_on))]
        if len(going_on) < len(reqs):
            running_batch.filter_batch(keep_indices=going_on)
            running_batch.batch_is_full = False
            self._settled.invalidate()

    def put_back_chunk(self) -> None:
        """Let a planned prompt in pieces wait again: the prefixes that it has computed so far stay in the tree."""
        scheduler = self._scheduler
        req = scheduler.chunked_req
        req.num_lost_for_live += scheduler.tree_cache.keep_computed(req)
        release_kv_cache(req, scheduler.tree_cache, is_insert=False)
        req.reset_for_retract()
        scheduler.chunked_req = None
        scheduler.planned_window.add(req)
        self._settled.invalidate()

    # The pass

    def _show(self, queue: list[Any], budget: int, running_batch: Any) -> tuple[NextBatchPlan, list[Any]]:
        """Have SGLang take what it can of ``queue``. Returns its plan, and the live requests that it left."""
        scheduler = self._scheduler
        waiting, chunk, in_pieces = scheduler.waiting_queue, scheduler.chunked_prefill_size, scheduler.chunked_req
        scheduler.waiting_queue = list(queue)
        if chunk is not None:  # read again in each pass; SGLang takes the decoding rows of a mixed step off it
            num_decoding = len(running_batch.reqs) if scheduler.is_mixed_chunk else 0
            scheduler.chunked_prefill_size = budget + num_decoding
        plan = self._run_stock(running_batch)
        scheduler.chunked_prefill_size = chunk
        batch = plan.batch_to_run
        if batch is not None and scheduler.chunked_req is not None and scheduler.chunked_req not in batch.reqs:
            scheduler.chunked_req.inflight_middle_chunks -= 1  # SGLang counts a piece even where there was none
        left = [req for req in scheduler.waiting_queue if not isinstance(req, PlannedReq)]
        shown = set(queue)  # the pass may have put others behind them
        scheduler.waiting_queue = [req for req in waiting if req.req_pool_idx is None]
        scheduler.waiting_queue += [req for req in left if req not in shown]
        if scheduler.live_queue is not None and in_pieces is not None and scheduler.chunked_req is not in_pieces:
            scheduler.live_queue.complete(in_pieces)
        if batch is not None and batch.decoding_reqs:
            batch.decoding_reqs = DecodingReqs(batch.decoding_reqs)
            # With overlap SGLang takes for granted that each of them has a token in flight.
            batch.prefix_lens[-len(batch.decoding_reqs) :] = [req.kv_committed_len - 1 for req in batch.decoding_reqs]
        return plan, left

    # After the pass

    def _settle(self, decision: Decision, batch: Any, live: list[Any]) -> None:
        """Tell the cache what the prefill pass has taken, and pin the prefixes that its step completes."""
        scheduler = self._scheduler
        has_planned = bool(scheduler.planned_window)
        started = []
        for admission in decision.admissions:
            req = cast(PlannedReq, admission.request)
            if req.req_pool_idx is not None:  # else there was no room left in this step
                started.append(req)
                scheduler.output_lengths.start(req.output)
                req.num_lost_for_live += scheduler.tree_cache.lead(req, admission.led_prefix_ids)
        if started:
            scheduler.planned_window.remove(started)
        for req in batch.reqs if batch is not None else ():
            if isinstance(req, PlannedReq) and req.led_prefix_ids:
                scheduler.tree_cache.insert_led_prefixes(req)
                self._settled.invalidate()
        started_live = [req for req in live if req.req_pool_idx is not None]
        if scheduler.live_queue is not None:
            for req in started_live:
                scheduler.live_queue.start(req, is_whole=req is not scheduler.chunked_req)
        if live and has_planned:
            self._turns.add(*(sum(req.extend_range.length for req in reqs) for reqs in (started_live, started)))

    def _count_pending(self, batch: Any, refused: list[Any]) -> None:
        """SGLang has counted the waiting tokens of those that it was shown; add those of the others."""
        live_queue = self._scheduler.live_queue
        if batch is not None and live_queue is not None:
            batch.prefill_stats.num_pending_tokens += live_queue.num_tokens - sum(req.seqlen for req in refused)

    def _give_up_pins(self, req: Any, running_batch: Any) -> None:
        """A live request was refused: give up pins if it would not fit though all that runs had finished."""
        scheduler = self._scheduler
        total = len(req.full_untruncated_fill_ids) + 2 * scheduler.page_size
        total += min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS)
        if scheduler.tree_cache.make_room(total, req.last_node, scheduler.max_total_num_tokens):
            running_batch.batch_is_full = False
            self._settled.invalidate()

    # What `Coserving` asks

    def num_uncached(self, req: Any) -> int:
        """Prompt tokens of a live request that waits which are to be computed."""
        if self._scheduler.live_queue is None:
            return len(req.origin_input_ids) + len(req.output_ids)
        return int(self._scheduler.live_queue.num_uncached(req))


def _nothing(running_batch: Any) -> NextBatchPlan:
    """No prompt is computed: rows decode."""
    return NextBatchPlan(batch_to_run=None, running_batch=running_batch)


def _is_at_its_limit(req: Any) -> bool:
    """Whether as many tokens as it may generate have been launched, if not sampled."""
    # The last token has no slot; the prompt's step samples the first.
    num_launched = req.kv_committed_len - len(req.origin_input_ids) + 1
    return bool(num_launched >= req.sampling_params.max_new_tokens)


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
