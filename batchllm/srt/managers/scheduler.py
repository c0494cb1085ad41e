"""SGLang's scheduler, running plans. Runs in the scheduler's process. (Upstream: ``srt/managers/scheduler.py``.)

Planned requests come and go through `PlannedIntake` and wait in a window of their own; SGLang's ``waiting_queue`` keeps
the requests outside any plan. Each step `PrefillPass` chooses what SGLang's own prefill pass is shown. This file puts
the parts together, and is where SGLang calls them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from sglang.srt.managers.io_struct import (
    AbortReq,
    CheckWeightsReqInput,
    FlushCacheReqInput,
    GetWeightsByNameReqInput,
    ReleaseMemoryOccupationReqInput,
    RpcReqInput,
    SendWeightsToRemoteInstanceReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.managers.scheduler import NextBatchPlan, Scheduler
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.utils import TypeBasedDispatcher

from batchllm.scheduler.output_length import OutputLengths
from batchllm.scheduler.window import RequestWindow
from batchllm.srt.constrained.grammars import bound_cache, bounded_compilers, quiet_row_faults
from batchllm.srt.layers.attention_backend import SharedCpuAttnBackend
from batchllm.srt.layers.cpu_linear import choose_products, mark_layers, restore_weights
from batchllm.srt.layers.decoder_layer import fuse_layers
from batchllm.srt.layers.step_layout import SharesPrefixes
from batchllm.srt.managers import control_faults, live_sampling
from batchllm.srt.managers.coserving import Coserving
from batchllm.srt.managers.io_struct import (
    PlannedAbortReqInput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
    PlannedShareReqInput,
)
from batchllm.srt.managers.live_queue import LiveQueue
from batchllm.srt.managers.live_view import free_kv_tokens
from batchllm.srt.managers.output_streamer import BatchOutputStreamer
from batchllm.srt.managers.planned_intake import PlannedIntake, RunReader
from batchllm.srt.managers.prefill_pass import PrefillPass
from batchllm.srt.managers.schedule_batch import PlannedReq, prepare_live
from batchllm.srt.managers.scheduler_metrics import SchedulerMetrics
from batchllm.srt.managers.step_clock import step_clock
from batchllm.srt.managers.step_measurement import start_coserving
from batchllm.srt.managers.step_recorder import StepRecorder
from batchllm.srt.mem_cache.radix_cache import PlannedRadixCache
from batchllm.srt.mem_cache.shared_prefixes import SharedPrefixes
from batchllm.srt.platforms.cpu_memory import give_back_zeros, keep_freed_memory
from batchllm.srt.platforms.cpu_threads import set_num_threads
from batchllm.srt.server_args import kv_limit_tokens

_WEIGHT_UPDATES = (
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromIPCReqInput,
)
_WEIGHT_READERS = (
    GetWeightsByNameReqInput,
    CheckWeightsReqInput,
    SendWeightsToRemoteInstanceReqInput,
    RpcReqInput,  # saves the model
)


class BatchScheduler(Scheduler):
    """SGLang's scheduler with a window of planned requests beside the queue of live ones.

    Attributes:
        intake: Takes planned requests and answers them.
        prefill: Composes the prefill of each step.
        coserving: Bounds steps; None until they have been measured, and where no bound was asked for.
        live_queue: The order of SGLang's queue; None where SGLang orders it itself.
        output_lengths: What outputs are expected.
        shared_prefixes: Which prefix each row reads.
    """

    tree_cache: PlannedRadixCache
    num_live_adapters = 1
    """Places for adapters that no plan takes, since live requests would wait for one until the plan has ended."""

    def __init__(self, server_args: Any, port_args: Any, gpu_id: int, *args: Any, **kwargs: Any) -> None:
        if server_args.device == "cpu":
            set_num_threads(server_args, gpu_id)
            choose_products()
        super().__init__(server_args, port_args, gpu_id, *args, **kwargs)

    def init_running_status(self) -> None:
        super().init_running_status()
        quiet_row_faults()
        self.output_lengths = OutputLengths()
        self.kv_limit_tokens = kv_limit_tokens(self.server_args, self.max_total_num_tokens)
        # SGLang's own order where one was asked for, or where something else has a say in it.
        is_ours = self.server_args.orders_live and not (self.enable_priority_scheduling or self.enable_lora)
        self.live_queue = LiveQueue(self.tree_cache, self.max_total_num_tokens) if is_ours else None
        self.coserving: Coserving | None = None
        self.shared_prefixes = SharedPrefixes(
            self.tree_cache.ledger, len(self.req_to_token_pool.req_to_token), self.page_size
        )
        self.tree_cache.readers = self.shared_prefixes
        if self.server_args.device == "cpu":
            mark_layers(self.tp_worker.model_runner.model)
            keep_freed_memory()
            give_back_zeros(self.req_to_token_pool.req_to_token)
        self.attention = self.tp_worker.model_runner.attn_backend
        if isinstance(self.attention, SharesPrefixes):
            self.attention.follow(self.shared_prefixes)
        if isinstance(self.attention, SharedCpuAttnBackend):
            fuse_layers(self.tp_worker.model_runner.model, self.attention)
        has_metrics = self.server_args.enable_metrics and self.ps.tp_rank == 0
        has_bound = self.server_args.max_tbt_ms is not None
        self.metrics = SchedulerMetrics(has_bound=has_bound) if has_metrics else None
        settled = self.tree_cache.settled
        runs = RunReader(
            self.tree_cache.ledger,
            self.output_lengths,
            self.tokenizer,
            self.model_config,
            learns_lengths=self.server_args.output_lengths == "learned",
        )
        self.intake = PlannedIntake(self, runs, settled)
        self.prefill = PrefillPass(self, super().get_new_batch_prefill, settled)

    @property
    def planned_window(self) -> RequestWindow[PlannedReq]:
        """Planned requests that have not started, in plan order."""
        return self.intake.window

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
        handlers = self._request_dispatcher._mapping
        for kind in (*_WEIGHT_UPDATES, *_WEIGHT_READERS):
            handlers[kind] = partial(self._with_weights, handlers[kind])
        for kind in (*_WEIGHT_UPDATES, FlushCacheReqInput, ReleaseMemoryOccupationReqInput):
            handlers[kind] = partial(self._ask_when_idle, handlers[kind])
        control_faults.guard(handlers)
        self._request_dispatcher += TypeBasedDispatcher(
            [
                (PlannedRunReqInput, lambda message: self.intake.take_run(message)),
                (PlannedAbortReqInput, lambda message: self.intake.abort_job(message)),
                (PlannedCloseReqInput, lambda message: self.intake.close_job(message)),
                (PlannedShareReqInput, lambda message: self.prefill.give_planned(message.share)),
            ]
        )

    def init_grammar_manager(self) -> None:
        with bounded_compilers():
            super().init_grammar_manager()
        bound_cache(self.grammar_manager.grammar_backend)

    def init_profiler(self) -> None:
        super().init_profiler()
        control_faults.guard_profiler(self.profiler_manager)

    def _with_weights(self, handler: Callable[[Any], Any], message: Any) -> Any:
        restore_weights(self.tp_worker.model_runner.model)
        return handler(message)

    def _ask_when_idle(self, handler: Callable[[Any], Any], message: Any) -> Any:
        """SGLang refuses this beside requests, and takes those for such that have just been answered: until the next
        step they are in the last one.
        """
        batches = [batch for batch in (self.running_batch, self.last_batch) if batch is not None]
        if all(req.finished() for batch in batches for req in batch.reqs):
            while self.enable_overlap and self.result_queue:
                self.process_batch_result(*self.result_queue.popleft())
            self.running_batch.filter_batch()
            self.last_batch = None
        return handler(message)

    def pause_generation(self, recv_req: Any) -> None:
        if self.coserving is not None:
            self.running_batch = self.coserving.aside.bring_back(self.running_batch)
        super().pause_generation(recv_req)

    def get_init_info(self) -> dict[str, Any]:
        # SGLang asks for this last, before its event loop: all is there that a step needs.
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
            finish_planned=lambda req: self.intake.finish(req),
            take_steps=lambda: self.step_recorder.take_steps(),
        )

    # Requests that come, come back, or go

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        """Every request enters a queue here: new, with its grammar compiled, or retracted."""
        if isinstance(req, PlannedReq):
            self.intake.take_back(req, is_retracted=is_retracted)
            return
        fault = live_sampling.fault(req, self.model_config.vocab_size, self.max_req_input_len)
        if fault is not None:  # it would end the engine
            req.set_finish_with_abort(fault)
            live_sampling.make_harmless(req, self.tokenizer)
        prepare_live(req)
        super()._add_request_to_queue(req, is_retracted)
        if self.live_queue is not None and self.waiting_queue and self.waiting_queue[-1] is req:
            self.live_queue.add(req)

    def abort_request(self, recv_req: Any) -> None:
        """End live requests, all or those whose ids begin so; a batch is ended by its own id, at its own route."""
        if recv_req.abort_all:
            batches = [batch for batch in (self.running_batch, self.last_batch) if batch is not None]
            held = [*self.grammar_manager.grammar_queue, *(req for batch in batches for req in batch.reqs)]
            held += [] if self.chunked_req is None else [self.chunked_req]
            live = {req.rid for req in (*self.waiting_queue, *held) if not isinstance(req, PlannedReq)}
            for rid in live:
                super().abort_request(AbortReq(rid=rid))
        else:
            super().abort_request(recv_req)
        if self.live_queue is not None:
            self.live_queue.drop_gone(self.waiting_queue)

    def process_pending_chunked_abort(self) -> None:
        req = self._pending_chunked_abort_req
        super().process_pending_chunked_abort()
        if isinstance(req, PlannedReq) and req.finished() and not req.finished_output:
            self.output_streamer.send_finished([req])

    # What runs next

    def get_new_batch_prefill(self, running_batch: Any) -> NextBatchPlan:
        self._take_arrivals()
        return self.prefill.run(running_batch)

    def _take_arrivals(self) -> None:
        """Forget live requests that have gone, and take in those whose grammar has been compiled."""
        if self.live_queue is not None:
            self.live_queue.drop_gone(self.waiting_queue)
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)

    def get_num_allocatable_reqs(self, running_bs: int) -> int:
        num_aside = 0 if self.coserving is None else len(self.coserving.aside.reqs)
        return int(super().get_num_allocatable_reqs(running_bs + num_aside))

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
                    self.intake.abort_waiting([req])
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
        is_recorded = self.intake.jobs.any_unfinished()
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
        for counters in self.intake.jobs.all_counters():
            counters.peak_kv_tokens = max(counters.peak_kv_tokens, num_used)
        if not batch.forward_mode.is_extend():
            return
        for req, cached_len, num_tokens in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            if not isinstance(req, PlannedReq):
                continue
            if req.num_lost_for_live:
                num_again = min(req.num_lost_for_live, num_tokens)
                req.num_lost_for_live -= num_again
                self.intake.jobs.counters(req.job_id).num_recomputed_for_live += num_again
            # Not the generated tokens: those of decoding rows of a mixed step, or of a retracted request.
            if cached_len < req.num_prompt_tokens:
                num_tokens = min(cached_len + num_tokens, req.num_prompt_tokens) - cached_len
                self.intake.jobs.counters(req.job_id).num_computed_prompt_tokens += num_tokens

    def on_idle(self) -> None:
        self.step_recorder.pause()
        if self.coserving is not None:
            self.coserving.pause()
        if self.metrics is not None:
            self.metrics.measure(self)
        super().on_idle()
        if self.intake.jobs and not self.planned_window and super().is_fully_idle():
            self.maybe_sleep_on_idle()  # upstream has not slept, since a job is open

    def maybe_sleep_on_idle(self) -> None:
        if not self.gracefully_exit:  # upstream sleeps once more, a second, before it looks whether to end
            super().maybe_sleep_on_idle()

    def is_fully_idle(self, for_health_check: bool = False) -> bool:
        # An open job has a claim on its pins even while none of its requests is here.
        return not self.intake.jobs and super().is_fully_idle(for_health_check)
