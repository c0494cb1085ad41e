"""The order of work: members of resident prefixes first, then the next prefix's leader, always in plan order.

A prefix is computed once. Its leader is simply the first of its consumers to be admitted; the others wait
until its KV is there (one step, if the leader's prompt fits into it) while other groups' work fills the step.
(BatchLLM, arXiv 2412.03594, section 4.3: a group starts together, its prefix lives until its last member
ends.)
"""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter

from batchllm.prefix_cache.pin_ledger import Lookup
from batchllm.scheduler.admission import KvProjection, OpenPrefixes, footprint, reusable_len
from batchllm.scheduler.decision import Admission, Decision
from batchllm.scheduler.token_batching import decode_lag, is_worth_a_pass
from batchllm.scheduler.view import SchedulerView, WaitingRequest
from batchllm.tokens import page_floor

_plan_order = attrgetter("plan_order")

_MAX_GROUPS_PASSED_OVER = 64
"""A step looks no further down the plan than past so many groups that have to wait."""


class PlannedPolicy:
    """Walks the window in plan order and admits what is ready and fits."""

    def decide(self, view: SchedulerView) -> Decision:
        """Choose the requests to start in this step.

        Stops at the first request that is ready but does not fit, so that memory drains towards the head of
        the plan instead of being taken by later, smaller requests. A request whose prefix is still being
        computed is passed over, and all who wait for the same prefix with it.

        Where prefill makes decoding rows wait, a few requests wait for more to start with them.
        """
        step = _Step(view)
        admissions = step.admit()
        if admissions and step.num_tokens_left > 0 and _should_wait(view, admissions):
            return Decision()
        return Decision(tuple(admissions), step.lacks_room and not admissions)


def _should_wait(view: SchedulerView, admissions: list[Admission]) -> bool:
    if view.is_mixed or not len(view.running) or len(admissions) == len(view.waiting):
        return False
    if any(admission.led_prefix_ids for admission in admissions):
        return False  # others wait for these
    return not is_worth_a_pass(len(admissions), len(view.running), float(view.running.remaining_len.mean()))


