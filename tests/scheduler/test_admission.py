"""Arithmetic of KV slots in whole pages, and what may be opened ahead of its turn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.prefix_cache import PinLedger
from batchllm.prefix_cache.pin_ledger import NO_PREFIX
from batchllm.scheduler.admission import KvProjection, OpenPrefixes, RunningKv, reusable_len
from batchllm.tokens import page_ceil
from tests.sizes import sized


def _running(private_len: list[int], remaining_len: list[int], *, is_guess: bool = False) -> RunningKv:
    guesses = np.full(len(private_len), is_guess)
    return RunningKv(np.array(private_len, np.int64), np.array(remaining_len, np.int64), guesses)


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
@settings(deadline=None, max_examples=sized(50, 100), database=None)
def test_what_is_read_is_the_longest_that_is_there_in_whole_pages(
    resident_len: int, prefill_len: int, page_size: int
) -> None:
    candidates = range(min(resident_len, prefill_len - 1) + 1)
    longest = max(n for n in candidates if n % page_size == 0)
    assert reusable_len(resident_len, prefill_len, page_size) == longest


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
            end_order=(0, 2),
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
    for limit, may in ((needed, True), (needed - 1, False)):
        assert may is already.may_add(
            prefix_ids, ledger, longest_beside=longest_behind, any_behind=True, kv_limit_tokens=limit, page_size=1
        )


def test_in_plan_order_a_prefix_needs_room_for_what_runs_and_not_for_its_consumers_to_come() -> None:
    ledger = _ledger()
    fits = {"any_behind": False, "page_size": 1}
    assert OpenPrefixes(0, 0).may_add((0,), ledger, longest_beside=0, kv_limit_tokens=10, **fits)
    assert OpenPrefixes(0, 0).may_add((0,), ledger, longest_beside=70, kv_limit_tokens=81, **fits)
    assert not OpenPrefixes(0, 0).may_add((0,), ledger, longest_beside=70, kv_limit_tokens=80, **fits)


_RUNNING = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def _peak(requests: list[tuple[int, int]]) -> int:
    """Step by step: each takes a slot a step, and frees all of its own when it ends."""
    last = max((remaining for _, remaining in requests), default=0)
    return max(sum(private + t for private, remaining in requests if remaining >= t) for t in range(last + 1))


@given(_RUNNING, _RUNNING, st.integers(0, 40), st.integers(-2, 2))
@settings(deadline=None, max_examples=sized(100, 300), database=None)
def test_a_request_fits_exactly_if_the_simulated_peak_does(
    running: list[tuple[int, int]], more: list[tuple[int, int]], shared: int, spare: int
) -> None:
    """Whether those beside it were there from the start or have been added since."""
    kv = _running([r[0] for r in running], [r[1] for r in running])
    projection = KvProjection(kv, shared, page_size=1)
    admitted = list(running)
    for private, remaining in more:
        limit = shared + 3 + _peak([*admitted, (private, remaining)]) + spare
        assert projection.fits(private, remaining, False, 3, limit) is (spare >= 0)
        projection.add(private, remaining, False, 3)
        admitted.append((private, remaining))
        shared += 3


def test_guessed_lengths_leave_room_for_being_wrong_and_known_ones_do_not() -> None:
    known = KvProjection(_running([10] * 100, [10] * 100), 0, 1)
    guessed = KvProjection(_running([10] * 100, [10] * 100, is_guess=True), 0, 1)
    assert known.fits(10, 10, False, 0, 2020)
    assert not guessed.fits(10, 10, True, 0, 2020)
    assert guessed.fits(10, 10, True, 0, 2020 + 10 * 11)  # a standard deviation of their sum is 10 * sqrt(101)
