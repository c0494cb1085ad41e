"""What a simulated run came to: counts as they were taken, and every ratio derived from them here.

Knows: counts, seconds and the trace of one run. Must not know: schedulers, cost models.
Invariant: a ratio is computed in one place, from the counts; of nothing it is 0.0, never an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchllm.scheduler.output_length import PredictionError
from batchllm.trace import StepTrace
from batchllm.trace.table import aligned


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimResult:
    """The result of one simulated run, all times in seconds of the simulated device.

    Attributes:
        scheduler: Which scheduler ran.
        num_requests: Rows, all answered.
        num_prompt_tokens: Tokens of all prompts.
        num_computed_prompt_tokens: Prompt tokens computed, again if their KV was lost; the others were read.
        num_optimal_prompt_tokens: The fewest that any schedule computes, whole pages shared.
        num_output_tokens: Tokens generated.
        num_retractions: Times a running request lost its KV.
        lower_bound_s: Seconds that no schedule on this device can beat.
        predictions: Learned output lengths against true ones.
        trace: The steps.
    """

    scheduler: str
    num_requests: int
    num_prompt_tokens: int
    num_computed_prompt_tokens: int
    num_optimal_prompt_tokens: int
    num_output_tokens: int
    num_retractions: int
    lower_bound_s: float
    predictions: PredictionError
    trace: StepTrace

    @property
    def elapsed_s(self) -> float:
        """From the first step to the end of the last."""
        return self.trace.elapsed_s

    @property
    def saving(self) -> float:
        """Part of the prompt tokens that was not computed; below 0 where retractions computed more than there are."""
        return 1.0 - self.num_computed_prompt_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def optimal_saving(self) -> float:
        """The most that `saving` could have been."""
        return 1.0 - self.num_optimal_prompt_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def requests_per_s(self) -> float:
        """Requests over the time of the run."""
        return _ratio(self.num_requests, self.elapsed_s)

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens over the time of the run."""
        return _ratio(self.num_output_tokens, self.elapsed_s)

    @property
    def retraction_share(self) -> float:
        """Retractions a request."""
        return _ratio(self.num_retractions, self.num_requests)

    @property
    def bound_ratio(self) -> float:
        """The lower bound over the time of the run, 0 to 1: 1 could not be faster."""
        return _ratio(self.lower_bound_s, self.elapsed_s)

    @property
    def prediction_error(self) -> float:
        """Mean distance of a predicted output length from the true one, over the mean true one."""
        return _ratio(self.predictions.sum_absolute_error, self.predictions.num_actual_tokens)

    @property
    def prediction_bias(self) -> float:
        """Predicted output tokens over true ones, less 1: above 0 they were taken too long."""
        predicted, actual = self.predictions.num_predicted_tokens, self.predictions.num_actual_tokens
        return predicted / actual - 1.0 if actual else 0.0

    def to_dict(self) -> dict[str, str | int | float]:
        """All counts and ratios by name, in the order of the table, and the trace summed up as ``trace_...``."""
        return {
            "label": self.trace.label,
            "scheduler": self.scheduler,
            "num_requests": self.num_requests,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_computed_prompt_tokens": self.num_computed_prompt_tokens,
            "num_optimal_prompt_tokens": self.num_optimal_prompt_tokens,
            "saving": self.saving,
            "optimal_saving": self.optimal_saving,
            "num_output_tokens": self.num_output_tokens,
            "elapsed_s": self.elapsed_s,
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "lower_bound_s": self.lower_bound_s,
            "bound_ratio": self.bound_ratio,
            "num_retractions": self.num_retractions,
            "retraction_share": self.retraction_share,
            "num_predicted_requests": self.predictions.num_requests,
            "prediction_error": self.prediction_error,
            "prediction_bias": self.prediction_bias,
            **{f"trace_{name}": value for name, value in self.trace.summary().items()},
        }

    def render(self) -> str:
        """The result as an aligned table for a terminal, without a final newline."""
        rows = [
            ("scheduler", self.scheduler, self.trace.label),
            ("requests", f"{self.num_requests:,}", ""),
            ("prompt tokens", f"{self.num_prompt_tokens:,}", ""),
            ("  computed", f"{self.num_computed_prompt_tokens:,}", f"saving {self.saving:.1%}"),
            ("  optimum", f"{self.num_optimal_prompt_tokens:,}", f"saving {self.optimal_saving:.1%}"),
            ("output tokens", f"{self.num_output_tokens:,}", ""),
            ("elapsed", f"{self.elapsed_s:,.2f} s", f"{self.trace.num_steps:,} steps"),
            ("  lower bound", f"{self.lower_bound_s:,.2f} s", f"{self.bound_ratio:.1%} of the time"),
            ("requests/s", f"{self.requests_per_s:,.2f}", ""),
            ("KV in use", f"{self.trace.mean_occupancy:.1%}", self._occupancy()),
            ("retractions", f"{self.num_retractions:,}", ""),
        ]
        if self.predictions.num_requests:
            rows.append(
                (
                    "output lengths",
                    f"{self.prediction_bias:+.1%}",
                    f"bias; off by {self.prediction_error:.1%} a request",
                )
            )
        return aligned(rows)

    def _occupancy(self) -> str:
        return f"of {self.trace.kv_limit_tokens:,}; {self.trace.saturated_occupancy:.1%} while work waited"


def _ratio(count: float, total: float) -> float:
    return count / total if total > 0 else 0.0
