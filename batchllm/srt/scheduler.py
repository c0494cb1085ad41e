"""SGLang's scheduler, running plans. (Upstream: ``srt/managers/scheduler.py``.)

Planned requests wait in a window of their own, in plan order; SGLang's ``waiting_queue`` keeps the requests
outside any plan. Each step, `PlannedPolicy` looks at the live state and names the planned requests to start;
they are put behind the live ones for SGLang's own prefill pass, and what it took is settled with the cache
afterwards.
"""

from __future__ import annotations

import gc
import logging
import os
from typing import Any, cast

import numpy as np
import sglang.srt.managers.scheduler as upstream
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import NextBatchPlan, Scheduler
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.utils import TypeBasedDispatcher

from batchllm.scheduler import Decision, PlannedPolicy
from batchllm.scheduler.output_length import OutputLengths
from batchllm.scheduler.window import RequestWindow
from batchllm.srt import attention_backend, child_process, compat, cpu_ops, radix_cache, sampling
from batchllm.srt.io_struct import (
    JobCounters,
    PlannedAbortReqInput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
)
from batchllm.srt.live_view import free_kv_tokens, make_view, step_budget
from batchllm.srt.output_streamer import BatchOutputStreamer
from batchllm.srt.planned_run import RunReader
from batchllm.srt.radix_cache import PlannedRadixCache
from batchllm.srt.schedule_batch import DecodingReqs, PlannedReq, give_estimate
from batchllm.srt.schedule_policy import PlannedPrefillAdder
from batchllm.srt.server_args import ATTENTION_BACKEND, kv_limit_tokens
from batchllm.srt.shared_prefixes import SharedPrefixes
from batchllm.srt.step_layout import SharesPrefixes
from batchllm.srt.step_recorder import StepRecorder


