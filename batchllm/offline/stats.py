"""What jobs have cost, added up. `RunReport` says it in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from batchllm.offline.report import RunReport
from batchllm.offline.runtime import RuntimeInfo
from batchllm.scheduler.counters import JobCounters
from batchllm.trace import StepTrace
from batchllm.trace.steps import STEP_DTYPE, StepArray


@dataclass(slots=True, kw_only=True)
class JobStats(JobCounters):
    """Counts and seconds, all of them counted or timed where it happened."""

    num_prompt_tokens: int = 0
    """Prompt tokens of the samples that have finished."""
    num_optimal_prompt_tokens: int = 0
    """The fewest that these samples could need, as they were planned."""
    num_output_tokens: int = 0
    num_cut_tokens: int = 0
    """Prompt tokens that plans have computed more than once so that each of several engines has its share."""
    start_s: float = 0.0
    """Waiting for engines to start."""
    read_s: float = 0.0
    tokenize_s: float = 0.0
    plan_s: float = 0.0
    run_s: float = 0.0
    write_s: float = 0.0
    """After the last answer."""

    @classmethod
    def of(cls, counters: JobCounters) -> JobStats:
        """The counts, and no seconds."""
        return cls(**{field.name: getattr(counters, field.name) for field in fields(JobCounters)})

    def report(
        self,
        info: RuntimeInfo | None,
        *,
        num_requests: int,
        num_failed: int,
        elapsed_s: float,
        num_done_before: int = 0,
        num_engine_restarts: int = 0,
    ) -> RunReport:
        """The report of a run.

        Args:
            info: Numbers of the engine that ran; None if there was nothing to run.
            num_requests: Rows of the input, those that never became a request included.
            num_failed: Those of them without an answer.
            elapsed_s: Seconds of the whole run.
            num_done_before: Rows that earlier runs of the job had finished.
            num_engine_restarts: Engines started in the place of one that died.
        """
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prediction"}
        # Below it is what an earlier batch left in the cache, or a part of a plan that did not run whole.
        own["num_optimal_prompt_tokens"] = min(self.num_optimal_prompt_tokens, self.num_computed_prompt_tokens)
        return RunReport(
            **own,
            num_requests=num_requests,
            num_succeeded=num_requests - num_failed,
            num_failed=num_failed,
            num_done_before=num_done_before,
            num_engine_restarts=num_engine_restarts,
            elapsed_s=elapsed_s,
            kv_capacity_tokens=0 if info is None else info.kv_capacity_tokens,
            num_predicted=self.prediction.num_requests,
            num_predicted_tokens=round(self.prediction.num_predicted_tokens),
            num_predicted_actual_tokens=self.prediction.num_actual_tokens,
            sum_prediction_error_tokens=round(self.prediction.sum_absolute_error),
        )


def make_trace(label: str, steps: Sequence[StepArray], info: RuntimeInfo, started_at: float) -> StepTrace:
    """What each forward step was like, from what jobs have kept.

    Args:
        label: Names the trace.
        steps: In the order in which they ran.
        info: Numbers of the engine that ran.
        started_at: When the first job began, on the monotonic clock.
    """
    joined = np.concatenate([*steps, np.zeros(0, STEP_DTYPE)])
    # The first step may begin before the job: its results were those of the one before.
    joined["start_s"] = np.maximum(joined["start_s"] - started_at, 0.0)
    return StepTrace(
        label=label,
        kv_capacity_tokens=info.kv_capacity_tokens,
        kv_limit_tokens=info.kv_limit_tokens,
        steps=joined,
    )
