"""SGLang's scheduler, running plans. (Upstream: ``srt/managers/scheduler.py``.)

Planned requests wait in a window of their own, in plan order; SGLang's ``waiting_queue`` keeps the requests
outside any plan. Each step, `PlannedPolicy` looks at the live state and names the planned requests to start, and
`LiveQueue` the live ones; `Turns` says who goes first where both wait. SGLang's own prefill pass is shown these, and
what it took is settled with the cache afterwards.
"""

from __future__ import annotations

import gc
from typing import Any, cast

import numpy as np
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.managers.scheduler import NextBatchPlan
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.utils import TypeBasedDispatcher

from batchllm.scheduler import Decision, PlannedPolicy
from batchllm.scheduler.output_length import OutputLengths
from batchllm.scheduler.turns import Turns
from batchllm.scheduler.window import RequestWindow
from batchllm.srt.coserving import Coserving, PrefillShare
from batchllm.srt.grammars import quiet_row_faults
from batchllm.srt.io_struct import (
    PlannedAbortReqInput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
)
from batchllm.srt.live_queue import LiveQueue
from batchllm.srt.live_view import free_kv_tokens, make_view, step_budget
from batchllm.srt.output_streamer import BatchOutputStreamer
from batchllm.srt.planned_intake import PlannedIntake
from batchllm.srt.planned_jobs import PlannedJobs
from batchllm.srt.planned_run import RunReader
from batchllm.srt.radix_cache import PlannedRadixCache
from batchllm.srt.schedule_batch import DecodingReqs, PlannedReq
from batchllm.srt.scheduler_metrics import SchedulerMetrics
from batchllm.srt.server_args import kv_limit_tokens
from batchllm.srt.shared_prefixes import SharedPrefixes
from batchllm.srt.step_clock import step_clock
from batchllm.srt.step_layout import SharesPrefixes
from batchllm.srt.step_measurement import start_coserving
from batchllm.srt.step_recorder import StepRecorder


