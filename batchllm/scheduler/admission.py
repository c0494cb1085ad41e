"""May this request start now? Arithmetic of KV slots, in whole pages."""

from __future__ import annotations

from dataclasses import dataclass

from batchllm.prefix_cache import PinLedger
from batchllm.scheduler.view import WaitingRequest


def page_ceil(num_tokens: int, page_size: int) -> int:
    """Slots that ``num_tokens`` occupy."""
    return -(-num_tokens // page_size) * page_size


def reusable_len(resident_len: int, prefill_len: int, page_size: int) -> int:
    """Tokens that a request can read from a resident prefix: whole pages, and never its last token.

    The last token must be computed even by an exact duplicate, since sampling needs its logits.
    """
    return min(resident_len, prefill_len - 1) // page_size * page_size


def kv_need(request: WaitingRequest, cached_len: int, page_size: int) -> int:
    """Slots to set aside so that the request can run to its end without being retracted."""
    return page_ceil(request.total_len, page_size) - cached_len


def footprint(total_len: int, page_size: int) -> int:
    """Most slots that a request of ``total_len`` tokens occupies together with the prefixes that it reads.

    One page more than its own: an exact duplicate of a prefix computes the last page again, while the pinned
    prefix keeps its copy.
    """
    return page_ceil(total_len, page_size) + page_size


def max_total_len(kv_capacity_tokens: int, page_size: int) -> int:
    """The longest request, prompt and output, whose `footprint` fits the pool; at most 0 if none does."""
    return (kv_capacity_tokens - page_size) // page_size * page_size


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
        longest_behind: int,
        kv_capacity_tokens: int,
        page_size: int,
    ) -> bool:
        """May these be opened ahead of requests that come earlier in the plan?

        A pinned prefix stays until its last consumer has finished, so opening one out of order takes memory
        from the requests left behind. Once all that runs has finished, each of them in its turn must fit
        beside everything that is open; then the head of the plan always makes progress, whatever was opened.

        Args:
            prefix_ids: Prefixes to open, none of them open yet, outermost first.
            ledger: Their sizes.
            longest_behind: KV slots of the longest request left behind.
            kv_capacity_tokens: Slots of the pool; at least the `footprint` of every request.
            page_size: Tokens of a page.
        """
        num_opened = sum(ledger.num_tokens(prefix_id) for prefix_id in prefix_ids)
        # Requests still to come under a prefix are not all in the window yet: the prefix knows its longest.
        longest = max(
            longest_behind,
            self.longest_consumer_len,
            ledger.longest_consumer_len(prefix_ids[0]),
        )
        return self.num_tokens + num_opened + footprint(longest, page_size) <= kv_capacity_tokens
