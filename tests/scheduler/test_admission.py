"""Arithmetic of KV slots in whole pages, and what may be opened ahead of its turn."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.prefix_cache import PinLedger
from batchllm.prefix_cache.pin_ledger import NO_PREFIX
from batchllm.scheduler.admission import OpenPrefixes, kv_need, page_ceil, reusable_len


@dataclass(frozen=True)
class _Waiting:
    total_len: int
    prefill_len: int = 1
    prefix_id: int = NO_PREFIX
    is_ready: bool = True


@pytest.mark.parametrize(
    ("num_tokens", "page_size", "slots"), [(0, 16, 0), (1, 16, 16), (16, 16, 16), (17, 16, 32), (7, 1, 7)]
)
def test_tokens_occupy_whole_pages(num_tokens: int, page_size: int, slots: int) -> None:
    assert page_ceil(num_tokens, page_size) == slots


@pytest.mark.parametrize(
    ("resident_len", "prefill_len", "page_size", "reusable"),
    [
        pytest.param(4, 9, 1, 4, id="all of the prefix"),
        pytest.param(9, 9, 1, 8, id="not the last token"),
        pytest.param(0, 9, 1, 0, id="nothing resident"),
        pytest.param(4, 1, 1, 0, id="a prompt of one token"),
        pytest.param(32, 33, 16, 32, id="whole pages"),
        pytest.param(32, 32, 16, 16, id="the page of the last token is computed again"),
        pytest.param(32, 20, 16, 16, id="no piece of a page"),
    ],
)
def test_whole_pages_are_read_and_never_the_last_token(
    resident_len: int, prefill_len: int, page_size: int, reusable: int
) -> None:
    assert reusable_len(resident_len, prefill_len, page_size) == reusable


@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from([1, 4, 16]))
@settings(deadline=None, max_examples=100, database=None)
def test_what_is_read_is_the_longest_that_is_there_in_whole_pages(
    resident_len: int, prefill_len: int, page_size: int
) -> None:
    candidates = range(min(resident_len, prefill_len - 1) + 1)
    longest = max(n for n in candidates if n % page_size == 0)
    assert reusable_len(resident_len, prefill_len, page_size) == longest


def test_need_is_every_page_up_to_the_longest_output_but_those_it_reads() -> None:
    assert kv_need(_Waiting(total_len=40), 0, 16) == 48
    assert kv_need(_Waiting(total_len=40), 32, 16) == 16
    assert kv_need(_Waiting(total_len=40), 32, 1) == 8


def _ledger() -> PinLedger:
    """0: 10 tokens, consumers up to 30; 1: 5 more under 0, up to 20; 2: 8 tokens, up to 50."""
    ledger = PinLedger()
    for prefix_id, parent_id, start_len, end_len, longest in (
        (0, NO_PREFIX, 0, 10, 30),
        (1, 0, 10, 15, 20),
        (2, NO_PREFIX, 0, 8, 50),
    ):
        ledger.add(
            prefix_id,
            parent_id=parent_id,
            start_len=start_len,
            end_len=end_len,
            num_consumers=2,
            longest_consumer_len=longest,
        )
    return ledger


def test_open_prefixes_start_with_what_the_ledger_has_open() -> None:
    ledger = _ledger()
    assert OpenPrefixes.of(ledger) == OpenPrefixes(0, 0)
    ledger.start_computing(0)
    assert OpenPrefixes.of(ledger) == OpenPrefixes(10, 30)


def test_prefixes_opened_in_this_step_count_before_the_ledger_knows() -> None:
    ledger = _ledger()
    opened = OpenPrefixes.of(ledger)
    opened.add((0, 1), ledger)
    assert opened == OpenPrefixes(15, 30)
    opened.add((2,), ledger)
    assert opened == OpenPrefixes(23, 50)
    assert ledger.num_open_tokens == 0


def test_opening_nothing_changes_nothing() -> None:
    opened = OpenPrefixes(3, 4)
    opened.add((), _ledger())
    assert opened == OpenPrefixes(3, 4)


@pytest.mark.parametrize(
    ("already", "prefix_ids", "longest_behind", "needed"),
    [
        pytest.param(OpenPrefixes(0, 0), (0, 1), 12, 16 + 30, id="its own longest consumer"),
        pytest.param(OpenPrefixes(0, 0), (1,), 12, 6 + 20, id="only what is missing of its path"),
        pytest.param(OpenPrefixes(0, 0), (0,), 70, 11 + 70, id="the longest left behind"),
        pytest.param(OpenPrefixes(7, 90), (0,), 70, 18 + 90, id="a consumer of what is open already"),
    ],
)
def test_a_prefix_may_be_opened_early_if_the_longest_request_still_fits_beside_all_that_is_open(
    already: OpenPrefixes, prefix_ids: tuple[int, ...], longest_behind: int, needed: int
) -> None:
    ledger = _ledger()
    assert already.may_add(prefix_ids, ledger, longest_behind, needed, 1)
    assert not already.may_add(prefix_ids, ledger, longest_behind, needed - 1, 1)
