"""The ledger of planned prefixes: who still needs this one, and is its KV there?

It knows prefixes by number and consumers only by count. It must not know tokens, slots or tensors: the cache
that holds the KV asks it what may be freed.

    planned ──start_computing──> computing ──mark_resident──> resident ──last consumer──> released
       ^                             │
       └──────────abandon────────────┘            (any state ──last consumer──> released)
       └───────────────────────give_up──────────────────────────┘

INVARIANT: a prefix is resident only while its parent is, and has at least as few consumers left as its
parent; what is released never comes back. Consumers of a job that is withdrawn may never come: `release_job`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

NO_PREFIX = -1


class PrefixState(Enum):
    """Where a planned prefix is in its life."""

    PLANNED = "planned"
    COMPUTING = "computing"
    RESIDENT = "resident"


@dataclass(slots=True)
class _Prefix:
    parent_id: int
    start_len: int
    end_len: int
    num_consumers_left: int
    longest_consumer_len: int
    end_order: tuple[int, int]
    state: PrefixState


@dataclass(frozen=True, slots=True)
class Lookup:
    """What of a path of prefixes is there.

    Attributes:
        resident_id: Deepest resident prefix of the path, or `NO_PREFIX`.
        resident_len: Tokens whose KV is resident, from the start of the prompt.
        is_computing: True when any of ``missing_ids`` is being computed: its consumers wait for it.
        missing_ids: Prefixes of the path that are not resident, outermost first. Whoever runs first computes
            them.
    """

    resident_id: int
    resident_len: int
    is_computing: bool
    missing_ids: tuple[int, ...]


class PinLedger:
    """State and remaining consumers of every planned prefix that is not yet released.

    A consumer is counted off when it finishes or is aborted, not when it is admitted, so that a retracted
    request still finds its prefix. Released prefixes are forgotten: the ledger holds what is open, not the
    whole job.
    """

    def __init__(self) -> None:
        self._prefixes: dict[int, _Prefix] = {}
        # Computing or resident: few, so that a decision may look at all of them.
        self._open: dict[int, _Prefix] = {}
        self._num_pinned_tokens = 0
        self._num_open_tokens = 0

    def __contains__(self, prefix_id: int) -> bool:
        return prefix_id in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def num_pinned_tokens(self) -> int:
        """KV tokens of all resident prefixes, each counted once."""
        return self._num_pinned_tokens

    @property
    def num_open_tokens(self) -> int:
        """KV tokens of all prefixes that are computing or resident, each counted once."""
        return self._num_open_tokens

    @property
    def num_open(self) -> int:
        """Prefixes that are computing or resident."""
        return len(self._open)

    @property
    def longest_open_consumer_len(self) -> int:
        """KV slots of the longest consumer of any prefix that is computing or resident, 0 without one."""
        return max((prefix.longest_consumer_len for prefix in self._open.values()), default=0)

    def add(
        self,
        prefix_id: int,
        *,
        parent_id: int,
        start_len: int,
        end_len: int,
        num_consumers: int,
        longest_consumer_len: int,
        end_order: tuple[int, int],
    ) -> None:
        """Make a planned prefix known. Its parent must be known already.

        Args:
            prefix_id: Its number, new to this ledger.
            parent_id: The prefix that it continues, or `NO_PREFIX`.
            start_len: Length in tokens of the parent, 0 without one.
            end_len: Length in tokens from the start of the prompt.
            num_consumers: Requests that will read it.
            longest_consumer_len: Most KV slots that one of them occupies, prompt and output.
            end_order: Place in the plan right behind the last of them (their job, its position).

        Raises:
            ValueError: The arguments contradict each other or what is known.
        """
        if prefix_id in self._prefixes or prefix_id < 0:
            raise ValueError(f"prefix {prefix_id} is already known or negative")
        parent_end = 0
        if parent_id != NO_PREFIX:
            if parent_id not in self._prefixes:
                raise ValueError(f"prefix {prefix_id}: its parent {parent_id} is not known")
            parent_end = self._prefixes[parent_id].end_len
            if self._prefixes[parent_id].num_consumers_left < num_consumers:
                raise ValueError(f"prefix {prefix_id}: {num_consumers} consumers, more than its parent has left")
        if start_len != parent_end or end_len <= start_len or num_consumers < 1:
            raise ValueError(
                f"prefix {prefix_id}: [{start_len}, {end_len}) with {num_consumers} consumers "
                f"does not continue a parent of {parent_end} tokens"
            )
        self._prefixes[prefix_id] = _Prefix(
            parent_id, start_len, end_len, num_consumers, longest_consumer_len, end_order, PrefixState.PLANNED
        )

    def state(self, prefix_id: int) -> PrefixState:
        """State of a prefix that is not released."""
        return self._prefixes[prefix_id].state

    def end_len(self, prefix_id: int) -> int:
        """Tokens from the start of the prompt to the end of this prefix."""
        return self._prefixes[prefix_id].end_len

    def num_tokens(self, prefix_id: int) -> int:
        """Tokens of this prefix without its parent."""
        prefix = self._prefixes[prefix_id]
        return prefix.end_len - prefix.start_len

    def longest_consumer_len(self, prefix_id: int) -> int:
        """Most KV slots that one consumer of this prefix occupies, prompt and output."""
        return self._prefixes[prefix_id].longest_consumer_len

    def end_order(self, prefix_id: int) -> tuple[int, int]:
        """Place in the plan right behind the last consumer of this prefix."""
        return self._prefixes[prefix_id].end_order

    def is_computing(self, prefix_id: int) -> bool:
        """True from the admission of its leader until its KV is there."""
        return self._prefixes[prefix_id].state is PrefixState.COMPUTING

    def num_consumers_left(self, prefix_id: int) -> int:
        """Requests that have not finished with this prefix."""
        return self._prefixes[prefix_id].num_consumers_left

    def path(self, prefix_id: int) -> list[int]:
        """This prefix and its ancestors, deepest first; empty for `NO_PREFIX`."""
        path = []
        while prefix_id != NO_PREFIX:
            path.append(prefix_id)
            prefix_id = self._prefixes[prefix_id].parent_id
        return path

    def lookup(self, prefix_id: int) -> Lookup:
        """What of the path to ``prefix_id`` is there now. O(depth) at most, O(1) when all of it is."""
        missing: list[int] = []
        is_computing = False
        while prefix_id != NO_PREFIX:
            prefix = self._prefixes[prefix_id]
            if prefix.state is PrefixState.RESIDENT:
                missing.reverse()
                return Lookup(prefix_id, prefix.end_len, is_computing, tuple(missing))
            is_computing = is_computing or prefix.state is PrefixState.COMPUTING
            missing.append(prefix_id)
            prefix_id = prefix.parent_id
        missing.reverse()
        return Lookup(NO_PREFIX, 0, is_computing, tuple(missing))

    def start_computing(self, prefix_id: int) -> None:
        """Its leader has been admitted: nobody else may compute it."""
        self._move(prefix_id, PrefixState.PLANNED, PrefixState.COMPUTING)
        self._open[prefix_id] = self._prefixes[prefix_id]
        self._num_open_tokens += self.num_tokens(prefix_id)

    def mark_resident(self, prefix_id: int) -> None:
        """Its KV is in the cache and pinned (or is written by the step about to run)."""
        parent_id = self._prefixes[prefix_id].parent_id
        if parent_id != NO_PREFIX and self.state(parent_id) is not PrefixState.RESIDENT:
            raise ValueError(f"prefix {prefix_id} cannot be resident before its parent {parent_id}")
        self._move(prefix_id, PrefixState.COMPUTING, PrefixState.RESIDENT)
        self._num_pinned_tokens += self.num_tokens(prefix_id)

    def abandon(self, prefix_id: int) -> None:
        """Its leader is gone before it was complete: the next consumer leads."""
        self._move(prefix_id, PrefixState.COMPUTING, PrefixState.PLANNED)
        del self._open[prefix_id]
        self._num_open_tokens -= self.num_tokens(prefix_id)

    def give_up(self, prefix_id: int) -> None:
        """Its KV is needed for something else: the next consumer leads. Children go before their parents."""
        if not self.may_give_up(prefix_id):
            raise ValueError(f"prefix {prefix_id} cannot be given up before what continues it")
        self._move(prefix_id, PrefixState.RESIDENT, PrefixState.PLANNED)
        del self._open[prefix_id]
        self._num_open_tokens -= self.num_tokens(prefix_id)
        self._num_pinned_tokens -= self.num_tokens(prefix_id)

    def may_give_up(self, prefix_id: int) -> bool:
        """Whether nothing that is open continues this prefix."""
        return all(prefix.parent_id != prefix_id for prefix in self._open.values())

    def release_job(self, job_id: int) -> list[int]:
        """No consumer of this job's prefixes is left or will come: release them, whatever was announced.

        Returns:
            Those whose KV is resident, deepest first: unpin them now.
        """
        released = [prefix_id for prefix_id, prefix in self._prefixes.items() if prefix.end_order[0] == job_id]
        # A prefix becomes known after its parent.
        released.reverse()
        return [prefix_id for prefix_id in released if self._release(prefix_id)]

    def finish_consumer(self, prefix_id: int) -> list[int]:
        """Count off one consumer of ``prefix_id`` and of all its ancestors.

        Returns:
            The prefixes that this released and whose KV is resident, deepest first: unpin and free them now.
        """
        to_free = []
        while prefix_id != NO_PREFIX:
            prefix = self._prefixes[prefix_id]
            prefix.num_consumers_left -= 1
            if prefix.num_consumers_left == 0 and self._release(prefix_id):
                to_free.append(prefix_id)
            prefix_id = prefix.parent_id
        return to_free

    def _release(self, prefix_id: int) -> bool:
        """Forget a prefix; whether its KV was resident."""
        prefix = self._prefixes.pop(prefix_id)
        num_tokens = prefix.end_len - prefix.start_len
        if self._open.pop(prefix_id, None) is not None:
            self._num_open_tokens -= num_tokens
        if prefix.state is not PrefixState.RESIDENT:
            return False
        self._num_pinned_tokens -= num_tokens
        return True

    def clear(self) -> None:
        """Forget everything (the cache has been flushed)."""
        self._prefixes.clear()
        self._open.clear()
        self._num_pinned_tokens = 0
        self._num_open_tokens = 0

    def check_integrity(self) -> None:
        """State every invariant.

        Raises:
            AssertionError: Naming the prefix that breaks one.
        """
        pinned = 0
        for prefix_id, prefix in self._prefixes.items():
            assert prefix.num_consumers_left >= 1, f"prefix {prefix_id} outlived its consumers"
            assert prefix.start_len < prefix.end_len, f"prefix {prefix_id} is empty"
            if prefix.state is PrefixState.RESIDENT:
                pinned += prefix.end_len - prefix.start_len
            if prefix.parent_id == NO_PREFIX:
                assert prefix.start_len == 0, f"prefix {prefix_id} starts in the air"
                continue
            parent = self._prefixes.get(prefix.parent_id)
            assert parent is not None, f"prefix {prefix_id} outlived its parent"
            assert parent.end_len == prefix.start_len, f"prefix {prefix_id} leaves a gap"
            assert parent.num_consumers_left >= prefix.num_consumers_left, (
                f"prefix {prefix_id} has more consumers than its parent"
            )
            if prefix.state is PrefixState.RESIDENT:
                assert parent.state is PrefixState.RESIDENT, f"prefix {prefix_id} is resident, its parent is not"
        assert pinned == self._num_pinned_tokens, f"{self._num_pinned_tokens} pinned, not {pinned}"
        is_open = {i for i, p in self._prefixes.items() if p.state is not PrefixState.PLANNED}
        assert is_open == set(self._open), f"open prefixes {set(self._open)}, not {is_open}"
        num_open = sum(p.end_len - p.start_len for p in self._open.values())
        assert num_open == self._num_open_tokens, f"{self._num_open_tokens} open, not {num_open}"

    def _move(self, prefix_id: int, before: PrefixState, after: PrefixState) -> None:
        prefix = self._prefixes[prefix_id]
        if prefix.state is not before:
            raise ValueError(
                f"prefix {prefix_id} is {prefix.state.value}, not {before.value}: cannot become {after.value}"
            )
        prefix.state = after
