"""What a decision may see: live state, by reference, read only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from batchllm.prefix_cache import PinLedger
from batchllm.scheduler.admission import RunningKv
from batchllm.scheduler.output_length import OutputEstimate, OutputLengths


class WaitingRequest(Protocol):
    """A planned request that has no KV of its own yet (or lost it by retraction)."""

    @property
    def plan_order(self) -> tuple[int, int]:
        """Its job and its position in the job's plan."""

    @property
    def prefix_id(self) -> int:
        """Deepest planned prefix that it consumes, or ``NO_PREFIX``."""

    @property
    def prefill_len(self) -> int:
        """Tokens it must have KV for before it decodes: its prompt, plus what a retracted one had generated."""

    @property
    def share_len(self) -> int:
        """Tokens at its start that it may share, the last of which it computes: all, or those before its scores."""

    @property
    def num_generated(self) -> int:
        """Tokens that it had generated before it was retracted, 0 for a new one."""

    @property
    def lora_id(self) -> str | None:
        """The adapter that answers it; None for the base model."""

    @property
    def output(self) -> OutputEstimate:
        """What is known of its output length."""

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
        lengths: What outputs are expected.
        running: KV of everything that has been admitted and has not finished.
        kv_limit_tokens: Slots that may be in use at once, at least the `admission.footprint` of every request.
        kv_shared_tokens: Slots in use beside what ``running`` owns: pinned prefixes, those being computed, and what
            requests outside the plan hold on to.
        num_free_slots: Further requests that may run at once.
        num_step_tokens: Prefill tokens that this step may still carry.
        chunk_tokens: Tokens of a full step.
        can_chunk: True when a prompt may be cut at the end of the step (one at a time may be in pieces).
        is_mixed: True when a step carries decoding rows beside prefill; else prefill makes them wait a step.
        page_size: KV is shared and allocated in pages of this many tokens.
        release_lag: Steps for which the KV of a request that has ended stays taken: 1 where a step starts before the
            results of the one before it are there, else 0.
        lora_ids: Adapters of everything that runs, None for the base model among them.
        max_lora_ids: Most of these that planned requests may run with at once; None where there are no adapters.
    """

    waiting: Sequence[WaitingRequest]
    ledger: PinLedger
    lengths: OutputLengths
    running: RunningKv
    kv_limit_tokens: int
    kv_shared_tokens: int
    num_free_slots: int
    num_step_tokens: int
    chunk_tokens: int
    can_chunk: bool
    is_mixed: bool
    page_size: int = 1
    release_lag: int = 0
    lora_ids: frozenset[str | None] = frozenset()
    max_lora_ids: int | None = None
