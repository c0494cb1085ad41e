"""A running SGLang with our parts, as a `batchllm.offline.runtime.Runtime`, whoever started it. Runs in the engine's or
the server's process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo
from batchllm.request import Completion, PromptScore, SamplingParams, TokenLogprob
from batchllm.srt.managers.chat_tokenizer import ChatTokenizer
from batchllm.srt.managers.io_struct import (
    ROW_FAULTS,
    PlannedAbortReqInput,
    PlannedBatchOutput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
)
from batchllm.srt.server_args import kv_limit_tokens


class ManagedRuntime:
    """What runs behind a tokenizer manager. Its loop is the only one on which jobs may be opened, fed and received.

    Args:
        manager: A `BatchTokenizerManager`.
        template_manager: SGLang's, with the chat template.
        server_args: SGLang's arguments that it was started with.
        init_info: What the scheduler said when it had started.
    """

    def __init__(self, manager: Any, template_manager: Any, server_args: Any, init_info: dict[str, Any]) -> None:
        self._manager = manager
        self._tokenizer = None if manager.tokenizer is None else ChatTokenizer(manager, template_manager)
        self._job_ids = count()
        self._info = RuntimeInfo(
            model_name=server_args.served_model_name,
            context_len=manager.context_len,
            vocab_size=manager.model_config.vocab_size,
            kv_capacity_tokens=init_info["max_total_num_tokens"],
            kv_limit_tokens=kv_limit_tokens(server_args, init_info["max_total_num_tokens"]),
            # The last token of an answer is never stored.
            num_unstored_tokens=1 if server_args.disable_overlap_schedule else 0,
            page_size=server_args.page_size,
            random_seed=server_args.random_seed,
            has_seeded_sampling=server_args.sampling_backend != "flashinfer",
            has_grammar=server_args.grammar_backend != "none" and not server_args.skip_tokenizer_init,
            has_tokenizer=not server_args.skip_tokenizer_init,
            max_step_tokens=server_args.chunked_prefill_size if (server_args.chunked_prefill_size or 0) > 0 else None,
            max_running=init_info["batchllm"]["max_running"],
            chat_sampling={} if self._tokenizer is None else self._tokenizer.chat_sampling,
            parses_answers=bool(server_args.reasoning_parser or server_args.tool_call_parser),
        )

    @property
    def info(self) -> RuntimeInfo:
        """The engine's numbers, with the adapters that are loaded by now."""
        return replace(self._info, adapters=tuple(self._manager.adapter_ids))

    @property
    def tokenizer(self) -> ChatTokenizer | None:
        return self._tokenizer

    def open_job(self) -> int:
        job_id = next(self._job_ids)
        self._manager.open_job(job_id)
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        num_logprobs = [p.top_logprobs if p.logprobs else -1 for p in requests.sampling]
        index = np.asarray(requests.sampling_index, np.int32)
        adapters = [params.lora_path for params in requests.sampling]
        self._manager.send(
            PlannedRunReqInput(
                job_id=job_id,
                run=requests.run,
                sampling=[_sampling_kwargs(params) for params in requests.sampling],
                sampling_index=index,
                seeds=np.asarray(requests.seeds, np.int64),
                num_logprobs=np.asarray(num_logprobs, np.int32)[index],
                require_reasoning=[params.require_reasoning for params in requests.sampling],
                lora_paths=adapters,
                lora_ids=self._manager.adapters_of_job(job_id, adapters),
                extra_keys=requests.namespaces and [name or None for name in requests.namespaces],
                num_prompt_logprobs=[-1 if p.prompt_logprobs is None else p.prompt_logprobs for p in requests.sampling],
                targets=requests.targets,
            )
        )

    async def receive(self, job_id: int) -> FinishedRequests:
        output = await self._manager.receive_outputs(job_id)
        return FinishedRequests(
            positions=output.positions,
            completions=_completions(output),
            counters=output.counters,
            steps=output.steps,
        )

    def withdraw(self, job_id: int) -> None:
        self._manager.send(PlannedAbortReqInput(job_id=job_id, spares_running=True))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        self._manager.close_job(job_id)
        if not is_complete:
            self._manager.send(PlannedAbortReqInput(job_id=job_id))
        self._manager.send(PlannedCloseReqInput(job_id=job_id))


def _sampling_kwargs(params: SamplingParams) -> dict[str, Any]:
    """As keyword arguments of SGLang's ``SamplingParams``."""
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


def _completions(output: PlannedBatchOutput) -> list[Completion]:
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
