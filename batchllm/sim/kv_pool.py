"""What every simulated scheduler is made of: work counted step by step, a clock, requests as columns of numbers.

Knows: counts of tokens and rows, and a cost model that turns a step into seconds. Must not know: policies, plans.
Invariant: in each recorded step pinned, private and free slots add up to the KV pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from batchllm.perf_model import CostModel, StepWork, prefill_pairs
from batchllm.scheduler.output_length import PredictionError
from batchllm.sim.workload import SimWorkload
from batchllm.tokens import Int64Array
from batchllm.trace import STEP_DTYPE, StepTrace


@dataclass(slots=True)
class StepCount:
    """The work of one step while it is put together.

    ``num_saved_reads`` are tokens of KV that attention need not read because rows share them.
    """

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_sampled: int = 0
    prefill_pairs: int = 0
    decode_kv_tokens: int = 0
    prefill_kv_tokens: int = 0
    num_saved_reads: int = 0

    def prefill(self, cached_len: int, num_tokens: int, *, is_end: bool) -> None:
        """``num_tokens`` of a prompt are computed after ``cached_len`` others; at its end a token is sampled."""
        self.num_prefill_tokens += num_tokens
        self.prefill_pairs += prefill_pairs(cached_len, num_tokens)
        self.prefill_kv_tokens += cached_len + num_tokens
        self.num_sampled += is_end

    def decode(self, kv_lens: Int64Array) -> None:
        """Rows decode, each with so many tokens of KV, the new one included."""
        self.num_decode_tokens += len(kv_lens)
        self.num_sampled += len(kv_lens)
        self.decode_kv_tokens += int(kv_lens.sum())

    def work(self) -> StepWork:
        """The step as the cost model takes it."""
        return StepWork(
            num_prefill_tokens=self.num_prefill_tokens,
            num_decode_tokens=self.num_decode_tokens,
            num_sampled=self.num_sampled,
            prefill_pairs=self.prefill_pairs,
            decode_kv_tokens=self.decode_kv_tokens,
            kv_read_tokens=self.decode_kv_tokens + self.prefill_kv_tokens - self.num_saved_reads,
        )


class StepRecorder:
    """Gives each step its time and keeps its line of the trace.

    Args:
        cost_model: The clock.
        kv_capacity_tokens: Slots of the KV pool.
        kv_limit_tokens: Slots of it that the scheduler is to use.

    Attributes:
        elapsed_s: Seconds of all steps so far.
    """

    def __init__(self, cost_model: CostModel, kv_capacity_tokens: int, kv_limit_tokens: int) -> None:
        self.kv_capacity_tokens = kv_capacity_tokens
        self.kv_limit_tokens = kv_limit_tokens
        self._cost_model = cost_model
        self.elapsed_s = 0.0
        self._steps: list[tuple[float | int, ...]] = []

    def record(
        self,
        work: StepWork,
        *,
        num_running: int,
        num_waiting: int,
        kv_pinned_tokens: int,
        kv_private_tokens: int,
        num_open_prefixes: int = 0,
        num_retracted: int = 0,
    ) -> None:
        """One step has run, with these counts while it did.

        Raises:
            RuntimeError: More KV than there is, or a step without work, which would never end.
        """
        free = self.kv_capacity_tokens - kv_pinned_tokens - kv_private_tokens
        if free < 0:
            raise RuntimeError(f"step {len(self._steps)} holds {-free} KV tokens more than there are")
        if work.num_tokens == 0:
            raise RuntimeError(f"step {len(self._steps)} has nothing to compute while {num_waiting} requests wait")
        seconds = self._cost_model.step_s(work)
        self._steps.append(
            (
                self.elapsed_s,
                seconds,
                0.0,
                work.num_prefill_tokens,
                work.num_decode_tokens,
                num_running,
                num_waiting,
                kv_pinned_tokens,
                kv_private_tokens,
                free,
                num_open_prefixes,
                num_retracted,
                work.num_sampled,
                0,
                0,
                work.prefill_pairs,
                work.decode_kv_tokens,
                work.kv_read_tokens,
            )
        )
        self.elapsed_s += seconds

    def trace(self, label: str) -> StepTrace:
        """All steps so far."""
        return StepTrace(
            label=label,
            kv_capacity_tokens=self.kv_capacity_tokens,
            kv_limit_tokens=self.kv_limit_tokens,
            steps=np.array(self._steps, STEP_DTYPE),
        )


@dataclass(slots=True)
class Columns:
    """Requests as columns, by row of the workload or by position of a plan, as their owner counts.

    Attributes:
        prompt_len: Tokens of the prompt, int64[num_requests].
        output_len: Tokens it will generate, int64[num_requests].
        max_new_len: Tokens it may generate, int64[num_requests].
        kv_len: Tokens whose KV it has or reads now, int64[num_requests].
        num_generated: Tokens generated so far, int64[num_requests].
        finished: Those that have ended, in the order in which they did.
        num_computed: Prompt tokens computed, again and again where KV was lost.
    """

    prompt_len: Int64Array
    output_len: Int64Array
    max_new_len: Int64Array
    kv_len: Int64Array
    num_generated: Int64Array
    finished: list[int] = field(default_factory=list)
    num_computed: int = 0

    @classmethod
    def of(cls, workload: SimWorkload, order: Int64Array | None = None) -> Columns:
        """Columns by row, or by position of ``order``."""
        rows = np.arange(workload.num_requests) if order is None else order
        return cls(
            prompt_len=workload.table.lengths[rows],
            output_len=workload.output_len[rows],
            max_new_len=workload.max_new_len[rows],
            kv_len=np.zeros(len(rows), np.int64),
            num_generated=np.zeros(len(rows), np.int64),
        )

    def prefill_len(self, index: int) -> int:
        """Tokens it must have KV for before it decodes: prompt, and what it had generated before it lost its KV."""
        return int(self.prompt_len[index] + self.num_generated[index])

    def finish_ended(self, running: list[int]) -> tuple[list[int], list[int]]:
        """Those of ``running`` that have generated all they will, now finished, and the others. Others are not read."""
        is_end = (self.num_generated[running] >= self.output_len[running]).tolist()
        ended = [index for index, has_ended in zip(running, is_end, strict=True) if has_ended]
        self.finished += ended
        return ended, [index for index, has_ended in zip(running, is_end, strict=True) if not has_ended]

    def count_computed(self, index: int, before: int, after: int) -> None:
        """Tokens ``[before, after)`` of a request have been computed; those of its prompt count."""
        num_prompt = int(self.prompt_len[index])
        self.num_computed += max(min(after, num_prompt) - min(before, num_prompt), 0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated scheduler hands back.

    Attributes:
        recorder: The steps that it has run.
        columns: The requests, all finished.
        predictions: Learned output lengths against true ones.
    """

    recorder: StepRecorder
    columns: Columns
    predictions: PredictionError = field(default_factory=PredictionError)
