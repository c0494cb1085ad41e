"""Steps of a bounded time, while live requests and a plan share the engine. Runs in the scheduler's process.

`StallFree` says how much a step may carry; here its counts are taken from the scheduler's state, and its answer becomes
the rows that decode and the prompt tokens that SGLang is shown. (Upstream: ``srt/managers/scheduler.py``.)

INVARIANT: a live row decodes in every step that SGLang can mix; planned rows that do not are in `RowsAside`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import retract_all
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from batchllm.scheduler.decision import Decision
from batchllm.scheduler.stall_free import PLANNED_SHARE, StallFree, Work
from batchllm.scheduler.step_time import StepLoad
from batchllm.srt.managers.live_view import free_kv_tokens, step_budget
from batchllm.srt.managers.rows_aside import RowsAside, may_sit_out
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.managers.step_clock import StepClock


@dataclass(slots=True)
class PrefillShare:
    """What the coming step may compute of prompts.

    Attributes:
        live: Live requests to start, in order.
        num_tokens: Prompt tokens of all.
        num_planned_tokens: Most of planned requests.
        decision: Planned requests to start; None while nobody has decided.
        is_live_only: A planned request that has lost its place may not have it back in the same step.
    """

    live: list[Any] = field(default_factory=list)
    num_tokens: int = 0
    num_planned_tokens: int = 0
    decision: Decision | None = None
    is_live_only: bool = False


class Coserving:
    """Composes steps under a bound.

    Args:
        scheduler: A `BatchScheduler`.
        stall_free: The budgets.
        clock: By which steps begin and end.

    Attributes:
        aside: Planned rows that sit out.
        num_live_steps: Steps in which a live row decoded.
        num_late_steps: Those of them that took longer than the bound.
    """

    def __init__(self, scheduler: Any, stall_free: StallFree, clock: StepClock) -> None:
        self._scheduler = scheduler
        self._stall_free = stall_free
        self._clock = clock
        self._mixes_always = scheduler.is_mixed_chunk
        self._last_was_prefill = False
        self.aside = RowsAside()
        self._last_end: Any = None
        self._running: deque[tuple[StepLoad, bool, Any, Any]] = deque()
        self.num_live_steps = 0
        self.num_late_steps = 0

    @property
    def bound_s(self) -> float:
        """Seconds that a step with a live row may take."""
        return self._stall_free.bound_s

    def give_planned(self, share: float) -> None:
        """Let live prompts leave this part of each step to planned work, at least what they leave anyhow."""
        self._stall_free.planned_share = max(share, PLANNED_SHARE)

    def show_all_rows(self) -> None:
        """Let SGLang's own accounts of KV and of load see what holds KV without being in the step."""
        scheduler = self._scheduler
        scheduler.invariant_checker.get_running_batch = self._all_rows
        scheduler.load_inquirer = replace(scheduler.load_inquirer, get_running_batch=self._all_rows)

    def _all_rows(self) -> Any:
        """The running batch as SGLang's accounts read it, which skip it where it is the batch that ran last."""
        scheduler = self._scheduler
        running, last, chunked = scheduler.running_batch, scheduler.last_batch, scheduler.chunked_req
        beside = list(self.aside.reqs)
        if chunked is not None and last is not None and chunked not in last.reqs and chunked not in running.reqs:
            beside.append(chunked)
        if not beside:
            return running
        reqs = beside if running is last else [*running.reqs, *beside]
        return SimpleNamespace(reqs=reqs, is_empty=lambda: not reqs)

    # What the coming step carries

    def start_step(self, running_batch: Any) -> Any:
        """The coming step is being composed: returns the running batch with all rows in it."""
        if self._last_end is None:
            self._last_end = self._clock.mark()
        return self.aside.bring_back(running_batch)

    def compose(self, running_batch: Any, *, may_prefill: bool = True) -> PrefillShare:
        """Choose the prompt tokens of the coming step, and put rows aside that it has no time for.

        Args:
            running_batch: All rows that decode, none of them aside.
            may_prefill: Whether the step may compute prompts.
        """
        scheduler = self._scheduler
        fixed, movable = _by_whether_they_move(running_batch.reqs)
        work = self._work(running_batch, fixed, movable)
        scheduler.is_mixed_chunk = work.mixes
        max_tokens = step_budget(scheduler, running_batch.reqs)
        share = PrefillShare(decision=Decision())
        if self._last_was_prefill and not work.mixes and work.live.num_decode_rows > 0:
            may_prefill = False  # it is the live rows' turn
        num_live_tokens = min(self._stall_free.live_tokens(work), max_tokens) if may_prefill else 0
        if num_live_tokens:
            num_live_tokens = self._choose_live(share, len(running_batch.reqs), num_live_tokens)
        share.num_tokens = num_live_tokens
        num_planned_tokens = 0
        if may_prefill and not share.is_live_only:
            budget = min(self._stall_free.planned_tokens(work, num_live_tokens), max_tokens - num_live_tokens)
            num_planned_tokens = self._choose_planned(share, running_batch, budget)
        num_rows = self._stall_free.planned_rows(work, num_live_tokens, num_planned_tokens)
        self.aside.put(running_batch, set(movable[num_rows:]))
        return share

    def _choose_planned(self, share: PrefillShare, running_batch: Any, budget: int) -> int:
        """Take planned requests for so many prompt tokens; returns how many there are to compute."""
        scheduler = self._scheduler
        chunked = scheduler.chunked_req
        share.num_planned_tokens = budget
        share.num_tokens += budget
        share.decision = scheduler.prefill.decide(running_batch, budget, share.live)
        num_tokens = sum(admission.num_tokens for admission in share.decision.admissions)
        if isinstance(chunked, PlannedReq):
            chunked.piece_tokens = budget
            num_tokens += min(budget, int(chunked.seqlen - len(chunked.prefix_indices)))
        return num_tokens

    def _work(self, running_batch: Any, fixed: list[Any], movable: list[Any]) -> Work:
        scheduler = self._scheduler
        chunked = scheduler.chunked_req
        is_planned_chunk = isinstance(chunked, PlannedReq)
        has_logprobs = running_batch.return_logprob and not running_batch.is_empty()
        has_logprobs = has_logprobs or any(req.return_logprob for req in scheduler.waiting_queue)
        return Work(
            # Rows that cannot sit out are carried like live ones.
            live=StepLoad(num_decode_rows=len(fixed), decode_kv_tokens=sum([req.seqlen for req in fixed])),
            live_waits=bool(scheduler.waiting_queue) or (chunked is not None and not is_planned_chunk),
            live_cached_len=0 if chunked is None or is_planned_chunk else len(chunked.prefix_indices),
            planned_kv_lens=np.array([req.seqlen for req in movable], np.int64),
            planned_waits=bool(scheduler.planned_window) or is_planned_chunk,
            planned_cached_len=len(chunked.prefix_indices) if is_planned_chunk else 0,
            mixes=self._mixes_always or (bool(fixed) and not has_logprobs),
            page_size=scheduler.page_size,
        )

    def _choose_live(self, share: PrefillShare, num_running: int, num_tokens: int) -> int:
        """Take live requests for so many prompt tokens; returns how many there are to compute.

        A live prompt in pieces leaves up to half to prompts that are computed whole beside it.
        """
        scheduler = self._scheduler
        chunked = scheduler.chunked_req
        if chunked is None or isinstance(chunked, PlannedReq):
            share.live = list(scheduler.prefill.live_to_start(num_running, num_tokens))
            lens = [scheduler.prefill.num_uncached(req) for req in share.live]
            if chunked is not None and lens and lens[0] > num_tokens:
                scheduler.prefill.put_back_chunk()  # one prompt at a time may be in pieces, and live ones go first
                share.is_live_only = True
            return min(sum(lens), num_tokens)
        num_left = len(chunked.full_untruncated_fill_ids) - len(chunked.prefix_indices)
        num_whole = 0
        room = max(num_tokens // 2, num_tokens - num_left)
        for req in scheduler.prefill.live_to_start(num_running, room):
            num_uncached = scheduler.prefill.num_uncached(req)
            if num_whole + num_uncached > room:
                break
            share.live.append(req)
            num_whole += num_uncached
        chunked.piece_tokens = num_tokens - num_whole
        return num_whole + min(num_left, chunked.piece_tokens)

    # Memory for live requests

    def make_room(self, req: Any, running_batch: Any) -> int:
        """Take KV from planned rows for a live request that found no room, of those first that lose least by it.

        The first row of the plan is spared: the plan goes on.

        Args:
            req: The live request.
            running_batch: All rows that decode.

        Returns:
            Rows that have lost theirs, to be computed again.
        """
        scheduler = self._scheduler
        _, movable = _by_whether_they_move([other for other in running_batch.reqs if not other.finished()])
        ratio = scheduler.new_token_ratio_tracker.current
        num_missing = len(req.origin_input_ids) + len(req.output_ids) + 2 * scheduler.page_size + _reserve(req)
        num_missing += int(sum(_reserve(other) for other in running_batch.reqs) * ratio)
        num_missing -= free_kv_tokens(scheduler)
        losers: set[Any] = set()
        for other in sorted(movable[1:], key=_private_len):
            if num_missing <= 0:
                break
            losers.add(other)
            num_missing -= _private_len(other) + int(_reserve(other) * ratio)
        if not losers or num_missing > 0:
            return 0  # it would not help: what runs has to end, or pins have to go
        for other in losers:
            other.num_lost_for_live += _private_len(other)
        kept = [i for i, other in enumerate(running_batch.reqs) if other not in losers]
        retract_all(
            reqs=list(losers),
            server_args=scheduler.server_args,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
        )
        running_batch.filter_batch(keep_indices=kept)
        for other in losers:
            scheduler._add_request_to_queue(other, is_retracted=True)
        return len(losers)

    # What steps take

    def pause(self) -> None:
        """Nothing runs: the time up to the next step is nobody's."""
        self._observe()
        self._last_end = None

    def note_step(self, batch: Any) -> None:
        """A step has run, or has been launched."""
        end = self._clock.mark()
        load, has_live_row = _load(batch)
        has_planned = bool(self._scheduler.planned_window or self.aside.reqs)
        carries = any(isinstance(req, PlannedReq) for req in batch.reqs)
        self._stall_free.note(has_planned=has_planned, carries_planned=carries)
        self._last_was_prefill = batch.forward_mode.is_extend() and not batch.decoding_reqs
        if self._last_end is not None:
            self._running.append((load, has_live_row, self._last_end, end))
        self._last_end = end
        self._observe()

    def _observe(self) -> None:
        while self._running and self._clock.is_past(self._running[0][-1]):
            load, has_live_row, start, end = self._running.popleft()
            seconds = self._clock.seconds(start, end)
            self._stall_free.observe(load, seconds, has_live_row=has_live_row)
            if has_live_row:
                self.num_live_steps += 1
                self.num_late_steps += seconds > self.bound_s


def _by_whether_they_move(reqs: list[Any]) -> tuple[list[Any], list[Any]]:
    """Rows that decode in every step, and those that may sit out, in plan order."""
    fixed: list[Any] = []
    movable: list[Any] = []
    for req in reqs:
        (movable if may_sit_out(req) else fixed).append(req)
    return fixed, sorted(movable, key=lambda req: req.plan_order)


def _private_len(req: Any) -> int:
    """Slots that a request alone reads, and gives back when it is retracted."""
    return int(req.kv.kv_allocated_len - req.cache_protected_len)


def _reserve(req: Any) -> int:
    """Tokens that SGLang sets aside for what a request may still generate."""
    return int(min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS))


def _load(batch: Any) -> tuple[StepLoad, bool]:
    """What a step carries, and whether a live row decodes in it."""
    kv_lens = batch.seq_lens_cpu.tolist()
    is_prefill = batch.forward_mode.is_extend()
    num_prefill = len(batch.reqs) - len(batch.decoding_reqs or ()) if is_prefill else 0  # decoding rows are last
    has_live_row = any(not isinstance(req, PlannedReq) for req in batch.reqs[num_prefill:])
    if not is_prefill:
        return StepLoad(len(kv_lens), sum(kv_lens)), has_live_row
    load = StepLoad(len(kv_lens) - num_prefill, sum(kv_lens[num_prefill:]))
    pairs = [
        num * cached + num * (num + 1) // 2
        for cached, num in zip(batch.prefix_lens[:num_prefill], batch.extend_lens[:num_prefill], strict=True)
    ]
    tokens = sum(batch.extend_lens[:num_prefill])
    return StepLoad(load.num_decode_rows, load.decode_kv_tokens, tokens, sum(pairs)), has_live_row
