"""Messages of a planned batch between engine, scheduler and detokenizer, in bulk.
(SGLang's own: ``srt/managers/io_struct.py``.)

They travel by pickle, SGLang's default for this wire.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.io_struct import BaseReq

from batchllm.request import Completion, PromptScore, SamplingParams, TokenLogprob
from batchllm.scheduler.counters import JobCounters

PLANNED_ID = "\0batchllm:"
"""Begins the ids of planned requests, and no other's."""
INVALID_GRAMMAR = "invalid_grammar"
"""A grammar does not compile, or cannot be followed with this model's tokens."""
INVALID_SAMPLING = "invalid_sampling"
"""SGLang refuses sampling parameters that passed our checks."""
UNLOADED_ADAPTER = "unknown_adapter"
"""An adapter was unloaded before the request came to the scheduler."""
ROW_FAULTS = frozenset({INVALID_GRAMMAR, INVALID_SAMPLING, UNLOADED_ADAPTER})
"""``err_type`` of a finish reason where the request is at fault: codes of its row."""


class PlannedRunReqInput(BaseReq):
    """Driver to scheduler: the next requests of a job, in plan order.

    Attributes:
        job_id: Number of the job; later jobs have larger numbers.
        run: A `batchllm.planner.planner.PlannedRun`.
        sampling: Distinct sampling parameters of the run, as keyword arguments of SGLang's
            ``SamplingParams``.
        sampling_index: Which of ``sampling`` each request uses.
        seeds: Sampling seed of each request.
        num_logprobs: -1 for no log probabilities, else how many alternatives beside the chosen token.
        require_reasoning: Whether the output begins with reasoning, for each of ``sampling``.
        lora_paths: Name of the adapter of each of ``sampling``, None for the base model.
        lora_ids: SGLang's identifiers of those; None also for one that is not loaded any more.
        extra_keys: Cache namespace of each request, or None where all are in the default one.
        num_prompt_logprobs: Of each of ``sampling`` -1 where the prompt is not scored, else how many alternatives
            beside each token that is.
        targets: Of each request the token behind its prompt that is scored with it, -1 for none; None where none has
            one.
        label_ids: Of each of ``sampling`` the tokens whose log probabilities behind the prompt are wanted.
        dimensions: Of each of ``sampling`` the numbers of the vector that is wanted, None for all; itself None where
            the model generates.
    """

    job_id: int
    run: Any
    sampling: list[dict[str, Any]]
    sampling_index: Any
    seeds: Any
    num_logprobs: Any
    require_reasoning: list[bool]
    lora_paths: list[str | None]
    lora_ids: list[str | None]
    extra_keys: list[str | None] | None = None
    num_prompt_logprobs: list[int] | None = None
    targets: list[int] | None = None
    label_ids: list[list[int]] | None = None
    dimensions: list[int | None] | None = None


class PlannedAbortReqInput(BaseReq):
    """Driver to scheduler: drop what is left of a job. Each of its requests is answered as aborted.

    Attributes:
        job_id: The job.
        spares_running: Only those that have not started.
    """

    job_id: int
    spares_running: bool = False


class PlannedCloseReqInput(BaseReq):
    """Driver to scheduler: every request of the job has been answered; forget it."""

    job_id: int


class PlannedShareReqInput(BaseReq):
    """Driver to scheduler: what planned requests are to have beside live ones.

    Attributes:
        share: Part of what the two compete for, above 0 and below 1; at least what they have anyhow.
    """

    share: float


