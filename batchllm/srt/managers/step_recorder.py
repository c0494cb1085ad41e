"""What each forward step carried, for the driver's trace. Runs in the scheduler's process."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np

from batchllm.srt.managers.live_view import free_kv_tokens
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.managers.step_clock import StepClock
from batchllm.trace.steps import STEP_DTYPE, StepArray


class StepRecorder:
    """Collects steps until they are taken.

    A step's time runs from the end of the step before it to its own end. What of it lies before the forward pass is the
    host's: the results of the one before and the scheduling of this one, as far as the device did not hide them.

    Args:
        backend: The attention backend; one that shares reads says in ``kv_read_tokens`` how much it reads.
        clock: By which steps begin and end.

    Attributes:
        num_retracted: Requests retracted since the last step.
    """

    def __init__(self, backend: Any, clock: StepClock) -> None:
        self._backend = backend
        self._clock = clock
        self.num_retracted = 0
        # Counts, and the marks of the end of the step before, of the forward pass, and of the end.
        self._steps: deque[tuple[tuple[int, ...], Any, Any, Any]] = deque()
        self._counts: tuple[int, ...] = ()
        self._forward: Any = None
        self._last_end: Any = None
        # A step after a pause begins at a time of the host's clock, each other one where the one before it ends.
        self._begins: deque[tuple[Any, float]] = deque()
        self._next_start = 0.0

    def pause(self) -> None:
        """Nothing runs: the time up to the next step is nobody's, nor is a last step that answered nothing."""
        self._last_end = None
        self._steps.clear()
        self._begins.clear()

    def begin(self, scheduler: Any, batch: Any) -> None:
        """A step is about to run."""
        if self._last_end is None:
            now = time.monotonic()  # before the mark, or the step would seem to end after it has
            self._last_end = self._clock.mark()
            self._begins.append((self._last_end, now))
        free = free_kv_tokens(scheduler)
        pinned = scheduler.tree_cache.ledger.num_pinned_tokens
        is_extend = batch.forward_mode.is_extend()
        # A mixed step has its decoding rows last.
        num_decoding = len(batch.decoding_reqs or ()) if is_extend else len(batch.reqs)
        num_prefill = len(batch.reqs) - num_decoding
        num_running = len(batch.reqs)
        if is_extend and not num_decoding:
            num_running += len(scheduler.running_batch.reqs)
        extend_lens = batch.extend_lens[:num_prefill] if num_prefill else ()
        cached_lens = batch.prefix_lens[:num_prefill] if num_prefill else ()
        num_prefill_tokens = sum(extend_lens)
        num_kv_read = int(batch.seq_lens_cpu.sum())
        self._counts = (
            num_prefill_tokens,
            num_decoding,
            num_running,
            len(scheduler.planned_window),
            pinned,
            scheduler.max_total_num_tokens - free - pinned,
            free,
            scheduler.tree_cache.ledger.num_open,
            self.num_retracted,
            len(batch.reqs) - (is_extend and batch.chunked_req in batch.reqs),
            sum(n for req, n in zip(batch.reqs, extend_lens, strict=False) if not isinstance(req, PlannedReq)),
            num_decoding - sum([isinstance(req, PlannedReq) for req in batch.reqs[num_prefill:]]),
            sum(n * cached + n * (n + 1) // 2 for cached, n in zip(cached_lens, extend_lens, strict=True)),
            num_kv_read - sum(cached_lens) - num_prefill_tokens,
            num_kv_read,
        )
        self.num_retracted = 0
        self._clock.start_forward()

    def end(self) -> None:
        """The step has run, or has been launched."""
        *counts, num_kv_read = self._counts
        # SGLang's own attention backends read the KV of every row, shared or not.
        planned = getattr(self._backend, "kv_read_tokens", None)
        num_kv_read = num_kv_read if planned is None else planned
        end = self._clock.mark()
        self._steps.append(((*counts, num_kv_read), self._last_end, self._clock.forward, end))
        self._last_end = end

    def take_steps(self) -> StepArray:
        """The steps that have ended since the last call; ``start_s`` is this machine's monotonic clock."""
        taken = []
        while self._steps and self._clock.is_past(self._steps[0][-1]):
            counts, start, forward, end = self._steps.popleft()
            if self._begins and self._begins[0][0] is start:
                self._next_start = max(self._next_start, self._begins.popleft()[1])
            duration = self._clock.seconds(start, end)
            host = min(max(self._clock.seconds(start, forward), 0.0), duration)
            taken.append((self._next_start, duration, host, *counts))
            self._next_start += duration
        return np.array(taken, STEP_DTYPE)
