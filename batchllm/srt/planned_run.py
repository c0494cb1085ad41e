"""Runs of a plan, as they arrive in the scheduler, turned into requests."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from sglang.srt.sampling.sampling_params import SamplingParams

from batchllm.prefix_cache.pin_ledger import NO_PREFIX, PinLedger
from batchllm.srt.io_struct import PlannedRunReqInput
from batchllm.srt.schedule_batch import PlannedReq

# Ledger numbers are the job's in the upper and the plan's in the lower bits: unique without a table.
_PREFIX_BITS = 40


class RunReader:
    """Puts each request's tokens together from its prefixes and its private suffix.

    Args:
        ledger: Told of every prefix.
        tokenizer: For stop strings; None without one.
        model_config: SGLang's, of the model that runs.
        num_extra_slots: Slots that a request may need beyond its tokens.
    """

    def __init__(self, ledger: PinLedger, tokenizer: Any, model_config: Any, num_extra_slots: int) -> None:
        self._ledger = ledger
        self._tokenizer = tokenizer
        self._model_config = model_config
        self._num_extra_slots = num_extra_slots
        self._prefix_tokens: dict[int, array[int]] = {}

    def read(self, message: PlannedRunReqInput) -> Iterator[PlannedReq]:
        """The requests of a run, in plan order."""
        job_id, run = message.job_id, message.run
        # What is released is in no request to come.
        self._prefix_tokens = {i: ids for i, ids in self._prefix_tokens.items() if i in self._ledger}
        self._add_prefixes(job_id, run)
        sampling = [self._sampling_params(kwargs) for kwargs in message.sampling]
        private = run.private_tokens.astype(np.int64)
        start = 0
        for i, end in enumerate(np.cumsum(run.private_len).tolist()):
            prefix_id = _prefix_id(job_id, int(run.request_prefix[i]))
            input_ids = array("q", self._prefix_tokens.get(prefix_id, b""))
            input_ids.frombytes(private[start:end].tobytes())
            start = end
            max_new_len = int(run.request_max_new_len[i])
            req = PlannedReq(
                job_id=job_id,
                position=run.first_position + i,
                prefix_id=prefix_id,
                # The last token is never stored.
                total_len=len(input_ids) + max_new_len - 1 + self._num_extra_slots,
                seed=int(message.seeds[i]),
                input_ids=input_ids,
                sampling_params=_with_limit(sampling[message.sampling_index[i]], max_new_len),
                num_logprobs=int(message.num_logprobs[i]),
                eos_token_ids=self._model_config.hf_eos_token_id,
                vocab_size=self._model_config.vocab_size,
                extra_key=None if message.extra_keys is None else message.extra_keys[i],
            )
            req.tokenizer = self._tokenizer
            yield req

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
                longest_consumer_len=int(run.prefix_longest_consumer_len[i]) + self._num_extra_slots,
            )
            end = start + end_len - start_len
            path = array("q", self._prefix_tokens.get(parent_id, b""))
            path.frombytes(tokens[start:end].tobytes())
            self._prefix_tokens[prefix_id] = path
            start = end

    def _sampling_params(self, kwargs: dict[str, Any]) -> SamplingParams:
        params = SamplingParams(**kwargs)
        params.normalize(self._tokenizer)
        params.verify(self._model_config.vocab_size)
        return params


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