class PlannedBatchOutput(BaseReq):
    """Scheduler to detokenizer to driver: requests that have finished, column by column.

    Attributes:
        job_id: The job.
        positions: Plan positions.
        output_ids: Generated token ids of each, a matched stop token included.
        context_ids: Last prompt tokens of each: what the text continues.
        finish_reasons: ``to_json()`` of SGLang's finish reason of each.
        prompt_tokens: Prompt length of each.
        cached_tokens: Prompt tokens of each read from the cache.
        skip_special_tokens: One for each request, like the next two.
        logprobs: None, or per request ``(logprob, top_logprobs, top_ids)`` of every generated token.
        prompt_scores: None, or per request the first token with a score, in front of which stands its last unscored
            one, then token ids, log probabilities, and alternatives of those tokens, ``(top_logprobs, top_ids)``.
        label_logprobs: None, or per request the log probabilities of its label tokens.
        embeddings: Of each request the vector, None where the model generates.
        counters: The job's counters after these.
        steps: `batchllm.trace.STEP_DTYPE` of the steps since the last message, ``start_s`` on the monotonic clock.
        texts: Filled in by the detokenizer.
    """

    job_id: int
    positions: list[int]
    output_ids: list[Any]
    context_ids: list[Any]
    finish_reasons: list[dict[str, Any]]
    prompt_tokens: list[int]
    cached_tokens: list[int]
    skip_special_tokens: list[bool]
    spaces_between_special_tokens: list[bool]
    no_stop_trim: list[bool]
    logprobs: list[Any]
    prompt_scores: list[Any]
    label_logprobs: list[list[float] | None]
    embeddings: list[array[float] | None]
    counters: JobCounters
    steps: Any
    texts: list[str] | None = None


def sampling_kwargs(params: SamplingParams) -> dict[str, Any]:
    """Keyword arguments of SGLang's ``SamplingParams``."""
    return {
        "max_new_tokens": params.max_new_tokens,
        "min_new_tokens": params.min_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "repetition_penalty": params.repetition_penalty,
        "stop": list(params.stop) or None,
        "stop_token_ids": set(params.stop_token_ids) or None,
        "ignore_eos": params.ignore_eos,
        "json_schema": params.json_schema,
        "regex": params.regex,
        "ebnf": params.ebnf,
        "structural_tag": params.structural_tag,
        "logit_bias": {str(token_id): bias for token_id, bias in params.logit_bias} or None,
        "stop_regex": list(params.stop_regex) or None,
        "no_stop_trim": params.no_stop_trim,
        "skip_special_tokens": params.skip_special_tokens,
        "spaces_between_special_tokens": params.spaces_between_special_tokens,
    }


def completions_of(output: PlannedBatchOutput) -> list[Completion]:
    """What a message says of each request that has finished; ``index`` and ``sample`` are still 0."""
    texts = output.texts if output.texts is not None else [""] * len(output.positions)
    completions = []
    for i, reason in enumerate(output.finish_reasons):
        completions.append(
            Completion(
                index=0,
                text=texts[i],
                output_ids=output.output_ids[i],
                finish_reason=reason["type"],
                prompt_tokens=output.prompt_tokens[i],
                cached_tokens=output.cached_tokens[i],
                matched_stop=reason.get("matched"),
                logprobs=_token_logprobs(output.logprobs[i], output.output_ids[i]),
                error=reason.get("message"),
                error_code=reason["err_type"] if reason.get("err_type") in ROW_FAULTS else None,
                note=reason.get("note"),
                prompt_score=_prompt_score(output.prompt_scores[i]),
                label_logprobs=output.label_logprobs[i],
                embedding=output.embeddings[i],
            )
        )
    return completions


def _prompt_score(scores: Any) -> PromptScore | None:
    if scores is None:
        return None
    start, token_ids, logprobs, (top_logprobs, top_ids) = scores
    top = [tuple(zip(ids, values, strict=True)) for ids, values in zip(top_ids, top_logprobs, strict=True)]
    return PromptScore(start=start, token_ids=token_ids, logprobs=logprobs, top=top)


def _token_logprobs(logprobs: Any, output_ids: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None:
        return None
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            top=tuple(zip(top_ids, top_logprobs, strict=True)),
        )
        for token_id, (logprob, top_logprobs, top_ids) in zip(output_ids, logprobs, strict=True)
    )
