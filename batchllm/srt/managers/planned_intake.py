"""How planned requests come into the scheduler and leave it. Runs in the scheduler's process.

(Upstream: ``srt/managers/scheduler.py``.) Runs of a plan are turned into requests, which wait in a window of their own,
in plan order. Knows jobs, the window, aborts. Must not know which request runs next.

INVARIANT: a planned request is in the window, or compiles its grammar, or holds KV, or has been answered; each is
answered once.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.sampling.sampling_params import SamplingParams

from batchllm.prefix_cache.pin_ledger import NO_PREFIX, PinLedger
from batchllm.request import GRAMMARS, NO_TARGET
from batchllm.scheduler.counters import JobCounters
from batchllm.scheduler.decision import SettledDecision
from batchllm.scheduler.output_length import MIN_FINISHED, OutputEstimate, OutputLengths
from batchllm.scheduler.window import RequestWindow
from batchllm.srt.constrained.grammars import hold_stops
from batchllm.srt.managers.io_struct import (
    INVALID_SAMPLING,
    UNLOADED_ADAPTER,
    PlannedAbortReqInput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
)
from batchllm.srt.managers.planned_jobs import PlannedJobs
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.managers.scoring import Scoring

_GIVEN_UP = "it was taken back before it had finished"

# Ledger numbers are the job's in the upper and the plan's in the lower bits: unique without a table.
_PREFIX_BITS = 40

_MAX_KIND_DEPTH = 2
"""Prefixes this deep in the tree may stand for a kind of request of their own: a system prompt, a task under it."""
_MIN_KIND_CONSUMERS = 4 * MIN_FINISHED


class PlannedIntake:
    """Takes the requests of jobs, and answers each of them once.

    Args:
        scheduler: A `BatchScheduler`.
        runs: Makes requests of what the driver sends.
        settled: Forgets the last decision where something changes.

    Attributes:
        window: Planned requests that have not started.
        jobs: What of each job is still to be answered.
    """

    def __init__(self, scheduler: Any, runs: RunReader, settled: SettledDecision) -> None:
        self._scheduler = scheduler
        self._runs = runs
        self._settled = settled
        self.window: RequestWindow[PlannedReq] = RequestWindow()
        self.jobs = PlannedJobs()

    # In

    def take_run(self, message: PlannedRunReqInput) -> None:
        """Take the next requests of a job into the window."""
        self.jobs.open(message.job_id)
        self._scheduler.shared_prefixes.drop_released()
        for req in self._runs.read(message):
            self._take_in(req)
        self._settled.invalidate()

    def _take_in(self, req: PlannedReq) -> None:
        scheduler = self._scheduler
        self.jobs.add(req)
        if scheduler.enable_priority_scheduling:
            scheduler._set_or_validate_priority(req)
        if req.to_finish is None:
            req.is_ready = not scheduler.grammar_manager.process_req_with_grammar(req)
        if req.to_finish is not None:
            self.abort_waiting([req])
        else:
            self._hold_stops(req)
            self.window.add(req)

    def _hold_stops(self, req: PlannedReq) -> None:
        """A grammar that is there goes on for as long as the request must."""
        if req.is_ready and req.grammar is not None and req.min_new_len:
            ends = {*(req.sampling_params.stop_token_ids or ()), *(req.eos_token_ids or ()), req.tokenizer.eos_token_id}
            ends |= req.tokenizer.additional_stop_token_ids or set()
            known = [i for i in ends if i is not None and i < self._scheduler.model_config.vocab_size]
            hold_stops(req.grammar, known, req.min_new_len)

    def take_back(self, req: PlannedReq, *, is_retracted: bool) -> None:
        """A planned request enters the window again: retracted, preempted, or with its grammar compiled."""
        if req.finished():  # aborted while its grammar was being compiled
            return
        self._settled.invalidate()
        if is_retracted:
            self.jobs.counters(req.job_id).num_retractions += 1
            self._scheduler.step_recorder.num_retracted += 1
            self.window.add(req)
        elif req.is_ready:  # preempted
            self.window.add(req)
        elif req.to_finish is not None:  # its grammar does not compile
            self.window.remove([req])
            self.abort_waiting([req])
        else:
            req.is_ready = True
            self._hold_stops(req)

    # Out

    def abort_job(self, message: PlannedAbortReqInput) -> None:
        """Drop what is left of a job."""
        reqs = self.jobs.unfinished(message.job_id)
        if message.spares_running:
            chunked = self._scheduler.chunked_req
            reqs = [req for req in reqs if req is not chunked and req.req_pool_idx is None]
        self.abort(reqs)

    def close_job(self, message: PlannedCloseReqInput) -> None:
        """Forget a job as soon as every request of it has been answered; none will come."""
        self.jobs.close(message.job_id)
        self._forget_ended(message.job_id)

    def _forget_ended(self, job_id: int) -> None:
        if self.jobs.take_ended(job_id):
            scheduler = self._scheduler
            scheduler.output_lengths.forget(job_id)
            scheduler.tree_cache.release_job(job_id)
            if not self.jobs:
                scheduler.tree_cache.free_withdrawn()
            self._settled.invalidate()

    def abort(self, reqs: list[PlannedReq]) -> None:
        """Drop these, wherever they are."""
        waiting: list[PlannedReq] = []
        for req in reqs:
            if req is self._scheduler.chunked_req:
                self._scheduler._pending_chunked_abort_req = req
            elif req.req_pool_idx is not None:
                req.to_finish = FINISH_ABORT(_GIVEN_UP)  # taken up when its running step is done
            elif req.finished_reason is None:
                req.to_finish = FINISH_ABORT(_GIVEN_UP)
                waiting.append(req)
        if waiting:
            self.window.remove(waiting)
            self.abort_waiting(waiting)

    def abort_waiting(self, reqs: list[PlannedReq]) -> None:
        """Finish requests that hold no KV, without running them. They come back together: there may be thousands."""
        for req in reqs:
            req.finished_reason, req.to_finish = req.to_finish, None
            self._scheduler.tree_cache.count_off(req)
        self._scheduler.output_streamer.send_finished(reqs)

    def finish(self, req: PlannedReq) -> JobCounters:
        """This request has been answered. Returns its job's counters."""
        counters = self.jobs.finish(req)
        self._settled.invalidate()
        if not isinstance(req.finished_reason, FINISH_ABORT):
            self._scheduler.output_lengths.finish(req.output, len(req.output_ids))
            counters.prediction.add(req.output, len(req.output_ids))
        self._forget_ended(req.job_id)
        return counters


