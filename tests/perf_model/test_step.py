"""Counts of a step: what adds up, and what no step can have."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.perf_model import StepWork, prefill_pairs

lens = st.integers(0, 300)


@given(lens, lens)
@settings(deadline=None, database=None)
def test_pairs_are_what_each_prompt_token_attends_to(cached_len: int, num_tokens: int) -> None:
    assert prefill_pairs(cached_len, num_tokens) == sum(cached_len + i for i in range(1, num_tokens + 1))


@given(lens, lens, lens)
@settings(deadline=None, database=None)
def test_pairs_do_not_depend_on_how_a_prompt_is_cut_into_chunks(cached_len: int, first: int, second: int) -> None:
    chunks = prefill_pairs(cached_len, first) + prefill_pairs(cached_len + first, second)
    assert chunks == prefill_pairs(cached_len, first + second)


def test_negative_lengths_have_no_pairs() -> None:
    for lengths in ((-1, 2), (1, -2)):
        with pytest.raises(ValueError, match="must not be negative"):
            prefill_pairs(*lengths)


def test_works_add_up() -> None:
    prefill = StepWork(num_prefill_tokens=10, num_sampled=1, prefill_pairs=55, kv_read_tokens=10)
    decode = StepWork(num_decode_tokens=3, num_sampled=3, decode_kv_tokens=30, kv_read_tokens=20)
    both = prefill + decode
    assert both == StepWork(
        num_prefill_tokens=10,
        num_decode_tokens=3,
        num_sampled=4,
        prefill_pairs=55,
        decode_kv_tokens=30,
        kv_read_tokens=30,
    )
    assert (both.num_tokens, both.num_pairs) == (13, 85)
    assert both + StepWork() == both


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"num_prefill_tokens": -1}, "num_prefill_tokens is -1"),
        ({"num_decode_tokens": 2, "decode_kv_tokens": 2}, "num_sampled is 0, but these counts need at least 2"),
        ({"num_prefill_tokens": 2, "num_sampled": 3, "prefill_pairs": 3}, "num_sampled is 3, more than the 2 tokens"),
        ({"num_prefill_tokens": 2, "prefill_pairs": 1}, "prefill_pairs is 1"),
        ({"num_decode_tokens": 2, "num_sampled": 2, "decode_kv_tokens": 1}, "decode_kv_tokens is 1"),
        ({"kv_read_tokens": -1}, "kv_read_tokens is -1"),
        ({"kv_read_tokens": 1}, "only tokens that are computed"),
        ({"num_prefill_tokens": 1, "prefill_pairs": 1, "decode_kv_tokens": 1}, "only tokens that are computed"),
        ({"prefill_pairs": 1}, "only tokens that are computed"),
    ],
)
def test_counts_that_no_step_can_have_are_refused(counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepWork(**counts)