class BatchScheduler(Scheduler):
    """SGLang's scheduler with a window of planned requests beside the queue of live ones."""

    tree_cache: PlannedRadixCache

    def init_running_status(self) -> None:
        super().init_running_status()
        self.planned_window: RequestWindow[PlannedReq] = RequestWindow()
        self.planned_policy = PlannedPolicy()
        self.output_lengths = OutputLengths()
        self.kv_limit_tokens = kv_limit_tokens(self.server_args, self.max_total_num_tokens)
        self.planned_counters: dict[int, JobCounters] = {}
        self.unfinished_planned: dict[tuple[int, int], PlannedReq] = {}
        # Requests running when the last decision admitted nothing; None when something has changed since.
        self._settled_at: int | None = None
        self._any_finished = False
        self.shared_prefixes = SharedPrefixes(
            self.tree_cache.ledger, len(self.req_to_token_pool.req_to_token), self.page_size
        )
        self.attention = self.tp_worker.model_runner.attn_backend
        self.step_recorder = StepRecorder(self.attention)
        if isinstance(self.attention, SharesPrefixes):
            self.attention.follow(self.shared_prefixes)
        # With overlap a request that has ended runs one more step.
        self.planned_runs = RunReader(
            self.tree_cache.ledger,
            self.output_lengths,
            self.tokenizer,
            self.model_config,
            num_extra_slots=int(self.enable_overlap),
            learns_lengths=self.server_args.output_lengths == "learned",
        )

    def run_event_loop(self) -> None:
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

    def get_init_info(self) -> dict[str, Any]:
        parts = {"scheduler": self, "radix_cache": self.tree_cache, "attention": self.attention}
        return super().get_init_info() | {"batchllm": {name: type(part).__name__ for name, part in parts.items()}}

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

    # What comes in

    def handle_planned_run(self, message: PlannedRunReqInput) -> None:
        """Take the next requests of a job into the window."""
        self.planned_counters.setdefault(message.job_id, JobCounters())
        self.shared_prefixes.drop_released()
        for req in self.planned_runs.read(message):
            self._take_in(req)
        self._settled_at = None

    def _take_in(self, req: PlannedReq) -> None:
        self.unfinished_planned[req.job_id, req.position] = req
        req.is_ready = not self.grammar_manager.process_req_with_grammar(req)
        if req.to_finish is not None:
            self._abort_waiting(req)
        else:
            self.planned_window.add(req)

    def handle_planned_abort(self, message: PlannedAbortReqInput) -> None:
        """Drop what is left of a job."""
        for req in list(self.unfinished_planned.values()):
            is_running = req is self.chunked_req or req.req_pool_idx is not None
            if req.job_id == message.job_id and not (is_running and message.spares_running):
                self._abort_planned(req)

    def handle_planned_close(self, message: PlannedCloseReqInput) -> None:
        """Forget a job; every request of it has been answered."""
        self.planned_counters.pop(message.job_id, None)
        self.output_lengths.forget(message.job_id)

    def _abort_planned(self, req: PlannedReq) -> None:
        if req is self.chunked_req:
            self._pending_chunked_abort_req = req
        elif req.req_pool_idx is not None:
            req.to_finish = FINISH_ABORT()  # taken up when its running step is done
        elif req.finished_reason is None:
            self.planned_window.remove([req])
            req.to_finish = FINISH_ABORT()
            self._abort_waiting(req)

    def _abort_waiting(self, req: PlannedReq) -> None:
        """Finish a request that holds no KV, without running it."""
        req.finished_reason, req.to_finish = req.to_finish, None
        self.tree_cache.count_off(req)
        self.output_streamer.send_finished([req])

    def abort_request(self, recv_req: AbortReq) -> None:
        super().abort_request(recv_req)
        if recv_req.abort_all:
            for req in list(self.unfinished_planned.values()):
                self._abort_planned(req)

    def process_pending_chunked_abort(self) -> None:
        req = self._pending_chunked_abort_req
        super().process_pending_chunked_abort()
        if isinstance(req, PlannedReq) and req.finished() and not req.finished_output:
            self.output_streamer.send_finished([req])

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        """Every request enters a queue here: new, with its grammar compiled, or retracted."""
        if not isinstance(req, PlannedReq):
            give_estimate(req)
            super()._add_request_to_queue(req, is_retracted)
            return
        if req.finished():  # aborted while its grammar was being compiled
            return
        self._settled_at = None
        if is_retracted:
            self._counters(req).num_retractions += 1
            self.step_recorder.num_retracted += 1
            self.planned_window.add(req)
        elif req.to_finish is not None:  # its grammar does not compile
            self.planned_window.remove([req])
            self._abort_waiting(req)
        else:
            req.is_ready = True

    # What runs next

    def get_new_batch_prefill(self, running_batch: Any) -> NextBatchPlan:
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)
        if self._any_finished:
            # SGLang drops the finished ones after this; a decision must not count their memory.
            self._any_finished = False
            running_batch.filter_batch()
            running_batch.batch_is_full = False
        running = running_batch.reqs
        budget = step_budget(self, running)
        if budget == 0:  # what decodes needs the last slots: a prompt in pieces waits, and SGLang makes room
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        decision = self._decide(running_batch, budget)
        if not decision.admissions and not self.waiting_queue and self.chunked_req is None:
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        planned = [admission.request for admission in decision.admissions]
        if running:
            self.waiting_queue = self.waiting_queue + planned
        else:
            # A live request may have to wait until pins are released, and SGLang stops at the first that does not
            # fit. With nothing running the plan goes first, or neither would ever.
            self.waiting_queue = planned + self.waiting_queue
        if planned:
            running_batch.batch_is_full = False
        chunk = self.chunked_prefill_size
        if chunk is not None:  # read again in each pass; SGLang takes the decoding rows of a mixed step off it
            self.chunked_prefill_size = budget + (len(running) if self.is_mixed_chunk else 0)
        plan = super().get_new_batch_prefill(running_batch)
        self.chunked_prefill_size = chunk
        self.waiting_queue = [req for req in self.waiting_queue if not isinstance(req, PlannedReq)]
        batch = plan.batch_to_run
        if batch is not None and batch.decoding_reqs:
            batch.decoding_reqs = DecodingReqs(batch.decoding_reqs)
        self._settle(decision, batch)
        return plan

    def _decide(self, running_batch: Any, budget: int) -> Decision:
        # A live request that found no room goes first when some is free again.
        num_running = len(running_batch.reqs)
        live_has_no_room = self.waiting_queue and running_batch.batch_is_full and num_running
        if not self.planned_window or self._settled_at == num_running or live_has_no_room:
            return Decision()
        decision = self.planned_policy.decide(make_view(self, running_batch.reqs, budget))
        self._settled_at = None if decision.admissions else num_running
        return decision

    def _settle(self, decision: Decision, batch: Any) -> None:
        """Tell the cache what the prefill pass has taken, and pin the prefixes that its step completes."""
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
                self._settled_at = None

    def update_running_batch(self, batch: Any) -> Any:
        self._give_up_chunk(batch)
        before = batch.reqs
        batch = super().update_running_batch(batch)
        if len(batch.reqs) < len(before):
            for req in before:
                # SGLang gives up on a request that does not fit even alone; its answer is ours to send.
                if isinstance(req, PlannedReq) and req.to_finish is not None and req.req_pool_idx is None:
                    self._abort_waiting(req)
        return batch

    def _give_up_chunk(self, batch: Any) -> None:
        """Retract a prompt in pieces before anything that decodes.

        SGLang retracts decoding requests only, and aborts the last of them rather than touch a prompt in pieces.
        """
        req = self.chunked_req
        if isinstance(req, PlannedReq) and req.inflight_middle_chunks == 0 and not batch.check_decode_mem():
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
        if not self.unfinished_planned:
            return super().run_batch(batch, pp_proxy_tensors)
        self._count(batch)
        self.step_recorder.begin(self, batch)
        result = super().run_batch(batch, pp_proxy_tensors)
        self.step_recorder.end()
        return result

    def _count(self, batch: Any) -> None:
        num_used = self.max_total_num_tokens - free_kv_tokens(self)
        for counters in self.planned_counters.values():
            counters.peak_kv_tokens = max(counters.peak_kv_tokens, num_used)
        if not batch.forward_mode.is_extend():
            return
        for req, cached_len, num_tokens in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            # Not the generated tokens: those of decoding rows of a mixed step, or of a retracted request.
            if isinstance(req, PlannedReq) and cached_len < req.num_prompt_tokens:
                num_tokens = min(cached_len + num_tokens, req.num_prompt_tokens) - cached_len
                self._counters(req).num_computed_prompt_tokens += num_tokens

    def _finish_planned(self, req: PlannedReq) -> JobCounters:
        del self.unfinished_planned[req.job_id, req.position]
        self._settled_at = None
        self._any_finished = True
        counters = self._counters(req)
        if not isinstance(req.finished_reason, FINISH_ABORT):
            self.output_lengths.finish(req.output, len(req.output_ids))
            counters.prediction.add(req.output, len(req.output_ids))
        return counters

    def _counters(self, req: PlannedReq) -> JobCounters:
        # A job may be closed while the last of its aborted requests still runs.
        return self.planned_counters.get(req.job_id) or JobCounters()

    def on_idle(self) -> None:
        self.step_recorder.pause()
        super().on_idle()

    def is_fully_idle(self, for_health_check: bool = False) -> bool:
        # An open job has a claim on its pins even while none of its requests is here.
        return not self.planned_counters and super().is_fully_idle(for_health_check)