class RunReader:
    """Puts each request's tokens together from its prefixes and its private suffix.

    Args:
        ledger: Told of every prefix.
        lengths: Told what kind of output each request will have.
        tokenizer: For stop strings; None without one.
        model_config: SGLang's, of the model that runs.
        learns_lengths: Where False, a request whose output length is not known is expected to reach its limit.
    """

    def __init__(
        self,
        ledger: PinLedger,
        lengths: OutputLengths,
        tokenizer: Any,
        model_config: Any,
        *,
        learns_lengths: bool,
    ) -> None:
        self._ledger = ledger
        self._lengths = lengths
        self._learns_lengths = learns_lengths
        self._tokenizer = tokenizer
        self._model_config = model_config
        self._prefix_tokens: dict[int, array[int]] = {}
        # Per prefix its depth in the tree and the kind of what is under it.
        self._prefix_kind: dict[int, tuple[int, int]] = {}

    def read(self, message: PlannedRunReqInput) -> Iterator[PlannedReq]:
        """The requests of a run, in plan order."""
        job_id, run = message.job_id, message.run
        self._drop_released()
        self._add_prefixes(job_id, run)
        sampling = [self._sampling_params(kwargs) for kwargs in message.sampling]
        for i, (name, lora_id) in enumerate(zip(message.lora_paths, message.lora_ids, strict=True)):
            if name is not None and lora_id is None:
                fault = FINISH_ABORT(f"the adapter {name!r} was unloaded", HTTPStatus.BAD_REQUEST, UNLOADED_ADAPTER)
                sampling[i] = (sampling[i][0], fault)
        private = run.private_tokens.astype(np.int64)
        start = 0
        for i, end in enumerate(np.cumsum(run.private_len).tolist()):
            prefix_id = _prefix_id(job_id, int(run.request_prefix[i]))
            input_ids = array("q", self._prefix_tokens.get(prefix_id, b""))
            input_ids.frombytes(private[start:end].tobytes())
            start = end
            max_new_len = int(run.request_max_new_len[i])
            position = run.first_position + i
            kind = int(message.sampling_index[i])
            params, fault = sampling[kind]
            target = NO_TARGET if message.targets is None else message.targets[i]
            labels = [] if message.label_ids is None else message.label_ids[kind]
            has_no_output = target != NO_TARGET or bool(labels) or message.dimensions is not None
            scoring = None
            if message.num_prompt_logprobs is not None and message.num_prompt_logprobs[kind] >= 0:
                scoring = Scoring(int(run.request_share_len[i]), message.num_prompt_logprobs[kind], target)
            req = PlannedReq(
                job_id=job_id,
                position=position,
                prefix_id=prefix_id,
                # The last token is never stored.
                total_len=len(input_ids) + max_new_len - 1,
                output=OutputEstimate(
                    max_new_len=max_new_len,
                    known_len=int(run.request_known_len[i]) or (0 if self._learns_lengths else max_new_len),
                    kind=self._kind(job_id, int(run.request_task[i]), prefix_id),
                    position=position,
                ),
                seed=int(message.seeds[i]),
                min_new_len=min(message.sampling[kind]["min_new_tokens"], max_new_len),
                input_ids=input_ids,
                sampling_params=_with_limit(params, 0 if has_no_output else max_new_len),
                num_logprobs=int(message.num_logprobs[i]),
                require_reasoning=message.require_reasoning[kind],
                lora_id=message.lora_ids[kind],
                eos_token_ids=self._model_config.hf_eos_token_id,
                vocab_size=self._model_config.vocab_size,
                extra_key=None if message.extra_keys is None else message.extra_keys[i],
                scoring=scoring,
                label_ids=labels,
                dimensions=None if message.dimensions is None else message.dimensions[kind],
            )
            req.tokenizer = self._tokenizer
            req.to_finish = fault
            yield req

    def _drop_released(self) -> None:
        """What is released is in no request to come, and all that read it have finished."""
        released = [i for i in self._prefix_tokens if i not in self._ledger]
        for prefix_id in released:
            del self._prefix_tokens[prefix_id], self._prefix_kind[prefix_id]
        self._lengths.forget(*(("prefix", prefix_id) for prefix_id in released))

    def _add_prefixes(self, job_id: int, run: Any) -> None:
        tokens = run.prefix_tokens.astype(np.int64)
        start = 0
        for i, end_len in enumerate(run.prefix_end_len.tolist()):
            prefix_id = _prefix_id(job_id, run.first_prefix + i)
            parent_id = _prefix_id(job_id, int(run.prefix_parent[i]))
            start_len = int(run.prefix_start_len[i])
            self._ledger.add(
                prefix_id,
                parent_id=parent_id,
                start_len=start_len,
                end_len=end_len,
                num_consumers=int(run.prefix_num_consumers[i]),
                longest_consumer_len=int(run.prefix_longest_consumer_len[i]),
                end_order=(job_id, int(run.prefix_end_position[i])),
            )
            depth, kind = self._prefix_kind.get(parent_id, (0, self._lengths.kind(job_id)))
            if depth < _MAX_KIND_DEPTH and run.prefix_num_consumers[i] >= _MIN_KIND_CONSUMERS:
                kind = self._lengths.kind(("prefix", prefix_id), kind)
            self._prefix_kind[prefix_id] = (depth + 1, kind)
            end = start + end_len - start_len
            path = array("q", self._prefix_tokens.get(parent_id, b""))
            path.frombytes(tokens[start:end].tobytes())
            self._prefix_tokens[prefix_id] = path
            start = end

    def _kind(self, job_id: int, task: int, prefix_id: int) -> int:
        job_kind = self._lengths.kind(job_id)
        if task >= 0:
            return self._lengths.kind(("task", job_id, task), job_kind)
        return self._prefix_kind[prefix_id][1] if prefix_id != NO_PREFIX else job_kind

    def _sampling_params(self, kwargs: dict[str, Any]) -> tuple[SamplingParams, FINISH_ABORT | None]:
        """SGLang's parameters, and what ends the requests that have them, at once: a fault must not end the others."""
        params = SamplingParams(**kwargs)
        if any(getattr(params, name) is not None for name in GRAMMARS):
            params.min_new_tokens = 0  # `grammars.hold_stops` sees to it
        elif params.min_new_tokens and not params.ignore_eos:
            # SGLang forbids only the tokenizer's end meanwhile, and the model may have others.
            ends = [i for i in self._model_config.hf_eos_token_id or () if i < self._model_config.vocab_size]
            params.stop_token_ids = {*(params.stop_token_ids or ()), *ends} or None
        try:
            params.normalize(self._tokenizer)
            params.verify(self._model_config.vocab_size)
        except Exception as error:  # SGLang raises many kinds; the answers say which it was
            params = SamplingParams()
            params.normalize(self._tokenizer)
            return params, FINISH_ABORT(
                f"SGLang refuses its sampling: {error}", HTTPStatus.BAD_REQUEST, INVALID_SAMPLING
            )
        return params, None


def _prefix_id(job_id: int, plan_prefix: int) -> int:
    return NO_PREFIX if plan_prefix < 0 else (job_id << _PREFIX_BITS) + plan_prefix


def _with_limit(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    """The same parameters with this limit; most requests share one object."""
    if params.max_new_tokens == max_new_tokens:
        return params
    params = copy.copy(params)
    params.max_new_tokens = max_new_tokens
    params.min_new_tokens = min(params.min_new_tokens, max_new_tokens)
    return params
