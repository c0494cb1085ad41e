"""Live requests whose token ids or sampling the engine cannot hold: SGLang takes them, and ends when it makes tensors
of them, or computes with those. Runs in the scheduler's process.

(Upstream: ``srt/sampling/sampling_batch_info.py``.)
"""

from __future__ import annotations

from typing import Any

from sglang.srt.sampling.sampling_params import SamplingParams as SglangParams

from batchllm.dataset.limits import check_sampling_ids, check_token_ids
from batchllm.dataset.sampling import SGLANG_FIELDS
from batchllm.errors import RowError
from batchllm.request import SamplingParams

_NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("sampling_seed", "logit_bias"),
)


def fault(req: Any, vocab_size: int, max_input_len: int) -> str | None:
    """Why a request would end the engine, or hold up all others; None where it would not.

    Args:
        req: SGLang's, its parameters normalized.
        vocab_size: Token ids of the model are below this.
        max_input_len: Most tokens of a prompt. SGLang lets longer ones wait for ever where they are to be embedded.
    """
    num_tokens = len(req.origin_input_ids)
    if num_tokens > max_input_len:
        return f"the prompt has {num_tokens} tokens, and there is room for {max_input_len}; shorten it"
    if not num_tokens:
        return "the prompt has no tokens; give at least one"
    params = req.sampling_params
    try:
        if req.multimodal_inputs is None:  # what stands for an image has ids beyond the vocabulary
            check_token_ids(req.origin_input_ids, vocab_size)
        for name in _NUMBERS:
            value = getattr(params, name, None)
            if value is not None:
                SGLANG_FIELDS[name].check(name, value)
        if params.min_new_tokens and params.stop_token_ids:  # the scores of these are lowered meanwhile
            check_sampling_ids(SamplingParams(stop_token_ids=tuple(params.stop_token_ids)), vocab_size)
        check_token_ids(req.logprob.token_ids_logprob or (), vocab_size)
    except RowError as error:
        return error.message
    num_wanted = req.logprob.top_logprobs_num
    if num_wanted > vocab_size:
        return f"log probabilities of {num_wanted} tokens are asked for, and the vocabulary has {vocab_size}"
    return None


def make_harmless(req: Any, tokenizer: Any) -> None:
    """Take out of a request what would end the engine: one that is refused runs a step all the same."""
    req.sampling_params = SglangParams(max_new_tokens=1)
    req.sampling_params.normalize(tokenizer)
    req.logprob.top_logprobs_num, req.logprob.token_ids_logprob = 0, None
