"""What the scheduler does, for Prometheus. Runs in the scheduler's process. (Upstream:
``srt/observability/metrics_collector.py``.)

Values travel through files, as SGLang's own do: the server's ``/metrics`` has both.
"""

from __future__ import annotations

from typing import Any

from batchllm.srt.managers.schedule_batch import PlannedReq


class SchedulerMetrics:
    """Counters and gauges of one scheduler process; made there, after the server has said where the files are.

    Names begin with ``batchllm_scheduler_``; ``kind`` is planned or live.

    Args:
        has_bound: Whether the steps that carry live requests are bounded.
    """

    def __init__(self, *, has_bound: bool) -> None:
        # It looks for the folder of the files when it is imported.
        from prometheus_client import Counter, Gauge

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"batchllm_scheduler_{name}", text, labels, multiprocess_mode="mostrecent")

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"batchllm_scheduler_{name}", text, labels)

        pinned = gauge("pinned_tokens", "KV tokens of planned prefixes that are kept for requests to come.")
        open_prefixes = gauge("open_prefixes", "Planned prefixes that are being computed or kept.")
        waiting = gauge("waiting_requests", "Requests in the scheduler that have not started.", "kind")
        self._gauges = (pinned, open_prefixes, waiting.labels("planned"), waiting.labels("live"))
        self._measured: tuple[int, ...] = ()
        steps = counter("steps", "Forward steps.", "kind")
        self._steps = {kind: steps.labels(kind) for kind in ("prefill", "decode", "mixed")}
        tokens = counter("step_tokens", "Tokens that forward steps carried.", "kind")
        self._prefill_tokens, self._decode_tokens = tokens.labels("prefill"), tokens.labels("decode")
        prompt = counter("prompt_tokens", "Prompt tokens of requests that started.", "kind", "source")
        self._prompt = {
            (is_planned, source): prompt.labels("planned" if is_planned else "live", source)
            for is_planned in (True, False)
            for source in ("computed", "reused")
        }
        self._retracted = counter("retractions", "Planned requests that lost their KV and had to start again.")
        self._given_up = counter("given_up_tokens", "Pinned KV tokens given up for live requests.")
        self._num_given_up = 0
        if not has_bound:
            return
        self._bound = gauge("live_bound_seconds", "Bound on the time of a step that carries a live request.")
        live_steps = counter("live_steps", "Steps in which a live row decoded.")
        late_steps = counter("live_steps_over_bound", "Steps in which a live row decoded and which exceeded the bound.")
        self._live_steps = (live_steps, late_steps)
        self._num_live_steps = (0, 0)
        self._num_aside = gauge("rows_aside", "Planned rows that sit out the step for live requests.")

    def measure(self, scheduler: Any) -> None:
        """Set the gauges: before each step, and when there is none to run: what was before the last one is over."""
        ledger = scheduler.tree_cache.ledger
        values = (
            ledger.num_pinned_tokens,
            ledger.num_open,
            len(scheduler.planned_window),
            len(scheduler.waiting_queue),
        )
        if values != self._measured:
            self._measured = values
            for gauge, value in zip(self._gauges, values, strict=True):
                gauge.set(value)

    def _count_bounded(self, coserving: Any) -> None:
        self._bound.set(coserving.bound_s)
        self._num_aside.set(len(coserving.aside.reqs))
        now = (coserving.num_live_steps, coserving.num_late_steps)
        for counter, num, num_before in zip(self._live_steps, now, self._num_live_steps, strict=True):
            counter.inc(num - num_before)
        self._num_live_steps = now

    def count_step(self, scheduler: Any, batch: Any) -> None:
        """A step is about to run."""
        self.measure(scheduler)
        if scheduler.coserving is not None:
            self._count_bounded(scheduler.coserving)
        self._retracted.inc(scheduler.step_recorder.num_retracted)
        num_given_up = scheduler.tree_cache.num_given_up_tokens
        self._given_up.inc(num_given_up - self._num_given_up)
        self._num_given_up = num_given_up
        if not batch.forward_mode.is_extend():
            self._steps["decode"].inc()
            self._decode_tokens.inc(len(batch.reqs))
            return
        num_decoding = len(batch.decoding_reqs or ())
        self._steps["mixed" if num_decoding else "prefill"].inc()
        self._decode_tokens.inc(num_decoding)
        num_prefill = len(batch.reqs) - num_decoding
        self._prefill_tokens.inc(sum(batch.extend_lens[:num_prefill]))
        # A mixed step has its decoding rows last.
        for req, cached_len, num_tokens in zip(
            batch.reqs[:num_prefill], batch.prefix_lens, batch.extend_lens, strict=False
        ):
            is_planned = isinstance(req, PlannedReq)
            # Not the generated tokens of a retracted request.
            num_computed = min(cached_len + num_tokens, len(req.origin_input_ids)) - cached_len
            self._prompt[is_planned, "computed"].inc(max(num_computed, 0))
            if not getattr(req, "has_counted_reuse", False):  # later: the rest of a prompt in pieces, or once more
                req.has_counted_reuse = True
                self._prompt[is_planned, "reused"].inc(cached_len)
