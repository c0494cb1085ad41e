"""How much a step carries: the hazards of mixing prefill with decoding rows, one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.scheduler.token_batching import decode_lag, is_worth_a_pass, prefill_budget


def _budget(chunk: int = 800, decoding: int = 0, free: int = 10_000, *, is_mixed: bool = True, page: int = 1) -> int:
    return prefill_budget(
        chunk_tokens=chunk, num_decoding=decoding, kv_free_tokens=free, is_mixed=is_mixed, page_size=page
    )


def test_decoding_rows_come_off_the_chunk_of_a_mixed_step() -> None:
    assert _budget(800, 300) == 500
    assert _budget(800, 300, is_mixed=False) == 800


@pytest.mark.parametrize("decoding", [700, 800, 801, 5000])
def test_prefill_is_never_starved_by_decoding_rows_that_fill_the_chunk(decoding: int) -> None:
    assert _budget(800, decoding) == 100


def test_decoding_rows_find_their_slots_first() -> None:
    """The step is not mixed where they would not: nobody else checks that before the slots are allocated."""
    assert _budget(800, 300, free=350) == 50
    assert _budget(800, 300, free=300) == 0
    assert _budget(800, 300, free=0) == 0


def test_with_pages_a_decoding_row_may_need_a_whole_one() -> None:
    assert _budget(800, 10, free=10 * 16 + 16 + 15, page=16) == 16
    assert _budget(800, 10, free=10 * 16 + 15, page=16) == 0


@given(st.integers(1, 4000), st.integers(0, 4000), st.integers(0, 9000), st.booleans(), st.sampled_from([1, 4, 16]))
def test_a_budget_is_nothing_or_at_least_a_page_and_never_more_than_there_is(
    chunk: int, decoding: int, free: int, is_mixed: bool, page: int
) -> None:
    budget = _budget(chunk, decoding, free, is_mixed=is_mixed, page=page)
    assert budget == 0 or budget >= page
    assert budget + (decoding * page if is_mixed and budget else 0) <= free


def test_a_prompt_in_pieces_falls_behind_at_most_as_if_each_step_carried_the_least() -> None:
    assert decode_lag(1000, 800, is_mixed=True) == 10
    assert decode_lag(0, 800, is_mixed=True) == 0
    assert decode_lag(1000, 800, is_mixed=False) == 0
    assert decode_lag(5, 1, is_mixed=True) == 5


def test_the_more_rows_wait_and_the_shorter_outputs_are_the_more_start_at_a_time() -> None:
    assert is_worth_a_pass(20, 100, 50)
    assert not is_worth_a_pass(19, 100, 50)
    assert not is_worth_a_pass(20, 100, 40)
    assert is_worth_a_pass(20, 90, 50)
    assert is_worth_a_pass(1, 0, 0)
