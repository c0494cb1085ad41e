"""The KV of everything that has been admitted, from columns of counts: what it occupies and how long it will grow.

Knows: counts of tokens, expected output lengths. Must not know: engines, requests, how KV is stored.
Invariant: the runtime, the simulator and the tests of the policy use the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchllm.scheduler.admission import RunningKv
from batchllm.scheduler.output_length import EstimateColumns, Estimates, OutputLengths
from batchllm.scheduler.token_batching import decode_lag
from batchllm.tokens import Int64Array


@dataclass(frozen=True, slots=True)
class PromptInPieces:
    """The prompt that is computed over several steps: the last of the columns of `project`.

    Attributes:
        prefill_len: Tokens that it must have KV for before it decodes.
        led_tokens: Of these, tokens of planned prefixes that it still computes. The prefix cache will own them.
        chunk_tokens: Tokens of a full step.
        is_mixed: Whether decoding rows are part of the steps that compute it.
    """

    prefill_len: int
    led_tokens: int
    chunk_tokens: int
    is_mixed: bool


def project(
    lengths: OutputLengths,
    estimates: Estimates,
    *,
    prompt_len: Sequence[int] | Int64Array,
    num_generated: Sequence[int] | Int64Array,
    stored_len: Sequence[int] | Int64Array,
    shared_len: Sequence[int] | Int64Array,
    longest_total_len: int,
    page_size: int,
    release_lag: int = 0,
    in_pieces: PromptInPieces | None = None,
    fixed_remaining: Sequence[int] | None = None,
) -> RunningKv:
    """Compute what each admitted request owns, and the decode steps until it is expected to finish.

    Args:
        lengths: Expected output lengths; brought up to date first.
        estimates: What is known of the output length of each. [num_running]
        prompt_len: Tokens of each prompt. [num_running]
        num_generated: Tokens of each output that are known. [num_running]
        stored_len: Tokens of each that have a slot. [num_running]
        shared_len: Of these, tokens in slots that the prefix cache owns. [num_running]
        longest_total_len: Most slots that the longest of them may ever occupy, 0 without one.
        page_size: Tokens of a page; slots are owned in whole pages.
        release_lag: Steps for which the KV of a request that has ended stays taken.
        in_pieces: The last request, where its prompt is not yet complete.
        fixed_remaining: Decode steps left of requests outside any plan, -1 for planned ones. None: all are planned.
    """
    generated = np.asarray(num_generated, np.int64)
    columns = estimates if isinstance(estimates, EstimateColumns) else EstimateColumns.of(estimates)
    lengths.refresh(columns, generated)
    expected = lengths.expected_lens(columns, generated)
    stored = np.array(stored_len, np.int64)
    shared = np.array(shared_len, np.int64)
    lag = np.full(len(stored), release_lag, np.int64)
    if in_pieces is not None:
        num_left = in_pieces.prefill_len - int(stored[-1])
        lag[-1] += decode_lag(num_left, in_pieces.chunk_tokens, is_mixed=in_pieces.is_mixed)
        stored[-1] = in_pieces.prefill_len
        shared[-1] += in_pieces.led_tokens
    # By what is stored: what has been generated may be known a step late. The last token is never stored.
    remaining = np.array(prompt_len, np.int64) + expected - 1 - stored
    if fixed_remaining is not None:
        fixed = np.array(fixed_remaining, np.int64)
        remaining = np.where(fixed >= 0, fixed, remaining)
    return RunningKv(
        -(-stored // page_size) * page_size - shared,
        np.maximum(remaining, 0) + lag,
        (expected < columns.max_new_len) & (columns.known_len == 0),
        longest_total_len,
    )