class OfflineBatchScheduler(BatchScheduler):
    """Without a server beside it: nobody reads the load snapshots that each prefill step would write."""

    def init_ipc_channels(self, port_args: Any) -> None:
        super().init_ipc_channels(port_args)
        writer = self.load_snapshot_writer
        if writer is not None:
            self.load_snapshot_writer = None
            writer.close()
            os.unlink(writer.path)


def run_server_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process of a server, like `run_scheduler_process`."""
    child_process.begin()
    install(server_args, BatchScheduler)
    upstream.run_scheduler_process(server_args, *args, **kwargs)


def run_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process of an offline engine: install our parts, then run SGLang's own
    function.
    """
    child_process.begin()
    install(server_args, OfflineBatchScheduler)
    upstream.run_scheduler_process(server_args, *args, **kwargs)


def install(server_args: Any, scheduler_class: type[BatchScheduler] = BatchScheduler) -> None:
    """Put our parts where SGLang's scheduler process looks for them, and verify the ground they stand on."""
    compat.check()
    # What we warn of is rare and worth a line, whatever level SGLang's own many lines have.
    level = logging.getLevelNamesMapping().get(server_args.log_level.upper(), logging.WARNING)
    logging.getLogger("batchllm").setLevel(min(logging.WARNING, level))
    if server_args.shares_attention:
        attention_backend.register()
        cpu_ops.install()
    elif server_args.attention_backend == ATTENTION_BACKEND:
        from batchllm.srt import gpu_attention_backend  # Triton's kernels, which a CPU has no use for

        gpu_attention_backend.register()
    radix_cache.register()
    sampling.install()
    upstream.Scheduler = scheduler_class
    upstream.PrefillAdder = PlannedPrefillAdder