class BatchScheduler(PlannedIntake):
    """SGLang's scheduler with a window of planned requests beside the queue of live ones."""

    tree_cache: PlannedRadixCache
    num_live_adapters = 1
    """Places for adapters that no plan takes, since live requests would wait for one until the plan has ended."""

    def init_running_status(self) -> None:
        super().init_running_status()
        quiet_row_faults()
        self.planned_window = RequestWindow()
        self.planned_policy = PlannedPolicy()
        self.output_lengths = OutputLengths()
        self.kv_limit_tokens = kv_limit_tokens(self.server_args, self.max_total_num_tokens)
        self.planned_jobs = PlannedJobs()
        self.turns = Turns()
        # SGLang's own order where one was asked for, or where something else has a say in it.
        is_ours = self.server_args.orders_live and not (self.enable_priority_scheduling or self.enable_lora)
        self.live_queue = LiveQueue(self.tree_cache, self.max_total_num_tokens) if is_ours else None
        self._settled = None
        self.coserving: Coserving | None = None  # once steps can be measured, where a bound was asked for
        self.ending_reqs: list[Any] = []  # dropped, and not known to have ended yet
        self.shared_prefixes = SharedPrefixes(
            self.tree_cache.ledger, len(self.req_to_token_pool.req_to_token), self.page_size
        )
        self.tree_cache.readers = self.shared_prefixes
        self.attention = self.tp_worker.model_runner.attn_backend
        has_metrics = self.server_args.enable_metrics and self.ps.tp_rank == 0
        has_bound = self.server_args.max_tbt_ms is not None
        self.metrics = SchedulerMetrics(has_bound=has_bound) if has_metrics else None
        if isinstance(self.attention, SharesPrefixes):
            self.attention.follow(self.shared_prefixes)
        self.planned_runs = RunReader(
            self.tree_cache.ledger,
            self.output_lengths,
            self.tokenizer,
            self.model_config,
            learns_lengths=self.server_args.output_lengths == "learned",
        )

    @property
    def max_planned_lora_ids(self) -> int | None:
        """Adapters that planned requests may run with at once, the base model counted; None without adapters."""
        if not self.enable_lora:
            return None
        manager = self.tp_worker.model_runner.lora_manager
        return max(1, self.max_loras_per_batch - manager.num_pinned_loras - self.num_live_adapters)

    def run_event_loop(self) -> None:
        self.step_recorder = StepRecorder(self.attention, self.step_clock)
        # A collection would walk a million objects that torch and SGLang made at import.
        gc.collect()
        gc.freeze()
        super().run_event_loop()

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher(
            [
                (PlannedRunReqInput, self.handle_planned_run),
                (PlannedAbortReqInput, self.handle_planned_abort),
                (PlannedCloseReqInput, self.handle_planned_close),
            ]
        )

    def pause_generation(self, recv_req: Any) -> None:
        if self.coserving is not None:
            self.running_batch = self.coserving.aside.bring_back(self.running_batch)
        super().pause_generation(recv_req)

    def get_init_info(self) -> dict[str, Any]:
        self.step_clock = step_clock(self)
        if self.server_args.max_tbt_ms is not None:
            self.coserving = start_coserving(self)
        parts = {"scheduler": self, "radix_cache": self.tree_cache, "attention": self.attention}
        names = {name: type(part).__name__ for name, part in parts.items()}
        return super().get_init_info() | {"batchllm": names | {"max_running": self.max_running_requests}}

    def init_output_streamer(self) -> None:
        self.output_streamer = BatchOutputStreamer(
            send_to_detokenizer=self.ipc_channels.send_to_detokenizer,
            tree_cache=self.tree_cache,
            ps=self.ps,
            server_args=self.server_args,
            is_generation=self.is_generation,
            spec_algorithm=self.spec_algorithm,
            disaggregation_mode=self.disaggregation_mode,
            enable_hicache_storage=lambda: self.enable_hicache_storage,
            rust_server=self.rust_server,
            finish_planned=self._finish_planned,
            take_steps=lambda: self.step_recorder.take_steps(),
        )

    # What runs next

    def get_new_batch_prefill(self, running_batch: Any) -> NextBatchPlan:
        """The prompts that the coming step computes, and the rows that decode in it or after it."""
        self._take_arrivals()
        if self.coserving is not None:
            running_batch = self.coserving.start_step(running_batch)
        self._drop_ended(running_batch)
        plan = self._prefill(running_batch)
        if self.coserving is not None and plan.batch_to_run is None and plan.running_batch.is_empty():
            # Rows that were to make room for a prompt which did not fit.
            plan = NextBatchPlan(batch_to_run=None, running_batch=self.coserving.aside.bring_back(plan.running_batch))
        return plan

    def _take_arrivals(self) -> None:
        """Forget live requests that have gone, and take in those whose grammar has been compiled."""
        if self.live_queue is not None:
            self.live_queue.drop_gone(self.waiting_queue)
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)

    def _prefill(self, running_batch: Any) -> NextBatchPlan:
        running = running_batch.reqs
        is_planned_turn = self.turns.is_planned
        is_for_live = running_batch.batch_is_full and self._waits_for_room(running) and not is_planned_turn
        if (
            is_for_live
            and self.coserving is not None
            and self.coserving.make_room(self.waiting_queue[0], running_batch)
        ):
            running, is_for_live = running_batch.reqs, False
        share = self._share(running_batch)
        live = share.live
        if is_for_live or share.num_tokens == 0:
            if is_for_live and self.planned_window:
                self.turns.wait()
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        if not live or not self.planned_window:
            self.turns.reset()
            is_planned_turn = False
        decision = self._decide(running_batch, share.num_planned_tokens, live)
        planned = [admission.request for admission in decision.admissions]
        if is_planned_turn and decision.lacks_room:
            self.turns.wait()
            live = []  # what becomes free is for the plan
        if not planned and not live and self.chunked_req is None:
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        # SGLang stops at the first that does not fit.
        is_stuck = not running and running_batch.batch_is_full
        queue = planned + live if is_planned_turn or is_stuck else live + planned
        if planned:
            running_batch.batch_is_full = False
        in_pieces = self.chunked_req
        plan, refused = self._show(queue, share.num_tokens, running_batch)
        batch = plan.batch_to_run
        if self.live_queue is not None and in_pieces is not None and self.chunked_req is not in_pieces:
            self.live_queue.complete(in_pieces)
        if batch is not None and batch.decoding_reqs:
            batch.decoding_reqs = DecodingReqs(batch.decoding_reqs)
            # With overlap SGLang takes for granted that each of them has a token in flight.
            batch.prefix_lens[-len(batch.decoding_reqs) :] = [req.kv_committed_len - 1 for req in batch.decoding_reqs]
        self._settle(decision, batch, live)
        if batch is not None and self.live_queue is not None:  # SGLang has counted those that it was shown
            batch.prefill_stats.num_pending_tokens += self.live_queue.num_tokens - sum(req.seqlen for req in refused)
        if refused and batch is None and plan.running_batch.batch_is_full:
            self._make_room(refused[0], plan.running_batch)
        return plan

    def _share(self, running_batch: Any) -> PrefillShare:
        """What the coming step may compute of prompts."""
        budget = step_budget(self, running_batch.reqs)
        if self.coserving is not None:
            return self.coserving.compose(running_batch, budget)
        if budget == 0:  # what decodes needs the last slots: a prompt in pieces waits, and SGLang makes room
            return PrefillShare()
        return PrefillShare(self.live_to_start(len(running_batch.reqs), budget), budget, budget)

    def put_back_chunk(self) -> None:
        """Let a planned prompt in pieces wait again: the prefixes that it has computed so far stay in the tree."""
        req = self.chunked_req
        req.num_lost_for_live = self.tree_cache.keep_computed(req)
        release_kv_cache(req, self.tree_cache, is_insert=False)
        req.reset_for_retract()
        self.chunked_req = None
        self.planned_window.add(req)
        self._settled = None

    def num_uncached(self, req: Any) -> int:
        """Prompt tokens of a live request that waits which are to be computed."""
        if self.live_queue is None:
            return len(req.origin_input_ids) + len(req.output_ids)
        return self.live_queue.num_uncached(req)

    def num_free_kv_tokens(self) -> int:
        """Slots that are free, or hold KV that nobody planned and nobody runs on."""
        return free_kv_tokens(self)

    def get_num_allocatable_reqs(self, running_bs: int) -> int:
        num_aside = 0 if self.coserving is None else len(self.coserving.aside.reqs)
        return int(super().get_num_allocatable_reqs(running_bs + num_aside))

    def _drop_ended(self, running_batch: Any) -> None:
        """Drop what runs no further step: what has ended, and what ends with the step in flight, at its limit.

        SGLang drops the former later, when a decision has counted their memory, and runs the latter once more in vain.
        """
        if self.ending_reqs:  # they have ended by now: what was true beside them no longer is
            running_batch.batch_is_full = False
            self._settled = None
        reqs = running_batch.reqs
        left = [i for i, req in enumerate(reqs) if not req.finished()]
        going_on = [i for i in left if not _is_at_its_limit(reqs[i])] if self.enable_overlap else left
        if self.token_to_kv_pool_allocator.available_size() < len(going_on) * self.page_size:
            going_on = left  # SGLang will take slots from somebody: it must find the last one that could give any
        self.ending_reqs = [reqs[i] for i in sorted(set(left).difference(going_on))]
        if len(going_on) < len(reqs):
            running_batch.filter_batch(keep_indices=going_on)
            running_batch.batch_is_full = False
            self._settled = None

    def _show(self, queue: list[Any], budget: int, running_batch: Any) -> tuple[NextBatchPlan, list[Any]]:
        """Have SGLang take what it can of ``queue``. Returns its plan, and the live requests that it left."""
        waiting, chunk = self.waiting_queue, self.chunked_prefill_size
        self.waiting_queue = list(queue)
        if chunk is not None:  # read again in each pass; SGLang takes the decoding rows of a mixed step off it
            self.chunked_prefill_size = budget + (len(running_batch.reqs) if self.is_mixed_chunk else 0)
        plan = super().get_new_batch_prefill(running_batch)
        self.chunked_prefill_size = chunk
        batch, in_pieces = plan.batch_to_run, self.chunked_req
        if batch is not None and in_pieces is not None and in_pieces not in batch.reqs:
            in_pieces.inflight_middle_chunks -= 1  # SGLang has counted a piece, and the step had no time for one
        left = [req for req in self.waiting_queue if not isinstance(req, PlannedReq)]
        shown = set(queue)  # the pass may have put others behind them
        self.waiting_queue = [req for req in waiting if req.req_pool_idx is None]
        self.waiting_queue += [req for req in left if req not in shown]
        return plan, left

    def live_to_start(self, num_running: int, budget: int) -> list[Any]:
        """Live requests that may start in the coming step, in order."""
        if self.live_queue is None or not self.waiting_queue:
            return self.waiting_queue
        return self.live_queue.choose(
            max_requests=self.get_num_allocatable_reqs(num_running), max_tokens=budget, chunked_req=self.chunked_req
        )

    def _waits_for_room(self, running: list[Any]) -> bool:
        """Whether live requests wait, with nothing else to do in this step: what becomes free is for them."""
        return bool(self.live_queue is not None and self.waiting_queue and running and self.chunked_req is None)

    def _decide(self, running_batch: Any, budget: int, live: list[Any]) -> Decision:
        num_running = len(running_batch.reqs)
        live_lacks_room = live and num_running and running_batch.batch_is_full
        if not self.planned_window or not budget or (live_lacks_room and not self.turns.is_planned):
            return Decision()
        if self._settled is not None and self._settled[1] == num_running:
            return self._settled[0]
        budget -= self._chunk_tokens_of(budget)
        decision = self.planned_policy.decide(make_view(self, running_batch.reqs, budget))
        is_settled = not decision.admissions and (self.coserving is None or decision.lacks_room)
        self._settled = (decision, num_running) if is_settled else None
        return decision

    def _chunk_tokens_of(self, budget: int) -> int:
        """What a prompt in pieces takes of the budget of planned requests."""
        req = self.chunked_req
        if req is None:
            return 0
        num_left = int(req.seqlen - len(req.prefix_indices))
        if self.coserving is None:
            return num_left
        return min(num_left, budget) if isinstance(req, PlannedReq) else 0

    def _make_room(self, req: Any, running_batch: Any) -> None:
        """A live request was refused: give up pins if it would not fit though all that runs had finished."""
        total = len(req.full_untruncated_fill_ids) + 2 * self.page_size
        total += min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS)
        if self.tree_cache.make_room(total, req.last_node, self.max_total_num_tokens):
            running_batch.batch_is_full = False
            self._settled = None

    def _settle(self, decision: Decision, batch: Any, live: list[Any]) -> None:
        """Tell the cache what the prefill pass has taken, and pin the prefixes that its step completes."""
        has_planned = bool(self.planned_window)
        started = []
        for admission in decision.admissions:
            req = cast(PlannedReq, admission.request)
            if req.req_pool_idx is not None:  # else there was no room left in this step
                started.append(req)
                self.output_lengths.start(req.output)
                self.tree_cache.lead(req, admission.led_prefix_ids)
        if started:
            self.planned_window.remove(started)
        for req in batch.reqs if batch is not None else ():
            if isinstance(req, PlannedReq) and req.led_prefix_ids:
                self.tree_cache.insert_led_prefixes(req)
                self._settled = None
        started_live = [req for req in live if req.req_pool_idx is not None]
        if self.live_queue is not None:
            for req in started_live:
                self.live_queue.start(req, is_whole=req is not self.chunked_req)
        if live and has_planned:
            self.turns.add(*(sum(req.extend_range.length for req in reqs) for reqs in (started_live, started)))

    def update_running_batch(self, batch: Any) -> Any:
        before = batch.reqs
        num_free = self.token_to_kv_pool_allocator.available_size()
        if num_free < len(before) * self.page_size and not batch.check_decode_mem():
            self._give_up_chunk()
            self.tree_cache.yields_to_live = any(not isinstance(req, PlannedReq) for req in before)
        batch = super().update_running_batch(batch)
        self.tree_cache.yields_to_live = False
        if len(batch.reqs) < len(before):
            for req in before:
                # SGLang gives up on a request that does not fit even alone; its answer is ours to send.
                if isinstance(req, PlannedReq) and req.to_finish is not None and req.req_pool_idx is None:
                    self._abort_waiting([req])
        return batch

    def _give_up_chunk(self) -> None:
        """Retract a prompt in pieces before anything that decodes.

        SGLang retracts decoding requests only, and aborts the last of them rather than touch a prompt in pieces.
        """
        req = self.chunked_req
        if isinstance(req, PlannedReq):
            release_kv_cache(req, self.tree_cache, is_insert=False)
            req.reset_for_retract()
            self.chunked_req = None
            self._add_request_to_queue(req, is_retracted=True)

    # What is counted, where it happens

    def run_batch(self, batch: Any, pp_proxy_tensors: Any = None) -> Any:
        if batch.forward_mode.is_extend():  # where every request gets its table row
            self.shared_prefixes.start(batch.reqs)
        if isinstance(self.attention, SharesPrefixes):
            self.attention.begin_step(batch.req_pool_indices_cpu.numpy().astype(np.int32))
        if self.metrics is not None:
            self.metrics.count_step(self, batch)
        is_recorded = self.planned_jobs.any_unfinished()
        if is_recorded:
            self._count(batch)
            self.step_recorder.begin(self, batch)
        result = super().run_batch(batch, pp_proxy_tensors)
        if is_recorded:
            self.step_recorder.end()
        if self.coserving is not None:
            self.coserving.note_step(batch)
        return result

    def _count(self, batch: Any) -> None:
        num_used = self.max_total_num_tokens - free_kv_tokens(self)
        for counters in self.planned_jobs.all_counters():
            counters.peak_kv_tokens = max(counters.peak_kv_tokens, num_used)
        if not batch.forward_mode.is_extend():
            return
        for req, cached_len, num_tokens in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            if not isinstance(req, PlannedReq):
                continue
            if req.num_lost_for_live:
                num_again = min(req.num_lost_for_live, num_tokens)
                req.num_lost_for_live -= num_again
                self.planned_jobs.counters(req.job_id).num_recomputed_for_live += num_again
            # Not the generated tokens: those of decoding rows of a mixed step, or of a retracted request.
            if cached_len < req.num_prompt_tokens:
                num_tokens = min(cached_len + num_tokens, req.num_prompt_tokens) - cached_len
                self.planned_jobs.counters(req.job_id).num_computed_prompt_tokens += num_tokens

    def on_idle(self) -> None:
        self.step_recorder.pause()
        if self.coserving is not None:
            self.coserving.pause()
        if self.metrics is not None:
            self.metrics.measure(self)
        super().on_idle()
        if self.planned_jobs and not self.planned_window and super().is_fully_idle():
            self.maybe_sleep_on_idle()  # upstream has not slept, since a job is open

    def is_fully_idle(self, for_health_check: bool = False) -> bool:
        # An open job has a claim on its pins even while none of its requests is here.
        return not self.planned_jobs and super().is_fully_idle(for_health_check)


def _is_at_its_limit(req: Any) -> bool:
    """Whether as many tokens as it may generate have been launched, if not sampled."""
    # The last token has no slot; the prompt's step samples the first.
    num_launched = req.kv_committed_len - len(req.origin_input_ids) + 1
    return bool(num_launched >= req.sampling_params.max_new_tokens)
