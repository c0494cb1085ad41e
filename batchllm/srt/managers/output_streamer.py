"""Finished planned requests leave the scheduler in bulk; nothing of theirs leaves before. Runs in the scheduler's
process.

(Upstream: ``srt/managers/scheduler_components/output_streamer.py``, which also sends every 50 tokens of a
request that is not streamed.)
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_MATCHED_TOKEN
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from batchllm.scheduler.counters import JobCounters
from batchllm.srt.constrained.grammars import explain_abort
from batchllm.srt.managers.io_struct import PlannedBatchOutput
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.managers.scoring import label_logprobs, prompt_scores

NUM_CONTEXT_TOKENS = 5
"""Prompt tokens that the detokenizer sees before the output, so that the text continues the prompt.

The same number as ``INIT_INCREMENTAL_DETOKENIZATION_OFFSET`` upstream.
"""


@dataclass(kw_only=True, slots=True)
class BatchOutputStreamer(SchedulerOutputStreamer):
    """Sends planned requests when they have finished, and everything else as SGLang does."""

    finish_planned: Callable[[PlannedReq], JobCounters]
    """Told of each finished request once; returns its job's counters."""
    take_steps: Callable[[], Any]
    """The steps run since the last call."""

    def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        finished = [
            req
            for req in reqs
            if req.finished_reason is not None
            and isinstance(req, PlannedReq)
            and not req.finished_output
            and req is not skip_req
        ]
        if finished:
            self.send_finished(finished)
        live = [req for req in reqs if not isinstance(req, PlannedReq)]
        if live:
            # A dataclass with slots is rebuilt by the decorator, which breaks the bare super().
            super(BatchOutputStreamer, self).stream_output(live, return_logprob, skip_req)

    def send_finished(self, reqs: list[PlannedReq]) -> None:
        """Send these to the detokenizer, one message per job. Each has a ``finished_reason``."""
        by_job: dict[int, list[PlannedReq]] = defaultdict(list)
        for req in reqs:
            req.finished_output = True
            by_job[req.job_id].append(req)
        for job_id, job_reqs in by_job.items():
            counters = [self.finish_planned(req) for req in job_reqs][-1]
            self.send_to_detokenizer.send_output(
                PlannedBatchOutput(
                    job_id=job_id,
                    positions=[req.position for req in job_reqs],
                    output_ids=[req.output_ids_through_stop for req in job_reqs],
                    context_ids=[req.origin_input_ids[-NUM_CONTEXT_TOKENS:] for req in job_reqs],
                    finish_reasons=[_reason(req) for req in job_reqs],
                    prompt_tokens=[req.num_prompt_tokens for req in job_reqs],
                    cached_tokens=[req.cached_tokens for req in job_reqs],
                    skip_special_tokens=[req.sampling_params.skip_special_tokens for req in job_reqs],
                    spaces_between_special_tokens=[
                        req.sampling_params.spaces_between_special_tokens for req in job_reqs
                    ],
                    no_stop_trim=[req.sampling_params.no_stop_trim for req in job_reqs],
                    logprobs=[_logprobs(req) for req in job_reqs],
                    prompt_scores=[prompt_scores(req) for req in job_reqs],
                    label_logprobs=[label_logprobs(req) for req in job_reqs],
                    embeddings=[_embedding(req) for req in job_reqs],
                    counters=counters,
                    steps=self.take_steps(),
                )
            )


def _reason(req: PlannedReq) -> dict[str, Any]:
    """Why it has finished; ``note`` is there where it has fewer tokens than were asked for."""
    reason = explain_abort(req.finished_reason, has_grammar=req.grammar is not None)
    told: dict[str, Any] = reason.to_json()
    num_tokens = len(req.output_ids_through_stop)
    if isinstance(reason, FINISH_MATCHED_TOKEN) and num_tokens <= req.min_new_len:
        told["note"] = f"the grammar allowed no more than {num_tokens - 1} of at least {req.min_new_len} tokens"
    return told


def _logprobs(req: PlannedReq) -> list[tuple[float, Any, Any]] | None:
    """``(logprob, top_logprobs, top_ids)`` per generated token, or None where none were asked for."""
    if req.num_logprobs < 0:
        return None
    num_tokens = len(req.output_ids_through_stop)
    values = req.logprob.output_token_logprobs_val[:num_tokens]
    if req.num_logprobs == 0:
        return [(value, (), ()) for value in values]
    num = req.num_logprobs
    tops, ids = req.logprob.output_top_logprobs_val, req.logprob.output_top_logprobs_idx
    return [(value, top[:num], top_ids[:num]) for value, top, top_ids in zip(values, tops, ids, strict=False)]


def _embedding(req: PlannedReq) -> array[float] | None:
    """As float32, which is what SGLang's numbers are. A prompt in pieces has one of each piece, and is done last."""
    if req.embedding is None or isinstance(req.finished_reason, FINISH_ABORT):
        return None
    return array("f", req.embedding)
