"""What each forward step carried, for the driver's trace."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from batchllm.srt.live_view import free_kv_tokens
from batchllm.trace.steps import STEP_DTYPE, StepArray


class StepRecorder:
    """Collects steps until they are taken.

    A step's time runs from the end of the forward pass before it to the end of its own, so the results of the one
    before and the scheduling of this one are its host time. With overlap scheduling the forward pass only *begins*
    in `end`, and host time is what the device can hide.

    Args:
        backend: The attention backend; one that shares reads says in ``kv_read_tokens`` how much it reads.

    Attributes:
        num_retracted: Requests retracted since the last step.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.num_retracted = 0
        self._steps: list[tuple[Any, ...]] = []
        self._step: tuple[Any, ...] = ()
        self._last_end: float | None = None
        self._began = 0.0

    def pause(self) -> None:
        """Nothing runs: the time up to the next step is nobody's."""
        self._last_end = None

    def begin(self, scheduler: Any, batch: Any) -> None:
        """A step is about to run."""
        now = time.monotonic()
        start = now if self._last_end is None else self._last_end
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
        self._began = now
        self._step = (
            start,
            0.0,
            now - start,
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
            sum(n * cached + n * (n + 1) // 2 for cached, n in zip(cached_lens, extend_lens, strict=True)),
            num_kv_read - sum(cached_lens) - num_prefill_tokens,
            num_kv_read,
        )
        self.num_retracted = 0

    def end(self) -> None:
        """The step has run, or has been launched."""
        now = self._last_end = time.monotonic()
        start, num_kv_read = self._step[0], self._step[-1]
        # SGLang's own attention backends read the KV of every row, shared or not.
        planned = getattr(self._backend, "kv_read_tokens", None)
        num_kv_read = num_kv_read if planned is None else planned
        self._steps.append((start, now - start, *self._step[2:-1], num_kv_read))

    def take_steps(self) -> StepArray:
        """The steps since the last call; ``start_s`` is this machine's monotonic clock."""
        steps = np.array(self._steps, STEP_DTYPE)
        self._steps.clear()
        return steps
