"""What a run did, in numbers: counts as they were taken, and every ratio derived from them here.

Knows no engine, clock or file format but its own JSON; whoever runs the job counts.

INVARIANT: a ratio is computed in one place, from the counts; of nothing it is 0.0, never an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields

from batchllm.trace.table import aligned
from batchllm.trace.whole_file import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The result of one run, all times in seconds."""

    num_requests: int
    """Rows of the input, bad ones included."""
    num_succeeded: int
    num_failed: int
    num_done_before: int
    """Rows among them that earlier runs of the job had finished; every count below is of this run."""
    num_engine_restarts: int
    """Engines started in the place of one that died."""
    num_prompt_tokens: int
    """Prompt tokens of the rows that have a result, once each, however often they ran."""
    num_computed_prompt_tokens: int
    """Prompt tokens whose KV was computed, also for rows that ran again after a failure or a death."""
    num_optimal_prompt_tokens: int
    """The fewest that any schedule can compute for these rows, as they were planned when they got their result
    (`BatchPlan.computed_lens`)."""
    num_output_tokens: int
    num_cut_tokens: int = 0
    """Prompt tokens that the plan has computed more than once so that each of several engines has its share."""
    elapsed_s: float
    """The whole job, reading to last line written."""
    num_retractions: int
    """Times a running request lost its KV and had to begin again."""
    num_recomputed_for_live: int
    """Tokens computed again since live requests took their KV."""
    peak_kv_tokens: int
    kv_capacity_tokens: int
    num_predicted: int
    """Requests whose output length had to be learned, and that have finished."""
    num_predicted_tokens: int
    """Output tokens expected of them when they started, in all."""
    num_predicted_actual_tokens: int
    """Output tokens that they generated."""
    sum_prediction_error_tokens: int
    """Sum over them of the distance between the two."""
    start_s: float
    """Waiting for engines to start."""
    read_s: float
    tokenize_s: float
    plan_s: float
    run_s: float
    """From the first request submitted to the last answered."""
    write_s: float
    """From the last answer to the last line written."""

    @property
    def reuse(self) -> float:
        """Part of the prompt tokens that was not computed, 0 to 1; 0 where more was computed than there are."""
        return _saved(self.num_computed_prompt_tokens, self.num_prompt_tokens)

    @property
    def optimal_reuse(self) -> float:
        """The most that `reuse` could have been for these prompts."""
        return _saved(self.num_optimal_prompt_tokens, self.num_prompt_tokens)

    @property
    def mean_prediction_error(self) -> float:
        """Mean distance between expected and generated tokens, over the mean generated; 0 where nothing was learned."""
        return _ratio(self.sum_prediction_error_tokens, self.num_predicted_actual_tokens)

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens, reused ones included, over the time of the whole job."""
        return _ratio(self.num_prompt_tokens, self.elapsed_s)

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens over the time of the whole job."""
        return _ratio(self.num_output_tokens, self.elapsed_s)

    def to_dict(self) -> dict[str, int | float]:
        """All counts, times and ratios by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {
            "reuse": self.reuse,
            "optimal_reuse": self.optimal_reuse,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "mean_prediction_error": self.mean_prediction_error,
        }

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` as JSON; the file appears complete or not at all."""
        write_whole(path, [json.dumps(self.to_dict(), indent=2, allow_nan=False).encode() + b"\n"])

    def render(self) -> str:
        """The report as an aligned table for a terminal, without a final newline."""
        rows = [
            ("elapsed", f"{self.elapsed_s:,.2f} s", self._phases()),
            ("requests", f"{self.num_requests:,}", self._outcome()),
            ("prompt tokens", f"{self.num_prompt_tokens:,}", ""),
            ("  computed", f"{self.num_computed_prompt_tokens:,}", f"reuse {self.reuse:.1%}"),
            (
                "  optimum",
                f"{self.num_optimal_prompt_tokens:,}",
                f"reuse {self.optimal_reuse:.1%}",
            ),
            *([("  for several engines", f"{self.num_cut_tokens:,}", "more")] if self.num_cut_tokens else []),
            ("output tokens", f"{self.num_output_tokens:,}", ""),
            ("peak KV tokens", f"{self.peak_kv_tokens:,}", f"of {self.kv_capacity_tokens:,}"),
            ("retractions", f"{self.num_retractions:,}", ""),
            *(
                [("computed again for live", f"{self.num_recomputed_for_live:,}", "")]
                if self.num_recomputed_for_live
                else []
            ),
            ("lengths learned", f"{self.num_predicted:,}", self._prediction()),
            ("prompt tokens/s", f"{self.prompt_tokens_per_s:,.1f}", ""),
            ("output tokens/s", f"{self.output_tokens_per_s:,.1f}", ""),
        ]
        return aligned(rows)

    def _outcome(self) -> str:
        before = f", {self.num_done_before:,} of them in earlier runs" if self.num_done_before else ""
        restarts = f", {self.num_engine_restarts:,} engine restarts" if self.num_engine_restarts else ""
        return f"{self.num_succeeded:,} succeeded, {self.num_failed:,} failed{before}{restarts}"

    def _prediction(self) -> str:
        if self.num_predicted == 0:
            return ""
        return (
            f"expected {self.num_predicted_tokens:,} tokens, generated {self.num_predicted_actual_tokens:,}, "
            f"mean error {self.mean_prediction_error:.0%}"
        )

    def _phases(self) -> str:
        phases = ("start", "read", "tokenize", "plan", "run", "write")
        return ", ".join(f"{phase} {getattr(self, f'{phase}_s'):.2f}" for phase in phases)


def _saved(num_computed: int, num_prompt: int) -> float:
    return max(0.0, 1.0 - num_computed / num_prompt) if num_prompt > 0 else 0.0


def _ratio(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
