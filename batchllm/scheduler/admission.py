"""May this request start now? Arithmetic of KV slots: what is taken today, and at the coming finishes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchllm.prefix_cache import PinLedger
from batchllm.tokens import Int64Array, page_ceil, page_floor

_SAFETY = 1.0
"""Standard deviations of what runs that admission leaves free where output lengths are guesses."""


def reusable_len(resident_len: int, share_len: int, page_size: int) -> int:
    """Tokens that a request can read from a resident prefix: whole pages, and never the last that it may share.

    That one must be computed even by an exact duplicate, since sampling, or the first score, needs its logits.
    """
    return page_floor(min(resident_len, share_len - 1), page_size)


def footprint(total_len: int, page_size: int) -> int:
    """Most slots that a request of ``total_len`` tokens occupies together with the prefixes that it reads.

    One page more than its own: an exact duplicate of a prefix computes the last page again, while the pinned
    prefix keeps its copy.
    """
    return page_ceil(total_len, page_size) + page_size


def max_total_len(kv_limit_tokens: int, page_size: int) -> int:
    """The longest request, prompt and output, whose `footprint` fits; at most 0 if none does."""
    return page_floor(kv_limit_tokens - page_size, page_size)


@dataclass(frozen=True, slots=True)
class RunningKv:
    """KV of the requests that have been admitted, one number each.

    Attributes:
        private_len: Slots that each owns, or will own once its prompt is computed. int64[num_running].
        remaining_len: Decode steps until each is expected to finish, a slot each. int64[num_running].
        is_guess: True where that is learned, not known. bool[num_running].
        longest_total_len: Most slots that the longest of them may ever occupy, 0 without one.
    """

    private_len: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    remaining_len: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    is_guess: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    longest_total_len: int = 0

    def __len__(self) -> int:
        return len(self.private_len)


class KvProjection:
    """The peak of KV over the coming finishes, if nothing more were admitted.

    Every running request takes a slot a step until it finishes and frees all of its own: what is in use rises
    between finishes and falls at each, so the peak is at one of them.

    Args:
        running: What runs.
        shared_tokens: Slots beside theirs, taken to stay.
        page_size: Tokens of a page; up to a page less one is lost at the end of each request.
    """

    def __init__(self, running: RunningKv, shared_tokens: int, page_size: int) -> None:
        order = np.argsort(-running.remaining_len, kind="stable")
        self._remaining = running.remaining_len[order]  # longest first
        self._private = running.private_len[order]
        self._private_total = int(self._private.sum())
        self._end_total = self._private_total + int(self._remaining.sum())
        self._variance = float((self._remaining[running.is_guess[order]].astype(np.float64) ** 2).sum())
        self._at_finish: Int64Array | None = None
        self._late: list[tuple[int, int]] = []  # added and not yet sorted in
        self._page_loss = page_size - 1
        self.shared_tokens = shared_tokens
        self.num_requests = len(running)

    def fits(
        self, private_len: int, remaining_len: int, is_guess: bool, new_shared_tokens: int, limit_tokens: int
    ) -> bool:
        """Would the peak stay within the limit with this request beside the others?"""
        shared = self.shared_tokens + new_shared_tokens
        variance = self._variance + (remaining_len**2 if is_guess else 0)
        room = limit_tokens - shared - self._page_loss * (self.num_requests + 1) - _SAFETY * math.sqrt(variance)
        if self._end_total + private_len + remaining_len <= room:
            return True  # even if none finished
        if self._private_total + private_len > room:
            return False
        return self._peak_with(private_len, remaining_len) <= room

    def add(self, private_len: int, remaining_len: int, is_guess: bool, new_shared_tokens: int) -> None:
        """This request has been admitted too."""
        self._late.append((private_len, remaining_len))
        self._private_total += private_len
        self._end_total += private_len + remaining_len
        self._variance += remaining_len**2 if is_guess else 0
        self.shared_tokens += new_shared_tokens
        self.num_requests += 1
        self._at_finish = None

    def _peak_with(self, private_len: int, remaining_len: int) -> int:
        """Private slots in use just before that finish at which most are."""
        if self._at_finish is None:
            self._sort_in()
        assert self._at_finish is not None
        # Requests that finish after the new one, and those that finish with it or before.
        num_after = int(np.searchsorted(-self._remaining, -remaining_len, "left"))
        own = private_len + remaining_len + num_after * remaining_len + int(self._private[:num_after].sum())
        own = max(own, private_len + remaining_len)
        peak = own
        if num_after:
            peak = max(peak, int(self._at_finish[:num_after].max()))
        if num_after < len(self._remaining):
            with_new = self._at_finish[num_after:] + self._remaining[num_after:]
            peak = max(peak, int(with_new.max()) + private_len)
        return peak

    def _sort_in(self) -> None:
        if self._late:
            private, remaining = np.array(self._late, np.int64).T
            remaining = np.concatenate([self._remaining, remaining])
            order = np.argsort(-remaining, kind="stable")
            self._private = np.concatenate([self._private, private])[order]
            self._remaining = remaining[order]
            self._late.clear()
        alive = np.arange(1, len(self._remaining) + 1)
        self._at_finish = self._private.cumsum() + alive * self._remaining


@dataclass(slots=True)
class OpenPrefixes:
    """What is pinned or about to be: the prefixes open before this step, and those that this step opens."""

    num_tokens: int
    longest_consumer_len: int

    @classmethod
    def of(cls, ledger: PinLedger) -> OpenPrefixes:
        return cls(ledger.num_open_tokens, ledger.longest_open_consumer_len)

    def add(self, prefix_ids: tuple[int, ...], ledger: PinLedger) -> None:
        """Count these as opened. Empty does nothing."""
        for prefix_id in prefix_ids:
            self.num_tokens += ledger.num_tokens(prefix_id)
            self.longest_consumer_len = max(self.longest_consumer_len, ledger.longest_consumer_len(prefix_id))

    def may_add(
        self,
        prefix_ids: tuple[int, ...],
        ledger: PinLedger,
        *,
        longest_beside: int,
        any_behind: bool,
        kv_limit_tokens: int,
        page_size: int,
    ) -> bool:
        """May these be opened beside what runs, and ahead of what earlier requests of the plan still need?

        A pinned prefix stays until its last consumer has finished, so opening one takes memory from whatever
        runs longer than expected, and opening one out of order from the requests left behind. Once all that runs
        has finished or given up its KV, each of them in its turn must fit beside everything that is open; then
        the head of the plan always makes progress, whatever was opened.

        Args:
            prefix_ids: Prefixes to open, none of them open yet, outermost first.
            ledger: Knows the sizes of prefixes.
            longest_beside: KV slots of the longest request that runs or was left behind, 0 without one.
            any_behind: Whether any was left behind.
            kv_limit_tokens: Slots that may be used; at least the `footprint` of every request.
            page_size: Tokens of a page.
        """
        num_opened = sum(ledger.num_tokens(prefix_id) for prefix_id in prefix_ids)
        longest = longest_beside
        if any_behind:
            # Requests still to come under a prefix are not all in the window yet: the prefix knows its longest.
            longest = max(longest, self.longest_consumer_len, ledger.longest_consumer_len(prefix_ids[0]))
        if longest == 0:
            return True
        return self.num_tokens + num_opened + footprint(longest, page_size) <= kv_limit_tokens
