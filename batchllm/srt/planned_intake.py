"""How requests come into the scheduler and leave it. (Upstream: ``srt/managers/scheduler.py``.)

Planned requests wait in a window of their own, in plan order; those outside any plan in SGLang's queue. Knows jobs,
queues, aborts. Must not know which request runs next.

INVARIANT: a request is in one queue, or compiles its grammar, or holds KV, or has been answered; each is answered once.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import Scheduler

from batchllm.scheduler import Decision
from batchllm.scheduler.output_length import OutputLengths
from batchllm.scheduler.window import RequestWindow
from batchllm.srt import live_sampling
from batchllm.srt.grammars import hold_stops
from batchllm.srt.io_struct import JobCounters, PlannedAbortReqInput, PlannedCloseReqInput, PlannedRunReqInput
from batchllm.srt.live_queue import LiveQueue
from batchllm.srt.output_streamer import BatchOutputStreamer
from batchllm.srt.planned_jobs import PlannedJobs
from batchllm.srt.planned_run import RunReader
from batchllm.srt.radix_cache import PlannedRadixCache
from batchllm.srt.schedule_batch import PlannedReq, prepare_live
from batchllm.srt.shared_prefixes import SharedPrefixes
from batchllm.srt.step_recorder import StepRecorder

_GIVEN_UP = "it was taken back before it had finished"


class PlannedIntake(Scheduler):
    """SGLang's scheduler, taking jobs beside its own requests.

    Attributes:
        planned_window: Planned requests that have not started.
        planned_jobs: What of each job is still to be answered.
        live_queue: The order of SGLang's queue; None where SGLang orders it itself.
    """

    tree_cache: PlannedRadixCache
    planned_window: RequestWindow[PlannedReq]
    planned_jobs: PlannedJobs
    planned_runs: RunReader
    live_queue: LiveQueue | None
    output_lengths: OutputLengths
    output_streamer: BatchOutputStreamer
    shared_prefixes: SharedPrefixes
    step_recorder: StepRecorder
    # The last decision if it admitted nothing, and how many ran; None when something has changed since.
    _settled: tuple[Decision, int] | None

    def handle_planned_run(self, message: PlannedRunReqInput) -> None:
        """Take the next requests of a job into the window."""
        self.planned_jobs.open(message.job_id)
        self.shared_prefixes.drop_released()
        for req in self.planned_runs.read(message):
            self._take_in(req)
        self._settled = None

    def _take_in(self, req: PlannedReq) -> None:
        self.planned_jobs.add(req)
        if self.enable_priority_scheduling:
            self._set_or_validate_priority(req)
        if req.to_finish is None:
            req.is_ready = not self.grammar_manager.process_req_with_grammar(req)
        if req.to_finish is not None:
            self._abort_waiting([req])
        else:
            self._hold_stops(req)
            self.planned_window.add(req)

    def _hold_stops(self, req: PlannedReq) -> None:
        """A grammar that is there goes on for as long as the request must."""
        if req.is_ready and req.grammar is not None and req.min_new_len:
            ends = {*(req.sampling_params.stop_token_ids or ()), *(req.eos_token_ids or ()), req.tokenizer.eos_token_id}
            ends |= req.tokenizer.additional_stop_token_ids or set()
            known = [i for i in ends if i is not None and i < self.model_config.vocab_size]
            hold_stops(req.grammar, known, req.min_new_len)

    def handle_planned_abort(self, message: PlannedAbortReqInput) -> None:
        """Drop what is left of a job."""
        reqs = self.planned_jobs.unfinished(message.job_id)
        if message.spares_running:
            reqs = [req for req in reqs if req is not self.chunked_req and req.req_pool_idx is None]
        self._abort_planned(reqs)

    def handle_planned_close(self, message: PlannedCloseReqInput) -> None:
        """Forget a job as soon as every request of it has been answered; none will come."""
        self.planned_jobs.close(message.job_id)
        self._forget_ended(message.job_id)

    def _forget_ended(self, job_id: int) -> None:
        if self.planned_jobs.take_ended(job_id):
            self.output_lengths.forget(job_id)
            self.tree_cache.release_job(job_id)
            if not self.planned_jobs:
                self.tree_cache.free_withdrawn()
            self._settled = None

    def _abort_planned(self, reqs: list[PlannedReq]) -> None:
        waiting: list[PlannedReq] = []
        for req in reqs:
            if req is self.chunked_req:
                self._pending_chunked_abort_req = req
            elif req.req_pool_idx is not None:
                req.to_finish = FINISH_ABORT(_GIVEN_UP)  # taken up when its running step is done
            elif req.finished_reason is None:
                req.to_finish = FINISH_ABORT(_GIVEN_UP)
                waiting.append(req)
        if waiting:
            self.planned_window.remove(waiting)
            self._abort_waiting(waiting)

    def _abort_waiting(self, reqs: list[PlannedReq]) -> None:
        """Finish requests that hold no KV, without running them. They come back together: there may be thousands."""
        for req in reqs:
            req.finished_reason, req.to_finish = req.to_finish, None
            self.tree_cache.count_off(req)
        self.output_streamer.send_finished(reqs)

    def abort_request(self, recv_req: AbortReq) -> None:
        super().abort_request(recv_req)
        if self.live_queue is not None:
            self.live_queue.drop_gone(self.waiting_queue)
        if recv_req.abort_all:
            self._abort_planned(self.planned_jobs.unfinished())

    def process_pending_chunked_abort(self) -> None:
        req = self._pending_chunked_abort_req
        super().process_pending_chunked_abort()
        if isinstance(req, PlannedReq) and req.finished() and not req.finished_output:
            self.output_streamer.send_finished([req])

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        """Every request enters a queue here: new, with its grammar compiled, or retracted."""
        if not isinstance(req, PlannedReq):
            self._check_live(req)
            prepare_live(req)
            super()._add_request_to_queue(req, is_retracted)
            if self.live_queue is not None and self.waiting_queue and self.waiting_queue[-1] is req:
                self.live_queue.add(req)
            return
        if req.finished():  # aborted while its grammar was being compiled
            return
        self._settled = None
        if is_retracted:
            self.planned_jobs.counters(req.job_id).num_retractions += 1
            self.step_recorder.num_retracted += 1
            self.planned_window.add(req)
        elif req.is_ready:  # preempted
            self.planned_window.add(req)
        elif req.to_finish is not None:  # its grammar does not compile
            self.planned_window.remove([req])
            self._abort_waiting([req])
        else:
            req.is_ready = True
            self._hold_stops(req)

    def _check_live(self, req: Any) -> None:
        """Refuse a live request that would end the engine."""
        fault = live_sampling.fault(req, self.model_config.vocab_size)
        if fault is not None:
            req.set_finish_with_abort(fault)
            live_sampling.make_harmless(req, self.tokenizer)

    def _finish_planned(self, req: PlannedReq) -> JobCounters:
        counters = self.planned_jobs.finish(req)
        self._settled = None
        if not isinstance(req.finished_reason, FINISH_ABORT):
            self.output_lengths.finish(req.output, len(req.output_ids))
            counters.prediction.add(req.output, len(req.output_ids))
        self._forget_ended(req.job_id)
        return counters
