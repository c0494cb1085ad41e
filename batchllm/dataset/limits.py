"""What only the running engine can tell of a row: does its prompt fit, are its token ids real?

Pure functions of numbers; knows nothing of tokenizers, engines or files.

INVARIANT: a row that passes all of them can run alone on the engine whose numbers were given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from batchllm.dataset.field_checks import show
from batchllm.errors import RowError
from batchllm.request import SamplingParams


def fit_max_new_tokens(
    sampling: SamplingParams, prompt_len: int, *, context_len: int, kv_capacity: int
) -> SamplingParams:
    """Lowers an output limit that the row did not set itself to what the prompt leaves.

    Only for requests with ``may_lower_max_new_tokens``: a default must not fail a row. Where the
    prompt leaves no room, nothing changes and `check_prompt_len` refuses it.
    """
    room = min(context_len, kv_capacity) - prompt_len
    if room >= sampling.max_new_tokens or room < max(1, sampling.min_new_tokens):
        return sampling
    return dataclasses.replace(sampling, max_new_tokens=room)


def check_prompt_len(prompt_len: int, sampling: SamplingParams, *, context_len: int, kv_capacity: int) -> None:
    """Refuses a prompt that can never be answered in full.

    Args:
        prompt_len: Prompt tokens.
        context_len: Most tokens, prompt and output together, the model takes.
        kv_capacity: Tokens one request alone can hold in the KV pool.

    Raises:
        RowError: ``prompt_too_long`` or ``never_fits_kv_pool``; the message has the numbers.
    """
    num_new = sampling.max_new_tokens
    needed = prompt_len + num_new
    if prompt_len >= context_len:
        raise RowError(
            f"the prompt has {prompt_len} tokens and the context holds {context_len}, prompt and "
            f"output together; shorten the prompt to less than {context_len} tokens",
            code="prompt_too_long",
            param="prompt",
        )
    if needed > context_len:
        raise RowError(
            f"the prompt has {prompt_len} tokens and max_new_tokens is {num_new}: {needed} in "
            f"all, and the context holds {context_len}; lower max_new_tokens to at most "
            f"{context_len - prompt_len} or shorten the prompt",
            code="prompt_too_long",
            param="max_new_tokens",
        )
    if needed > kv_capacity:
        raise RowError(
            f"the row needs up to {needed} tokens of KV ({prompt_len} prompt + {num_new} new) and "
            f"the whole pool holds {kv_capacity}; lower max_new_tokens, shorten the prompt, or "
            "give the KV pool more memory",
            code="never_fits_kv_pool",
            param="prompt" if prompt_len >= kv_capacity else "max_new_tokens",
        )


def check_expected_len(expected_new_tokens: int | None, prompt_len: int, context_len: int) -> None:
    """Refuses a hint that no answer can come true to.

    Raises:
        RowError: ``expected_new_tokens_out_of_range``.
    """
    room = context_len - prompt_len
    if expected_new_tokens is not None and not 1 <= expected_new_tokens <= room:
        raise RowError(
            f"expected_new_tokens is {expected_new_tokens}, and behind a prompt of {prompt_len} tokens the context of "
            f"{context_len} leaves 1 to {room}; correct it or leave it out",
            code="expected_new_tokens_out_of_range",
            param="expected_new_tokens",
        )


def check_sampling_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuses token ids in sampling parameters that the model's vocabulary does not have.

    Raises:
        RowError: ``token_id_out_of_range``, naming the first one.
    """
    if not sampling.stop_token_ids and not sampling.logit_bias and not sampling.label_token_ids:
        return
    biased = [token_id for token_id, _ in sampling.logit_bias]
    given = {
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": biased,
        "label_token_ids": sampling.label_token_ids,
    }
    for name, ids in given.items():
        wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise RowError(
                f"{name} has {wrong} and the vocabulary has ids 0 to {vocab_size - 1}; use the ids of this model's "
                "tokenizer",
                code="token_id_out_of_range",
                param=name,
            )


def check_adapter(adapter: str | None, loaded: Collection[str] | None) -> None:
    """Refuses an adapter that the engine has not loaded: the base model must not answer in its place.

    Args:
        adapter: Name of the adapter; None for the base model.
        loaded: Names of those that are loaded; None where any is taken.

    Raises:
        RowError: ``unknown_adapter``.
    """
    if adapter is None or loaded is None or adapter in loaded:
        return
    names = f"loaded are {', '.join(sorted(loaded))}" if loaded else "none is loaded"
    raise RowError(
        f"the row asks for the adapter {show(adapter)}, and {names}; load it with --lora-paths NAME=FOLDER, or name "
        "the base model (a model called base:name asks for an adapter)",
        code="unknown_adapter",
        param="lora_path",
    )


def check_sampling_texts(sampling: SamplingParams) -> None:
    """Refuses what needs a tokenizer, on an engine that has none.

    Raises:
        RowError: ``tokenizer_needed``, naming the parameter.
    """
    for name in ("stop", "stop_regex", "min_new_tokens"):
        if getattr(sampling, name):
            raise RowError(
                f"{name} needs a tokenizer, and this engine runs without one; drop it, or start the engine without "
                "--skip-tokenizer-init",
                code="tokenizer_needed",
                param=name,
            )


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuses token ids that the model's vocabulary does not have.

    Raises:
        RowError: ``token_id_out_of_range``, naming the first one and its position.
    """
    if len(ids) == 0 or 0 <= min(ids) <= max(ids) < vocab_size:
        return
    at, token_id = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab_size)
    raise RowError(
        f"input_ids[{at}] is {token_id} and the vocabulary has ids 0 to {vocab_size - 1}; "
        "use the ids of this model's tokenizer",
        code="token_id_out_of_range",
        param="input_ids",
    )
