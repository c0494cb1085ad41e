"""What a job has cost, counted where it happens: the one value that goes from the scheduler to the report."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from batchllm.scheduler.output_length import PredictionError


@dataclass(slots=True, kw_only=True)
class JobCounters:
    """Counts of a job so far.

    Attributes:
        num_computed_prompt_tokens: Prompt tokens that went through a forward pass.
        num_retractions: Requests that lost their KV and had to start again.
        num_recomputed_for_live: Tokens computed again since live requests took their KV.
        peak_kv_tokens: Most KV slots in use at the start of any step.
        prediction: How far off expected output lengths were, where they had to be learned.
    """

    num_computed_prompt_tokens: int = 0
    num_retractions: int = 0
    num_recomputed_for_live: int = 0
    peak_kv_tokens: int = 0
    prediction: PredictionError = field(default_factory=PredictionError)

    def __add__(self, other: Self) -> Self:
        """The cost of both; the peak is the higher one."""
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return type(self)(**sums | {"peak_kv_tokens": max(self.peak_kv_tokens, other.peak_kv_tokens)})

    def __sub__(self, before: JobCounters) -> JobCounters:
        """What was counted since; the peak is the one so far."""
        names = [field.name for field in fields(JobCounters)]
        since = {name: getattr(self, name) - getattr(before, name) for name in names}
        return JobCounters(**since | {"peak_kv_tokens": self.peak_kv_tokens})
