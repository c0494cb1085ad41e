"""Our scheduler on a KV pool of counts: the real policy, ledger and learned lengths, carried out.

Knows: what the runtime does with a decision: chunks, decode growth, retraction, pins, results that are known a step
late. Must not know: how decisions are made.
Invariant: where output lengths are known, each step stays within the KV limit and nothing is retracted.
"""

from __future__ import annotations

import numpy as np

from batchllm.errors import ConfigError
from batchllm.scheduler import Admission, PlannedPolicy, SchedulerView
from batchllm.scheduler.admission import footprint
from batchllm.scheduler.output_length import PredictionError
from batchllm.scheduler.running_kv import PromptInPieces, project
from batchllm.scheduler.token_batching import prefill_budget
from batchllm.sim.kv_pool import Columns, Outcome, StepCount, StepRecorder
from batchllm.sim.window import PlannedRequest, PlanWindow
from batchllm.tokens import Int64Array, page_floor


class PlannedScheduler:
    """Runs requests of a plan until no more come.

    Args:
        window: Where they come from.
        columns: Requests of the plan, by position; may be shared with others that run other requests of it.
        recorder: The clock, and how much KV there is.
        page_size: Tokens of a page.

    Other arguments are those of `simulate`.

    Raises:
        ConfigError: A request cannot fit the KV limit, or a chunk is smaller than a page.
    """

    def __init__(
        self,
        window: PlanWindow,
        columns: Columns,
        recorder: StepRecorder,
        *,
        page_size: int,
        chunk_tokens: int,
        is_mixed: bool,
        max_running: int | None,
        shares_reads: bool,
        has_overlap: bool = False,
    ) -> None:
        self._recorder = recorder
        self._page_size = page_size
        self._chunk_tokens = chunk_tokens
        self._is_mixed = is_mixed
        self._max_running = len(columns.prompt_len) if max_running is None else max_running
        self._shares_reads = shares_reads
        self._has_overlap = has_overlap
        self._policy = PlannedPolicy()
        self._window, self._ledger, self._lengths = window, window.ledger, window.lengths
        self._predictions = PredictionError()
        self._columns = columns
        self._shared_len = np.zeros(len(columns.prompt_len), np.int64)
        needed = footprint(window.longest_total_len, page_size)
        if needed > recorder.kv_limit_tokens:
            raise ConfigError(f"a request needs up to {needed} KV tokens, and {recorder.kv_limit_tokens} may be used")
        if chunk_tokens < page_size:
            raise ConfigError(f"chunk_tokens {chunk_tokens} is smaller than a page of {page_size}")
        # Requests are numbers here, their positions, for there are hundreds in each of many steps.
        self._running: dict[int, PlannedRequest] = {}
        self._decoding = np.zeros(0, np.int64)
        self._in_pieces: PlannedRequest | None = None
        # Whose next token is being sampled: in the step that runs, or with overlap in the one before it too.
        self._in_flight = np.zeros(0, np.int64)
        # Rows beside which the last decision lacked room; -1 when something has changed since.
        self._num_settled_beside = -1
        # How many running requests read each prefix, and the reads spared where each is read once.
        self._num_readers: dict[int, int] = {}
        self._num_spared_reads = 0

    def run(self) -> Outcome:
        """To the end."""
        while self.advance():
            pass
        return self.outcome()

    def advance(self) -> bool:
        """Run one step; False where nothing has come that could run."""
        if self._window.refill():
            self._num_settled_beside = -1
        if self._window.is_done or not (self._running or self._window.waiting):
            return False
        self._step()
        return True

    def outcome(self) -> Outcome:
        """What has been done; nothing is left to run."""
        assert not len(self._ledger), "a prefix outlived its consumers"
        return Outcome(self._recorder, self._columns, self._predictions)

    # One step

    def _step(self) -> None:
        going_on = self._going_on()
        budget = self._budget(len(going_on))
        piece = self._next_piece(budget)
        admissions: tuple[Admission, ...] = ()
        if budget and self._window.waiting and self._num_settled_beside != len(going_on):
            decision = self._policy.decide(self._view(budget - piece))
            admissions = decision.admissions
            self._num_settled_beside = len(going_on) if decision.lacks_room else -1
        num_retracted = 0
        if not piece and not admissions:
            going_on, num_retracted = self._make_room(going_on)
        decoding = going_on if self._is_mixed or not (piece or admissions) else going_on[:0]
        count = StepCount()
        ended = self._prefill(piece, admissions, count)
        self._columns.kv_len[decoding] += 1
        count.decode(self._columns.kv_len[decoding])
        if self._shares_reads and len(decoding) == len(going_on):
            count.num_saved_reads = self._spared_reads(going_on)
        self._decoding = np.append(self._decoding, ended)
        launched = np.append(decoding, ended)
        if count.num_sampled or count.num_prefill_tokens or not len(self._in_flight):  # else only results are left
            self._record(count, len(going_on) + len(ended) + (self._in_pieces is not None), num_retracted)
        known, self._in_flight = (self._in_flight, launched) if self._has_overlap else (launched, launched[:0])
        self._take_results(known)

    def _going_on(self) -> Int64Array:
        """Rows that decode in the coming step if any do: not those that end with the step in flight, at their limit.

        These decode once more where slots are so short that one of all of them has to lose its own.
        """
        if not len(self._in_flight):
            return self._decoding
        columns, in_flight = self._columns, self._in_flight
        ending = in_flight[columns.num_generated[in_flight] + 1 >= columns.max_new_len[in_flight]]
        if not len(ending):
            return self._decoding
        self._num_settled_beside = -1
        going_on = self._decoding[~np.isin(self._decoding, ending)]
        num_free = self._recorder.kv_capacity_tokens - self._num_used()
        return self._decoding if num_free < len(going_on) * self._page_size else going_on

    def _take_results(self, positions: Int64Array) -> None:
        self._columns.num_generated[positions] += 1
        is_end = self._columns.num_generated[positions] >= self._columns.output_len[positions]
        if not is_end.any():
            return
        ended = positions[is_end]
        self._decoding = self._decoding[~np.isin(self._decoding, ended)]
        for position in ended.tolist():
            self._finish(self._running[position])

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
        return rest if rest <= budget else page_floor(budget, self._page_size)

    def _view(self, num_step_tokens: int) -> SchedulerView:
        positions, in_pieces = self._decoding, None
        if (request := self._in_pieces) is not None:
            positions = np.append(positions, request.position)
            led_tokens = sum(map(self._ledger.num_tokens, request.led))
            in_pieces = PromptInPieces(request.prefill_len, led_tokens, self._chunk_tokens, self._is_mixed)
        estimates = self._window.estimates(positions)
        total_len = self._columns.prompt_len[positions] + estimates.max_new_len - 1
        return SchedulerView(
            waiting=self._window.waiting,
            ledger=self._ledger,
            lengths=self._lengths,
            running=project(
                self._lengths,
                estimates,
                prompt_len=self._columns.prompt_len[positions],
                num_generated=self._columns.num_generated[positions],
                stored_len=self._columns.kv_len[positions],
                shared_len=self._shared_len[positions],
                longest_total_len=int(total_len.max(initial=0)),
                page_size=self._page_size,
                release_lag=int(self._has_overlap),
                in_pieces=in_pieces,
            ),
            kv_limit_tokens=self._recorder.kv_limit_tokens,
            kv_shared_tokens=self._ledger.num_open_tokens,
            num_free_slots=self._max_running - len(positions),
            num_step_tokens=num_step_tokens,
            chunk_tokens=self._chunk_tokens,
            can_chunk=self._in_pieces is None,
            is_mixed=self._is_mixed,
            page_size=self._page_size,
            release_lag=int(self._has_overlap),
        )

    # Prefill

    def _prefill(self, piece: int, admissions: tuple[Admission, ...], count: StepCount) -> Int64Array:
        """Compute the piece and what is admitted; returns the positions whose prompt is now complete."""
        ended = []
        if piece and self._in_pieces is not None:
            request = self._in_pieces
            self._in_pieces = None
            ended.append(self._compute(request, piece, count))
        for admission in admissions:
            assert isinstance(admission.request, PlannedRequest)
            request = admission.request
            self._window.start(request)
            self._running[request.position] = request
            self._lengths.start(request.output)
            self._columns.kv_len[request.position] = self._shared_len[request.position] = admission.cached_len
            request.shared_len = admission.cached_len
            request.led = list(admission.led_prefix_ids)
            for prefix_id in request.led:
                self._ledger.start_computing(prefix_id)
            led = set(request.led)
            self._read(request, [i for i in self._ledger.path(request.prefix_id) if i not in led])
            ended.append(self._compute(request, admission.num_tokens, count))
        return np.array([request.position for request in ended if request is not self._in_pieces], np.int64)

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

    def _spared_reads(self, going_on: Int64Array) -> int:
        """Reads spared in a step: rows whose last token is in flight read nothing in it."""
        num_spared, num_readers = self._num_spared_reads, dict[int, int]()
        if len(going_on) == len(self._decoding):
            return num_spared
        for position in np.setdiff1d(self._decoding, going_on).tolist():
            for prefix_id in self._running[position].pinned_ids:
                num_readers[prefix_id] = num_readers.get(prefix_id, self._num_readers[prefix_id]) - 1
                if num_readers[prefix_id]:
                    num_spared -= self._ledger.num_tokens(prefix_id)
        return num_spared

    # Leaving

    def _release(self, request: PlannedRequest) -> None:
        """Its private KV is free; a prefix that it had not completed is for the next to compute."""
        self._num_settled_beside = -1
        del self._running[request.position]
        if len(self._in_flight):
            self._in_flight = self._in_flight[self._in_flight != request.position]
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

    def _make_room(self, going_on: Int64Array) -> tuple[Int64Array, int]:
        """Take KV from requests until those that decode find their slots.

        A prompt in pieces goes first, then the least generated, then the longest prompt, then the last to start.
        Returns the rows that go on, and how many requests lost their KV.
        """
        columns, num_retracted = self._columns, 0
        while self._num_used() + self._decode_growth(going_on) > self._recorder.kv_capacity_tokens:
            if self._in_pieces is not None:
                request, self._in_pieces = self._in_pieces, None
            else:
                ranks = [(columns.num_generated[i], -columns.prompt_len[i]) for i in going_on.tolist()]
                place = min(reversed(range(len(ranks))), key=ranks.__getitem__)
                request = self._running[int(going_on[place])]
                going_on = np.delete(going_on, place)
                self._decoding = self._decoding[self._decoding != request.position]
            self._release(request)
            request.num_generated = int(columns.num_generated[request.position])
            self._window.put_back(request)
            num_retracted += 1
        return going_on, num_retracted

    # Counting

    def _num_private(self) -> int:
        positions = self._decoding
        if self._in_pieces is not None:
            positions = np.append(positions, self._in_pieces.position)
        pages = -(-self._columns.kv_len[positions] // self._page_size)
        return int((pages * self._page_size - self._shared_len[positions]).sum())

    def _num_used(self) -> int:
        return self._ledger.num_pinned_tokens + self._num_private()

    def _decode_growth(self, going_on: Int64Array) -> int:
        """Slots that a decode step takes: a page for each row whose last one is full."""
        kv_len = self._columns.kv_len[going_on]
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
