"""What a decision may see: live state, by reference, read only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from batchllm.prefix_cache import PinLedger


class WaitingRequest(Protocol):
    """A planned request that has no KV of its own yet (or lost it by retraction)."""

    @property
    def prefix_id(self) -> int:
        """Deepest planned prefix that it consumes, or ``NO_PREFIX``."""

    @property
    def prefill_len(self) -> int:
        """Tokens it must have KV for before it decodes: its prompt, plus what a retracted one had
        generated.
        """

    @property
    def total_len(self) -> int:
        """Most KV slots it will ever occupy: prompt and longest output."""

    @property
    def is_ready(self) -> bool:
        """False while something outside the plan holds it back (its grammar is being compiled)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerView:
    """State at the start of a step.

    Attributes:
        waiting: The window of planned requests, in plan order.
        ledger: Which planned prefixes are resident, and who still needs them.
        kv_capacity_tokens: Slots of the whole KV pool, at least the `admission.footprint` of every request.
        kv_free_tokens: Slots that are free, or hold KV that nobody planned and nobody runs on.
        kv_growth_tokens: Slots that the requests already admitted may still ask for.
        num_free_slots: Further requests that may run at once.
        num_step_tokens: Prefill tokens that this step may still carry.
        can_chunk: True when a prompt may be cut at the end of the step (one at a time may be in pieces).
        page_size: KV is shared and allocated in pages of this many tokens.
    """

    waiting: Iterable[WaitingRequest]
    ledger: PinLedger
    kv_capacity_tokens: int
    kv_free_tokens: int
    kv_growth_tokens: int
    num_free_slots: int
    num_step_tokens: int
    can_chunk: bool
    page_size: int = 1
