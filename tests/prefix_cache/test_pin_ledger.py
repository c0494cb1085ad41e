"""The ledger never loses count of a prefix, never reopens one, and never lets a child outlive its parent."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from batchllm.prefix_cache import PinLedger, PrefixState
from batchllm.prefix_cache.pin_ledger import NO_PREFIX, Lookup
from tests.sizes import sized


def _add(
    ledger: PinLedger,
    prefix_id: int,
    parent_id: int = NO_PREFIX,
    *,
    num_tokens: int = 4,
    num_consumers: int = 2,
    longest_consumer_len: int = 100,
) -> None:
    start_len = 0 if parent_id == NO_PREFIX else ledger.end_len(parent_id)
    ledger.add(
        prefix_id,
        parent_id=parent_id,
        start_len=start_len,
        end_len=start_len + num_tokens,
        num_consumers=num_consumers,
        longest_consumer_len=longest_consumer_len,
        end_order=(0, prefix_id),
    )


def _open(ledger: PinLedger, *prefix_ids: int) -> None:
    for prefix_id in prefix_ids:
        ledger.start_computing(prefix_id)
        ledger.mark_resident(prefix_id)


def _chain() -> PinLedger:
    """0 (4 tokens, 3 consumers) > 1 (2 tokens, 2 consumers) > 2 (1 token, 1 consumer)."""
    ledger = PinLedger()
    _add(ledger, 0, num_tokens=4, num_consumers=3)
    _add(ledger, 1, 0, num_tokens=2, num_consumers=2)
    _add(ledger, 2, 1, num_tokens=1, num_consumers=1)
    return ledger


def test_a_new_prefix_is_planned_and_as_long_as_it_was_said_to_be() -> None:
    ledger = _chain()
    assert [ledger.state(i) for i in range(3)] == [PrefixState.PLANNED] * 3
    assert [ledger.end_len(i) for i in range(3)] == [4, 6, 7]
    assert [ledger.num_tokens(i) for i in range(3)] == [4, 2, 1]
    assert [ledger.num_consumers_left(i) for i in range(3)] == [3, 2, 1]
    assert len(ledger) == 3


def test_path_names_a_prefix_and_its_ancestors_deepest_first() -> None:
    ledger = _chain()
    assert ledger.path(2) == [2, 1, 0]
    assert ledger.path(NO_PREFIX) == []


def test_lookup_of_no_prefix_finds_nothing_and_misses_nothing() -> None:
    assert PinLedger().lookup(NO_PREFIX) == Lookup(NO_PREFIX, 0, False, ())


def test_lookup_names_what_is_missing_outermost_first() -> None:
    assert _chain().lookup(2) == Lookup(NO_PREFIX, 0, False, (0, 1, 2))


def test_lookup_stops_at_the_deepest_resident_prefix() -> None:
    ledger = _chain()
    _open(ledger, 0, 1)
    assert ledger.lookup(2) == Lookup(1, 6, False, (2,))


def test_lookup_tells_that_a_missing_prefix_is_being_computed() -> None:
    ledger = _chain()
    _open(ledger, 0)
    ledger.start_computing(1)
    assert ledger.lookup(2) == Lookup(0, 4, True, (1, 2))


def test_lookup_of_a_resident_prefix_does_not_wait_for_a_deeper_one() -> None:
    ledger = _chain()
    _open(ledger, 0)
    ledger.start_computing(1)
    assert ledger.lookup(0) == Lookup(0, 4, False, ())


def test_pinned_tokens_are_those_of_resident_prefixes_and_open_ones_those_being_computed_too() -> None:
    ledger = _chain()
    ledger.start_computing(0)
    ledger.start_computing(1)
    assert (ledger.num_pinned_tokens, ledger.num_open_tokens) == (0, 6)
    ledger.mark_resident(0)
    assert (ledger.num_pinned_tokens, ledger.num_open_tokens) == (4, 6)
    ledger.abandon(1)
    assert (ledger.num_pinned_tokens, ledger.num_open_tokens) == (4, 4)


def test_longest_open_consumer_is_of_open_prefixes_only() -> None:
    ledger = PinLedger()
    for prefix_id, length in enumerate((30, 90, 50)):
        _add(ledger, prefix_id, longest_consumer_len=length, num_consumers=1)
    assert ledger.longest_open_consumer_len == 0
    ledger.start_computing(0)
    _open(ledger, 2)
    assert ledger.longest_open_consumer_len == 50
    ledger.finish_consumer(2)
    assert ledger.longest_open_consumer_len == 30
    assert ledger.longest_consumer_len(1) == 90


def test_the_last_consumer_frees_resident_prefixes_deepest_first() -> None:
    ledger = PinLedger()
    _add(ledger, 7, num_consumers=1)
    _add(ledger, 3, 7, num_consumers=1)
    _add(ledger, 5, 3, num_consumers=1)
    _open(ledger, 7, 3, 5)
    assert ledger.finish_consumer(5) == [5, 3, 7]
    assert len(ledger) == 0


def test_a_prefix_stays_until_its_last_consumer_has_finished() -> None:
    ledger = _chain()
    _open(ledger, 0, 1, 2)
    assert ledger.finish_consumer(2) == [2]
    assert ledger.finish_consumer(0) == []
    assert ledger.finish_consumer(1) == [1, 0]


@pytest.mark.parametrize("is_computing", [False, True])
def test_a_released_prefix_without_kv_is_forgotten_but_not_to_be_freed(is_computing: bool) -> None:
    ledger = PinLedger()
    _add(ledger, 0, num_consumers=1)
    if is_computing:
        ledger.start_computing(0)
    assert ledger.finish_consumer(0) == []
    assert 0 not in ledger
    assert (ledger.num_pinned_tokens, ledger.num_open_tokens) == (0, 0)
    ledger.check_integrity()


def test_a_released_prefix_never_comes_back() -> None:
    ledger = PinLedger()
    _add(ledger, 0, num_consumers=1)
    _open(ledger, 0)
    ledger.finish_consumer(0)
    for move in (ledger.start_computing, ledger.mark_resident, ledger.abandon, ledger.finish_consumer):
        with pytest.raises(KeyError):
            move(0)
    assert 0 not in ledger
    assert ledger.num_pinned_tokens == 0


def test_resident_before_its_parent_raises() -> None:
    ledger = _chain()
    ledger.start_computing(0)
    ledger.start_computing(1)
    with pytest.raises(ValueError, match="prefix 1 cannot be resident before its parent 0"):
        ledger.mark_resident(1)
    ledger.check_integrity()


def test_what_is_not_being_computed_cannot_become_resident_nor_be_abandoned() -> None:
    ledger = _chain()
    with pytest.raises(ValueError, match="is planned, not computing"):
        ledger.mark_resident(0)
    with pytest.raises(ValueError, match="is planned, not computing"):
        ledger.abandon(0)
    _open(ledger, 0)
    with pytest.raises(ValueError, match="is resident, not computing"):
        ledger.abandon(0)
    ledger.check_integrity()


def test_nothing_is_computed_twice() -> None:
    ledger = _chain()
    ledger.start_computing(0)
    with pytest.raises(ValueError, match="is computing, not planned"):
        ledger.start_computing(0)
    ledger.mark_resident(0)
    with pytest.raises(ValueError, match="is resident, not planned"):
        ledger.start_computing(0)
    assert ledger.num_open_tokens == 4


def test_an_abandoned_prefix_may_be_computed_by_the_next_consumer() -> None:
    ledger = _chain()
    ledger.start_computing(0)
    ledger.abandon(0)
    _open(ledger, 0)
    assert ledger.state(0) is PrefixState.RESIDENT


@pytest.mark.parametrize(
    ("prefix_id", "parent_id", "start_len", "end_len", "num_consumers"),
    [
        pytest.param(0, NO_PREFIX, 0, 4, 2, id="known already"),
        pytest.param(-2, NO_PREFIX, 0, 4, 2, id="negative"),
        pytest.param(3, 9, 0, 4, 2, id="unknown parent"),
        pytest.param(3, NO_PREFIX, 1, 4, 2, id="starts in the air"),
        pytest.param(3, 0, 3, 6, 2, id="overlaps its parent"),
        pytest.param(3, 0, 5, 6, 2, id="leaves a gap"),
        pytest.param(3, 0, 4, 4, 2, id="no tokens"),
        pytest.param(3, 0, 4, 6, 0, id="no consumers"),
        pytest.param(3, 0, 4, 6, 4, id="more consumers than its parent"),
    ],
)
def test_a_prefix_that_contradicts_what_is_known_raises(
    prefix_id: int, parent_id: int, start_len: int, end_len: int, num_consumers: int
) -> None:
    ledger = _chain()
    with pytest.raises(ValueError, match=f"prefix {prefix_id}"):
        ledger.add(
            prefix_id,
            parent_id=parent_id,
            start_len=start_len,
            end_len=end_len,
            num_consumers=num_consumers,
            longest_consumer_len=9,
            end_order=(0, prefix_id),
        )
    ledger.check_integrity()


def test_a_prefix_that_is_given_up_may_be_computed_by_the_next_consumer() -> None:
    ledger = _chain()
    _open(ledger, 0)
    ledger.give_up(0)
    assert (ledger.state(0), ledger.num_pinned_tokens, ledger.num_open_tokens) == (PrefixState.PLANNED, 0, 0)
    assert ledger.num_consumers_left(0) == 3
    ledger.start_computing(0)


def test_what_continues_a_prefix_is_given_up_before_it() -> None:
    ledger = _chain()
    _open(ledger, 0, 1)
    assert (ledger.may_give_up(0), ledger.may_give_up(1)) == (False, True)
    with pytest.raises(ValueError, match="before what continues it"):
        ledger.give_up(0)
    ledger.give_up(1)
    ledger.give_up(0)


def test_a_job_is_released_with_all_its_prefixes_and_no_other_job_s() -> None:
    """Whatever consumers were announced; resident ones are named, deepest first."""
    ledger = _chain()
    ledger.add(
        7, parent_id=NO_PREFIX, start_len=0, end_len=3, num_consumers=2, longest_consumer_len=9, end_order=(1, 2)
    )
    _open(ledger, 0, 1, 7)
    ledger.start_computing(2)
    assert ledger.release_job(0) == [1, 0]
    assert (len(ledger), ledger.num_open, ledger.num_pinned_tokens, ledger.num_open_tokens) == (1, 1, 3, 3)
    assert ledger.release_job(0) == []


def test_clear_forgets_everything() -> None:
    ledger = _chain()
    _open(ledger, 0)
    ledger.start_computing(1)
    ledger.clear()
    assert len(ledger) == 0
    assert (ledger.num_pinned_tokens, ledger.num_open_tokens, ledger.longest_open_consumer_len) == (0, 0, 0)
    ledger.check_integrity()


@dataclass
class _Model:
    """A prefix as one would write it down: who has not finished is counted anew each time."""

    parent_id: int
    start_len: int
    end_len: int
    longest_consumer_len: int
    job_id: int
    state: PrefixState = PrefixState.PLANNED


class LedgerMachine(RuleBasedStateMachine):
    """Any order of moves, legal or not, on random forests: the ledger agrees with a naive model.

    Consumers are listed by the prefix that they name; a prefix lives as long as one names it or a descendant.
    """

    prefixes = Bundle("prefixes")
    consumers = Bundle("consumers")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PinLedger()
        self.model: dict[int, _Model] = {}
        self.unfinished: list[int] = []
        self.num_added = 0

    def path(self, prefix_id: int) -> list[int]:
        path = []
        while prefix_id != NO_PREFIX:
            path.append(prefix_id)
            prefix_id = self.model[prefix_id].parent_id
        return path

    def num_left(self, prefix_id: int) -> int:
        return sum(prefix_id in self.path(named) for named in self.unfinished)

    @rule(
        target=consumers,
        lens=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        data=st.data(),
    )
    def add_tree(self, lens: list[int], data: st.DataObject) -> object:
        """A whole tree at once, as a plan has it: a parent's consumers include its children's."""
        first = self.num_added
        self.num_added += len(lens)
        ids = range(first, self.num_added)
        parents = [NO_PREFIX] + [data.draw(st.integers(first, i - 1)) for i in ids[1:]]
        # Every leaf is named at least once, so that no prefix is without consumers.
        named = [i for i in ids if i not in parents] + data.draw(st.lists(st.sampled_from(ids), max_size=4))
        for prefix_id, parent_id, num_tokens in zip(ids, parents, lens, strict=True):
            start_len = 0 if parent_id == NO_PREFIX else self.model[parent_id].end_len
            longest = data.draw(st.integers(1, 99))
            self.model[prefix_id] = _Model(parent_id, start_len, start_len + num_tokens, longest, job_id=first)
        self.unfinished += named
        for prefix_id in ids:
            prefix = self.model[prefix_id]
            self.ledger.add(
                prefix_id,
                parent_id=prefix.parent_id,
                start_len=prefix.start_len,
                end_len=prefix.end_len,
                num_consumers=self.num_left(prefix_id),
                longest_consumer_len=prefix.longest_consumer_len,
                end_order=(prefix.job_id, prefix_id),
            )
        return multiple(*named)

    def move(self, name: str, prefix_id: int, is_legal: bool, after: PrefixState) -> None:
        """Do it where it is legal, and see it refused without a trace where it is not."""
        if prefix_id not in self.model:
            with pytest.raises(KeyError):
                getattr(self.ledger, name)(prefix_id)
        elif is_legal:
            getattr(self.ledger, name)(prefix_id)
            self.model[prefix_id].state = after
        else:
            with pytest.raises(ValueError):
                getattr(self.ledger, name)(prefix_id)

    def any_prefix(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, self.num_added))  # the last one is not known yet

    def state(self, prefix_id: int) -> PrefixState | None:
        return self.model[prefix_id].state if prefix_id in self.model else None

    @rule(data=st.data())
    def start_computing(self, data: st.DataObject) -> None:
        prefix_id = self.any_prefix(data)
        is_legal = self.state(prefix_id) is PrefixState.PLANNED
        self.move("start_computing", prefix_id, is_legal, PrefixState.COMPUTING)

    @rule(data=st.data())
    def mark_resident(self, data: st.DataObject) -> None:
        prefix_id = self.any_prefix(data)
        is_legal = self.state(prefix_id) is PrefixState.COMPUTING
        if is_legal:
            parent_id = self.model[prefix_id].parent_id
            is_legal = parent_id == NO_PREFIX or self.model[parent_id].state is PrefixState.RESIDENT
        self.move("mark_resident", prefix_id, is_legal, PrefixState.RESIDENT)

    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        prefix_id = self.any_prefix(data)
        is_legal = self.state(prefix_id) is PrefixState.COMPUTING
        self.move("abandon", prefix_id, is_legal, PrefixState.PLANNED)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        prefix_id = self.any_prefix(data)
        is_legal = self.state(prefix_id) is PrefixState.RESIDENT and all(
            prefix.parent_id != prefix_id or prefix.state is PrefixState.PLANNED for prefix in self.model.values()
        )
        self.move("give_up", prefix_id, is_legal, PrefixState.PLANNED)

    @rule(data=st.data())
    def release_job(self, data: st.DataObject) -> None:
        """Whoever has not finished never will."""
        job_id = data.draw(st.integers(0, self.num_added))
        released = [i for i, prefix in self.model.items() if prefix.job_id == job_id]
        was_resident = [i for i in reversed(released) if self.model[i].state is PrefixState.RESIDENT]
        assert self.ledger.release_job(job_id) == was_resident
        self.unfinished = [named for named in self.unfinished if named not in released]
        for prefix_id in released:
            del self.model[prefix_id]

    @rule(named=consumers)
    def compute_path(self, named: int) -> None:
        """What a leader does: all that is missing and not being computed, at once."""
        if named not in self.model:
            return
        for prefix_id in reversed(self.path(named)):
            prefix = self.model[prefix_id]
            if prefix.state is PrefixState.PLANNED:
                self.ledger.start_computing(prefix_id)
            if prefix.state is not PrefixState.RESIDENT:
                self.ledger.mark_resident(prefix_id)
            prefix.state = PrefixState.RESIDENT

    @rule(named=consumes(consumers))
    def finish_consumer(self, named: int) -> None:
        if named not in self.model:
            return
        path = self.path(named)
        self.unfinished.remove(named)
        released = [i for i in path if self.num_left(i) == 0]
        was_resident = [i for i in released if self.model[i].state is PrefixState.RESIDENT]
        assert self.ledger.finish_consumer(named) == was_resident
        for prefix_id in released:
            del self.model[prefix_id]

    @invariant()
    def is_sound(self) -> None:
        self.ledger.check_integrity()

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert len(self.ledger) == len(self.model)
        num_pinned = num_open = longest = 0
        for prefix_id, prefix in self.model.items():
            num_tokens = prefix.end_len - prefix.start_len
            assert prefix_id in self.ledger
            assert self.ledger.state(prefix_id) is prefix.state
            assert self.ledger.num_tokens(prefix_id) == num_tokens
            assert self.ledger.num_consumers_left(prefix_id) == self.num_left(prefix_id)
            if prefix.state is not PrefixState.PLANNED:
                num_open += num_tokens
                longest = max(longest, prefix.longest_consumer_len)
            if prefix.state is PrefixState.RESIDENT:
                num_pinned += num_tokens
        assert self.ledger.num_pinned_tokens == num_pinned
        assert self.ledger.num_open_tokens == num_open
        assert self.ledger.longest_open_consumer_len == longest

    @invariant()
    def lookup_agrees_with_the_model(self) -> None:
        for prefix_id in self.model:
            path = self.path(prefix_id)
            assert self.ledger.path(prefix_id) == path
            resident = [i for i in path if self.model[i].state is PrefixState.RESIDENT]
            missing = [i for i in reversed(path) if i not in resident]
            assert self.ledger.lookup(prefix_id) == Lookup(
                resident[0] if resident else NO_PREFIX,
                self.model[resident[0]].end_len if resident else 0,
                any(self.model[i].state is PrefixState.COMPUTING for i in missing),
                tuple(missing),
            )


LedgerMachine.TestCase.settings = settings(
    max_examples=sized(40, 80), stateful_step_count=30, deadline=None, database=None
)
TestLedgerMachine = LedgerMachine.TestCase
