"""Our scheduler on a KV pool of counts: the real policy, ledger and learned lengths, carried out.

Knows: what the runtime does with a decision: chunks, decode growth, retraction, pins. Must not know: how decisions are
made. One thing is simpler than in the runtime: a request that ends gives its KV back at once, not a step later.
Invariant: where output lengths are known, each step stays within the KV limit and nothing is retracted.
"""

from __future__ import annotations

import numpy as np

from batchllm.errors import ConfigError
from batchllm.planner import BatchPlan
from batchllm.prefix_cache import PinLedger
from batchllm.scheduler import Admission, PlannedPolicy, SchedulerView
from batchllm.scheduler.admission import RunningKv, footprint
from batchllm.scheduler.output_length import OutputLengths, PredictionError
from batchllm.scheduler.token_batching import decode_lag, prefill_budget
from batchllm.sim.kv_pool import Columns, Outcome, StepCount, StepRecorder
from batchllm.sim.window import PlannedRequest, PlanWindow
from batchllm.sim.workload import SimWorkload
from batchllm.tokens import Int64Array


class PlannedScheduler:
    """Runs one plan to its end.

    Args:
        workload: Its rows.
        plan: Their plan.
        recorder: The clock, and how much KV there is.
        chunk_tokens: Tokens of a full step.
        is_mixed: Whether decoding rows are part of steps that prefill; else they wait meanwhile.
        max_running: Requests that may run at once. None: as many as the KV holds.
        shares_reads: Whether attention reads KV that rows share once a step.

    Raises:
        ConfigError: A request cannot fit the KV limit, or a chunk is smaller than a page.
    """

    def __init__(
        self,
        workload: SimWorkload,
        plan: BatchPlan,
        recorder: StepRecorder,
        *,
        chunk_tokens: int,
        is_mixed: bool,
        max_running: int | None,
        shares_reads: bool,
    ) -> None:
        self._recorder = recorder
        self._page_size = plan.page_size
        self._chunk_tokens = chunk_tokens
        self._is_mixed = is_mixed
        self._max_running = plan.num_requests if max_running is None else max_running
        self._shares_reads = shares_reads
        self._policy = PlannedPolicy()
        self._ledger = PinLedger()
        self._lengths = OutputLengths()
        self._predictions = PredictionError()
        self._columns = Columns.of(workload, plan.order)
        self._shared_len = np.zeros(plan.num_requests, np.int64)
        self._window = PlanWindow(workload, plan, self._ledger, self._lengths, recorder.kv_capacity_tokens)
        needed = footprint(self._window.longest_total_len, plan.page_size)
        if needed > recorder.kv_limit_tokens:
            raise ConfigError(f"a request needs up to {needed} KV tokens, and {recorder.kv_limit_tokens} may be used")
        if chunk_tokens < plan.page_size:
            raise ConfigError(f"chunk_tokens {chunk_tokens} is smaller than a page of {plan.page_size}")
        self._decoding: list[PlannedRequest] = []
        self._in_pieces: PlannedRequest | None = None
        # How many running requests read each prefix, and the reads spared where each is read once.
        self._num_readers: dict[int, int] = {}
        self._num_spared_reads = 0

    def run(self) -> Outcome:
        """To the end."""
        while not self._window.is_done:
            self._window.refill()
            self._step()
        assert not len(self._ledger), "a prefix outlived its consumers"
        return Outcome(self._recorder, self._columns, self._predictions)

    # One step

    def _step(self) -> None:
        num_retracted = self._make_room() if self._is_mixed else 0
        admissions: tuple[Admission, ...] = ()
        budget = self._budget()
        piece = self._next_piece(budget)
        if not num_retracted and self._window.waiting:
            admissions = self._policy.decide(self._view(budget - piece)).admissions
        if not self._is_mixed and not piece and not admissions:
            num_retracted = self._make_room()
        count = StepCount()
        decoding = self._decoding if self._is_mixed or not (piece or admissions) else []
        ended = self._prefill(piece, admissions, count)
        positions = self._positions(decoding)
        self._columns.kv_len[positions] += 1
        count.decode(self._columns.kv_len[positions])
        if self._shares_reads and len(decoding) == len(self._decoding):
            count.num_saved_reads = self._num_spared_reads
        self._record(count, num_retracted)
        self._columns.num_generated[positions] += 1
        is_end = self._columns.num_generated[positions] >= self._columns.output_len[positions]
        for i in np.flatnonzero(is_end)[::-1].tolist():
            self._finish(decoding.pop(i))
        for request in ended:
            self._columns.num_generated[request.position] += 1
            if self._columns.num_generated[request.position] >= self._columns.output_len[request.position]:
                self._finish(request)
            else:
                self._decoding.append(request)

    def _budget(self) -> int:
        return prefill_budget(
            chunk_tokens=self._chunk_tokens,
            num_decoding=len(self._decoding),
            kv_free_tokens=self._recorder.kv_capacity_tokens - self._num_used(),
            is_mixed=self._is_mixed,
            page_size=self._page_size,
        )

    def _next_piece(self, budget: int) -> int:
        """Tokens of the prompt in pieces that this step computes."""
        if self._in_pieces is None:
            return 0
        rest = self._in_pieces.prefill_len - int(self._columns.kv_len[self._in_pieces.position])
        return rest if rest <= budget else budget // self._page_size * self._page_size

    def _view(self, num_step_tokens: int) -> SchedulerView:
        running = [*self._decoding]
        if self._in_pieces is not None:
            running.append(self._in_pieces)
        positions = self._positions(running)
        estimates = [request.output for request in running]
        generated = self._columns.num_generated[positions].tolist()
        self._lengths.refresh(estimates, generated)
        expected = self._lengths.expected_lens(estimates, generated)
        max_new = self._columns.max_new_len[positions]
        known = np.array([estimate.known_len for estimate in estimates], np.int64)
        remaining = expected - self._columns.num_generated[positions]
        private = self._columns.kv_len[positions] - self._shared_len[positions]
        if self._in_pieces is not None:
            # It samples a token at the end of its prompt, and owns no prefix that it computes.
            led = sum(map(self._ledger.num_tokens, self._in_pieces.led))
            private[-1] = self._in_pieces.prefill_len - self._in_pieces.shared_len - led
            num_left = self._in_pieces.prefill_len - int(self._columns.kv_len[self._in_pieces.position])
            remaining[-1] += decode_lag(num_left, self._chunk_tokens, is_mixed=self._is_mixed) - 1
        return SchedulerView(
            waiting=self._window.waiting,
            ledger=self._ledger,
            lengths=self._lengths,
            running=RunningKv(
                private,
                remaining,
                (expected < max_new) & (known == 0),
                max((request.total_len for request in running), default=0),
            ),
            kv_limit_tokens=self._recorder.kv_limit_tokens,
            kv_shared_tokens=self._ledger.num_open_tokens,
            num_free_slots=self._max_running - len(running),
            num_step_tokens=num_step_tokens,
            chunk_tokens=self._chunk_tokens,
            can_chunk=self._in_pieces is None,
            is_mixed=self._is_mixed,
            page_size=self._page_size,
        )

    # Prefill

    def _prefill(self, piece: int, admissions: tuple[Admission, ...], count: StepCount) -> list[PlannedRequest]:
        """Compute the piece and what is admitted; returns those whose prompt is now complete."""
        ended = []
        if piece and self._in_pieces is not None:
            request = self._in_pieces
            self._in_pieces = None
            ended.append(self._compute(request, piece, count))
        for admission in admissions:
            assert isinstance(admission.request, PlannedRequest)
            request = admission.request
            self._window.start(request)
            self._lengths.start(request.output)
            self._columns.kv_len[request.position] = self._shared_len[request.position] = admission.cached_len
            request.shared_len = admission.cached_len
            request.led = list(admission.led_prefix_ids)
            for prefix_id in request.led:
                self._ledger.start_computing(prefix_id)
            led = set(request.led)
            self._read(request, [i for i in self._ledger.path(request.prefix_id) if i not in led])
            ended.append(self._compute(request, admission.num_tokens, count))
        return [request for request in ended if request is not self._in_pieces]

    def _compute(self, request: PlannedRequest, num_tokens: int, count: StepCount) -> PlannedRequest:
        before = int(self._columns.kv_len[request.position])
        after = before + num_tokens
        is_end = after == request.prefill_len
        self._columns.kv_len[request.position] = after
        self._columns.count_computed(request.position, before, after)
        count.prefill(before, num_tokens, is_end=is_end)
        if not is_end:
            assert self._in_pieces is None, "two prompts in pieces"
            self._in_pieces = request
        while request.led and self._ledger.end_len(request.led[0]) <= after:
            prefix_id = request.led.pop(0)
            self._ledger.mark_resident(prefix_id)
            request.shared_len = self._ledger.end_len(prefix_id)
            self._shared_len[request.position] = request.shared_len
            self._read(request, [prefix_id])
        return request

    def _read(self, request: PlannedRequest, prefix_ids: list[int]) -> None:
        for prefix_id in prefix_ids:
            num_readers = self._num_readers.get(prefix_id, 0)
            self._num_readers[prefix_id] = num_readers + 1
            if num_readers:
                self._num_spared_reads += self._ledger.num_tokens(prefix_id)
        request.pinned_ids += prefix_ids

    # Leaving

    def _release(self, request: PlannedRequest) -> None:
        """Its private KV is free; a prefix that it had not completed is for the next to compute."""
        for prefix_id in request.led:
            self._ledger.abandon(prefix_id)
        for prefix_id in request.pinned_ids:
            self._num_readers[prefix_id] -= 1
            if self._num_readers[prefix_id]:
                self._num_spared_reads -= self._ledger.num_tokens(prefix_id)
        request.led = []
        request.pinned_ids = []
        request.shared_len = 0
        self._columns.kv_len[request.position] = self._shared_len[request.position] = 0

    def _finish(self, request: PlannedRequest) -> None:
        self._release(request)
        num_generated = int(self._columns.num_generated[request.position])
        self._lengths.finish(request.output, num_generated)
        self._predictions.add(request.output, num_generated)
        for prefix_id in self._ledger.finish_consumer(request.prefix_id):
            self._num_readers.pop(prefix_id, None)
        self._columns.finished.append(request.position)
        self._window.finish(request.position)

    def _make_room(self) -> int:
        """Take KV from requests until those that decode find their slots; the least generated first.

        Returns how many lost theirs.
        """
        num_retracted = 0
        while self._num_used() + self._decode_growth() > self._recorder.kv_capacity_tokens:
            if len(self._decoding) > 1 or self._in_pieces is None:
                columns = self._columns
                # Of those that have generated equally little, the longest prompt frees most.
                index = min(
                    range(len(self._decoding)),
                    key=lambda i: (
                        columns.num_generated[self._decoding[i].position],
                        -self._decoding[i].prompt_len,
                    ),
                )
                request = self._decoding.pop(index)
            else:
                request, self._in_pieces = self._in_pieces, None
            self._release(request)
            request.num_generated = int(self._columns.num_generated[request.position])
            self._window.put_back(request)
            num_retracted += 1
        return num_retracted

    # Counting

    def _positions(self, requests: list[PlannedRequest]) -> Int64Array:
        return np.array([request.plan_order[1] for request in requests], np.int64)

    def _num_private(self) -> int:
        positions = self._positions(self._decoding if self._in_pieces is None else [*self._decoding, self._in_pieces])
        pages = -(-self._columns.kv_len[positions] // self._page_size)
        return int((pages * self._page_size - self._shared_len[positions]).sum())

    def _num_used(self) -> int:
        return self._ledger.num_pinned_tokens + self._num_private()

    def _decode_growth(self) -> int:
        """Slots that a decode step takes: a page for each row whose last one is full."""
        kv_len = self._columns.kv_len[self._positions(self._decoding)]
        return int((kv_len % self._page_size == 0).sum()) * self._page_size

    def _record(self, count: StepCount, num_retracted: int) -> None:
        self._recorder.record(
            count.work(),
            num_running=len(self._decoding) + (self._in_pieces is not None),
            num_waiting=len(self._window.waiting),
            kv_pinned_tokens=self._ledger.num_pinned_tokens,
            kv_private_tokens=self._num_private(),
            num_open_prefixes=self._ledger.num_open,
            num_retracted=num_retracted,
        )