class _Step:
    """What one walk of the window has used up so far."""

    def __init__(self, view: SchedulerView) -> None:
        self.view = view
        self.projection = KvProjection(view.running, view.kv_shared_tokens, view.page_size)
        self.num_tokens_left = view.num_step_tokens
        self.num_slots_left = view.num_free_slots
        self.open = OpenPrefixes.of(view.ledger)
        self.claimed: set[int] = set()  # prefixes computed by a request admitted in this very step
        self.any_behind = False  # some earlier request was passed over
        self.longest_beside = view.running.longest_total_len  # of what runs or was passed over
        self.lora_ids = set(view.lora_ids)
        self.lacks_room = False  # the walk ended at a request that does not fit

    @property
    def is_full(self) -> bool:
        """No room left for another token or request."""
        return self.num_tokens_left <= 0 or self.num_slots_left <= 0

    def admit(self) -> list[Admission]:
        waiting = self.view.waiting
        admissions: list[Admission] = []
        num_groups_passed_over = 0
        index = 0
        while index < len(waiting) and not self.is_full:
            request = waiting[index]
            found = self.view.ledger.lookup(request.prefix_id)
            blocked_by = self._prefix_to_wait_for(found)
            if blocked_by is None and not self._may_open(found):
                if not self.any_behind:
                    self.lacks_room = True
                    break  # the head of the plan: what is free is for it
                blocked_by = found.missing_ids[0]
            if blocked_by is not None:
                num_groups_passed_over += 1
                if num_groups_passed_over > _MAX_GROUPS_PASSED_OVER:
                    break
                self._pass_over(self.view.ledger.longest_consumer_len(blocked_by))
                index = bisect_left(waiting, self.view.ledger.end_order(blocked_by), index + 1, key=_plan_order)
                continue
            if request.is_ready:
                admission = self._try_admit(request, found)
                if admission is None:
                    break
                admissions.append(admission)
            else:
                self._pass_over(request.total_len)
            index += 1
        return admissions

    def _pass_over(self, total_len: int) -> None:
        self.any_behind = True
        self.longest_beside = max(self.longest_beside, total_len)

    def _prefix_to_wait_for(self, found: Lookup) -> int | None:
        """The prefix that somebody else is computing and its consumers wait for, if there is one."""
        for prefix_id in found.missing_ids:
            if prefix_id in self.claimed or (found.is_computing and self.view.ledger.is_computing(prefix_id)):
                return prefix_id
        return None

    def _may_open(self, found: Lookup) -> bool:
        """Whether there is room for what is missing of a path, whatever runs and was passed over."""
        return not found.missing_ids or self.open.may_add(
            found.missing_ids,
            self.view.ledger,
            longest_beside=self.longest_beside,
            any_behind=self.any_behind,
            kv_limit_tokens=self.view.kv_limit_tokens,
            page_size=self.view.page_size,
        )

    def _try_admit(self, request: WaitingRequest, found: Lookup) -> Admission | None:
        """Take what ``request`` needs; None means that it does not fit now."""
        view, page_size = self.view, self.view.page_size
        cached_len = reusable_len(found.resident_len, request.share_len, page_size)
        led_tokens = sum(map(view.ledger.num_tokens, found.missing_ids))
        estimate, num_generated = request.output, request.num_generated
        expected_len = view.lengths.expected_len(estimate, num_generated)
        # The prefill itself samples the first token, and the last one is never stored.
        remaining_len = min(expected_len - num_generated - 1, request.total_len - request.prefill_len)
        remaining_len += view.release_lag
        is_guess = expected_len < estimate.max_new_len and not estimate.known_len
        private_len = request.prefill_len - cached_len - led_tokens
        num_tokens = min(request.prefill_len - cached_len, self.num_tokens_left)
        if view.is_mixed:
            # What decodes is a step ahead when this prompt is computed, and more where it is cut.
            num_left = request.prefill_len - cached_len - num_tokens
            remaining_len += 1 + decode_lag(num_left, view.chunk_tokens, is_mixed=True)
            private_len -= 1
        self.lacks_room = not self._fits_alone(request, found, led_tokens) or not self._may_use(request.lora_id)
        if self.lacks_room:
            return None
        if self.projection.num_requests and not self.projection.fits(
            private_len, remaining_len, is_guess, led_tokens, view.kv_limit_tokens
        ):
            self.lacks_room = True
            return None
        if num_tokens < request.prefill_len - cached_len:
            num_tokens = page_floor(num_tokens, page_size)
            if num_tokens == 0 or not view.can_chunk:
                return None
            self.num_tokens_left = 0  # one prompt at a time may be in pieces
        else:
            self.num_tokens_left -= num_tokens
        self.projection.add(private_len, remaining_len, is_guess, led_tokens)
        self.longest_beside = max(self.longest_beside, request.total_len)
        self.num_slots_left -= 1
        self.lora_ids.add(request.lora_id)
        self.claimed.update(found.missing_ids)
        self.open.add(found.missing_ids, view.ledger)
        return Admission(request, cached_len, num_tokens, found.missing_ids)

    def _may_use(self, lora_id: str | None) -> bool:
        """Whether there is a place for one more adapter, or it has one."""
        limit = self.view.max_lora_ids
        return limit is None or lora_id in self.lora_ids or len(self.lora_ids) < limit

    def _fits_alone(self, request: WaitingRequest, found: Lookup, led_tokens: int) -> bool:
        """Could ``request`` run to its longest output if all that stays were the prefixes that are open?

        Whatever was expected of the others, they may have to give up their KV for it; not their prefixes.
        """
        own_prefix_tokens = found.resident_len + led_tokens
        others = self.open.num_tokens + led_tokens - own_prefix_tokens
        return others + footprint(request.total_len, self.view.page_size) <= self.view.kv_limit_tokens
