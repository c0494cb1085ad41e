"""Live and planned requests that wait for the same memory take turns."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.scheduler.turns import Turns


def test_live_requests_go_first() -> None:
    assert not Turns().is_planned


def test_planned_requests_get_a_quarter_of_the_tokens() -> None:
    """Where each turn takes as much as the other."""
    turns, taken = Turns(), {False: 0, True: 0}
    for _ in range(400):
        is_planned = turns.is_planned
        taken[is_planned] += 100
        turns.add(0 if is_planned else 100, 100 if is_planned else 0)
    assert taken == {False: 300 * 100, True: 100 * 100}


@given(st.floats(1 / 8, 0.9))
def test_planned_requests_get_the_share_that_is_asked_for(share: float) -> None:
    """A quarter at least."""
    turns, taken = Turns(), {False: 0, True: 0}
    turns.give_planned(share)
    for _ in range(4000):
        is_planned = turns.is_planned
        taken[is_planned] += 100
        turns.add(0 if is_planned else 100, 100 if is_planned else 0)
    assert abs(taken[True] / 400_000 - max(share, 0.25)) < 0.01


def test_what_planned_requests_got_beside_live_ones_does_not_add_up() -> None:
    """A job that has long found room beside live requests is behind again as soon as they take it all."""
    turns = Turns()
    for _ in range(100):
        turns.add(10, 50)
    num_steps = 0
    while not turns.is_planned:
        turns.add(50, 0)
        num_steps += 1
    assert num_steps == 4


def test_a_turn_in_vain_ends() -> None:
    """Of either kind, whatever it has had before."""
    turns = Turns()
    turns.add(100, 1000)
    for is_planned in (False, True, False, True):
        for _ in range(64):
            assert turns.is_planned is is_planned
            turns.wait()


def test_who_waits_alone_owes_nothing() -> None:
    turns = Turns()
    turns.add(100, 0)
    turns.reset()
    assert not turns.is_planned


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=200))
@settings(deadline=None)
def test_neither_goes_first_for_ever(steps: list[tuple[int, int]]) -> None:
    """Whatever has happened: where both want all they can get, each has its turn within a bounded number of steps."""
    turns = Turns()
    for num_live, num_planned in steps:
        turns.add(num_live, num_planned)
    waited = {False: 0, True: 0}
    for _ in range(2000):
        is_planned = turns.is_planned
        waited[is_planned] = 0
        waited[not is_planned] += 1
        assert max(waited.values()) <= 1501
        turns.add(0 if is_planned else 1, 1 if is_planned else 0)
