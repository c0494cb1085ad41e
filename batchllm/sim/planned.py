"""Our scheduler on a KV pool of counts: the real policy, ledger and learned lengths, carried out.

Knows: what the runtime does with a decision: chunks, decode growth, retraction, pins, results that are known a step
late. Must not know: how decisions are made.
Invariant: where output lengths are known, each step stays within the KV limit and nothing is retracted.
"""

from __future__ import annotations

import numpy as np

from batchllm.errors import ConfigError
from batchllm.planner import BatchPlan
from batchllm.prefix_cache import PinLedger
from batchllm.scheduler import Admission, PlannedPolicy, SchedulerView
from batchllm.scheduler.admission import footprint
from batchllm.scheduler.output_length import OutputLengths, PredictionError
from batchllm.scheduler.running_kv import PromptInPieces, project
from batchllm.scheduler.token_batching import prefill_budget
from batchllm.sim.kv_pool import Columns, Outcome, StepCount, StepRecorder
from batchllm.sim.window import PlannedRequest, PlanWindow
from batchllm.sim.workload import SimWorkload
from batchllm.tokens import Int64Array


class PlannedScheduler:
    """Runs one plan to its end.

    Arguments are those of `simulate`; the recorder is the clock, and knows how much KV there is.

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
        has_overlap: bool = False,
    ) -> None:
        self._recorder = recorder
        self._page_size = plan.page_size
        self._chunk_tokens = chunk_tokens
        self._is_mixed = is_mixed
        self._max_running = plan.num_requests if max_running is None else max_running
        self._shares_reads = shares_reads
        self._has_overlap = has_overlap
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
        # Whose next token is being sampled: in the step that runs, or with overlap in the one before it too.
        self._in_flight: list[PlannedRequest] = []
        # Rows beside which the last decision admitted nothing; -1 when something has changed since.
        self._num_settled_beside = -1
        # How many running requests read each prefix, and the reads spared where each is read once.
        self._num_readers: dict[int, int] = {}
        self._num_spared_reads = 0

    def run(self) -> Outcome:
        """To the end."""
        while not self._window.is_done:
            if self._window.refill():
                self._num_settled_beside = -1
            self._step()
        assert not len(self._ledger), "a prefix outlived its consumers"
        return Outcome(self._recorder, self._columns, self._predictions)

    # One step

    def _step(self) -> None:
        going_on = self._going_on()
        budget = self._budget(len(going_on))
        piece = self._next_piece(budget)
        admissions: tuple[Admission, ...] = ()
        if budget and self._window.waiting and self._num_settled_beside != len(going_on):
            admissions = self._policy.decide(self._view(budget - piece)).admissions
            self._num_settled_beside = -1 if admissions else len(going_on)
        num_retracted = 0
        if not piece and not admissions:
            num_retracted = self._make_room(going_on)
        decoding = going_on if self._is_mixed or not (piece or admissions) else []
        count = StepCount()
        ended = self._prefill(piece, admissions, count)
        positions = self._positions(decoding)
        self._columns.kv_len[positions] += 1
        count.decode(self._columns.kv_len[positions])
        if self._shares_reads and len(decoding) == len(going_on):
            count.num_saved_reads = self._spared_reads(going_on)
        self._decoding += ended
        launched = [*decoding, *ended]
        if count.num_sampled or count.num_prefill_tokens or not self._in_flight:  # else results are all there is to do
            self._record(count, len(going_on) + len(ended) + (self._in_pieces is not None), num_retracted)
        known, self._in_flight = (self._in_flight, launched) if self._has_overlap else (launched, [])
        self._take_results(known)

    def _going_on(self) -> list[PlannedRequest]:
        """Rows that decode in the coming step if any do: not those that end with the step in flight, at their limit.

        These decode once more where slots are so short that one of all of them has to lose its own.
        """
        if not self._in_flight:
            return list(self._decoding)
        columns, ending = self._columns, set()
        for request in self._in_flight:
            if columns.num_generated[request.position] + 1 >= columns.max_new_len[request.position]:
                ending.add(request)
        if ending:
            self._num_settled_beside = -1
        going_on = [request for request in self._decoding if request not in ending]
        num_free = self._recorder.kv_capacity_tokens - self._num_used()
        return list(self._decoding) if num_free < len(going_on) * self._page_size else going_on

    def _take_results(self, requests: list[PlannedRequest]) -> None:
        positions = self._positions(requests)
        self._columns.num_generated[positions] += 1
        is_end = self._columns.num_generated[positions] >= self._columns.output_len[positions]
        for i in np.flatnonzero(is_end).tolist():
            self._decoding.remove(requests[i])
            self._finish(requests[i])

    def _budget(self, num_decoding: int) -> int:
        return prefill_budget(
            chunk_tokens=self._chunk_tokens,
            num_decoding=num_decoding,
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
        running, in_pieces = [*self._decoding], None
        if (request := self._in_pieces) is not None:
            running.append(request)
            led_tokens = sum(map(self._ledger.num_tokens, request.led))
            in_pieces = PromptInPieces(request.prefill_len, led_tokens, self._chunk_tokens, self._is_mixed)
        positions = self._positions(running)
        return SchedulerView(
            waiting=self._window.waiting,
            ledger=self._ledger,
            lengths=self._lengths,
            running=project(
                self._lengths,
                [request.output for request in running],
                prompt_len=self._columns.prompt_len[positions],
                num_generated=self._columns.num_generated[positions],
                stored_len=self._columns.kv_len[positions],
                shared_len=self._shared_len[positions],
                longest_total_len=max((request.total_len for request in running), default=0),
                page_size=self._page_size,
                release_lag=int(self._has_overlap),
                in_pieces=in_pieces,
            ),
            kv_limit_tokens=self._recorder.kv_limit_tokens,
            kv_shared_tokens=self._ledger.num_open_tokens,
            num_free_slots=self._max_running - len(running),
            num_step_tokens=num_step_tokens,
            chunk_tokens=self._chunk_tokens,
            can_chunk=self._in_pieces is None,
            is_mixed=self._is_mixed,
            page_size=self._page_size,
            release_lag=int(self._has_overlap),
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
            self._num_settled_beside = -1
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

    def _spared_reads(self, going_on: list[PlannedRequest]) -> int:
        """Reads spared in a step: rows whose last token is in flight read nothing in it."""
        num_spared, num_readers = self._num_spared_reads, dict[int, int]()
        ending = set(self._decoding).difference(going_on) if len(going_on) < len(self._decoding) else ()
        for request in ending:
            for prefix_id in request.pinned_ids:
                num_readers[prefix_id] = num_readers.get(prefix_id, self._num_readers[prefix_id]) - 1
                if num_readers[prefix_id]:
                    num_spared -= self._ledger.num_tokens(prefix_id)
        return num_spared

    # Leaving

    def _release(self, request: PlannedRequest) -> None:
        """Its private KV is free; a prefix that it had not completed is for the next to compute."""
        self._num_settled_beside = -1
        if request in self._in_flight:
            self._in_flight.remove(request)
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

    def _make_room(self, going_on: list[PlannedRequest]) -> int:
        """Take KV from requests until those that decode find their slots.

        A prompt in pieces goes first, then the least generated, then the longest prompt, then the last to start.
        Rows that lose their KV are removed from ``going_on``. Returns how many requests lost theirs.
        """
        columns, num_retracted = self._columns, 0
        while self._num_used() + self._decode_growth(going_on) > self._recorder.kv_capacity_tokens:
            if self._in_pieces is not None:
                request, self._in_pieces = self._in_pieces, None
            else:
                request = min(reversed(going_on), key=lambda r: (columns.num_generated[r.position], -r.prompt_len))
                going_on.remove(request)
                self._decoding.remove(request)
            self._release(request)
            request.num_generated = int(columns.num_generated[request.position])
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

    def _decode_growth(self, going_on: list[PlannedRequest]) -> int:
        """Slots that a decode step takes: a page for each row whose last one is full."""
        kv_len = self._columns.kv_len[self._positions(going_on)]
        return int((kv_len % self._page_size == 0).sum()) * self._page_size

    def _record(self, count: StepCount, num_running: int, num_retracted: int) -> None:
        self._recorder.record(
            count.work(),
            num_running=num_running,
            num_waiting=len(self._window.waiting),
            kv_pinned_tokens=self._ledger.num_pinned_tokens,
            kv_private_tokens=self._num_private(),
            num_open_prefixes=self._ledger.num_open,
            num_retracted=num_retracted,
        )
