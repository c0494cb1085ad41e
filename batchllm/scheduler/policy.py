"""The order of work: members of resident prefixes first, then the next prefix's leader, always in plan order.

A prefix is computed once. Its leader is simply the first of its consumers to be admitted; the others wait
until its KV is there (one step, if the leader's prompt fits into it) while other groups' work fills the step.
(BatchLLM, arXiv 2412.03594, section 4.3: a group starts together, its prefix lives until its last member
ends.)
"""

from __future__ import annotations

from batchllm.prefix_cache.pin_ledger import Lookup
from batchllm.scheduler.admission import OpenPrefixes, kv_need, reusable_len
from batchllm.scheduler.decision import Admission, Decision
from batchllm.scheduler.view import SchedulerView, WaitingRequest


class PlannedPolicy:
    """Walks the window in plan order and admits what is ready and fits."""

    def decide(self, view: SchedulerView) -> Decision:
        """Choose the requests to start in this step.

        Stops at the first request that is ready but does not fit, so that memory drains towards the head of
        the plan instead of being taken by later, smaller requests. A request whose prefix is still being
        computed is passed over.
        """
        return Decision(tuple(_Step(view).admit()))


class _Step:
    """What one walk of the window has used up so far."""

    def __init__(self, view: SchedulerView) -> None:
        self.view = view
        self.free = view.kv_free_tokens - view.kv_growth_tokens
        self.num_tokens_left = view.num_step_tokens
        self.num_slots_left = view.num_free_slots
        self.open = OpenPrefixes.of(view.ledger)
        self.claimed: set[int] = set()  # prefixes computed by a request admitted in this very step
        self.any_behind = False  # some earlier request was passed over
        self.longest_behind = 0

    def admit(self) -> list[Admission]:
        admissions: list[Admission] = []
        blocked_prefix_id: int | None = None
        for request in self.view.waiting:
            if self.num_tokens_left <= 0 or self.num_slots_left <= 0:
                break
            if request.prefix_id == blocked_prefix_id:  # a sibling of the one passed over just before
                self.longest_behind = max(self.longest_behind, request.total_len)
                continue
            found = self.view.ledger.lookup(request.prefix_id)
            if self._prefix_must_wait(request, found):
                blocked_prefix_id = request.prefix_id
            elif request.is_ready:
                admission = self._try_admit(request, found)
                if admission is None:
                    break
                admissions.append(admission)
                continue
            self.any_behind = True
            self.longest_behind = max(self.longest_behind, request.total_len)
        return admissions

    def _prefix_must_wait(self, request: WaitingRequest, found: Lookup) -> bool:
        """True while ``request`` can neither read its prefix nor compute what is missing of it."""
        if not found.missing_ids:
            return False
        if found.is_computing or not self.claimed.isdisjoint(found.missing_ids):
            return True
        return self.any_behind and not self.open.may_add(
            found.missing_ids,
            self.view.ledger,
            max(self.longest_behind, request.total_len),
            self.view.kv_capacity_tokens,
            self.view.page_size,
        )

    def _try_admit(self, request: WaitingRequest, found: Lookup) -> Admission | None:
        """Take what ``request`` needs; None means that it does not fit now."""
        page_size = self.view.page_size
        cached_len = reusable_len(found.resident_len, request.prefill_len, page_size)
        need = kv_need(request, cached_len, page_size)
        if need > self.free:
            return None
        num_tokens = request.prefill_len - cached_len
        if num_tokens > self.num_tokens_left:
            num_tokens = self.num_tokens_left // page_size * page_size
            if num_tokens == 0 or not self.view.can_chunk:
                return None
            self.num_tokens_left = 0  # one prompt at a time may be in pieces
        else:
            self.num_tokens_left -= num_tokens
        self.free -= need
        self.num_slots_left -= 1
        self.claimed.update(found.missing_ids)
        self.open.add(found.missing_ids, self.view.ledger)
        return Admission(request, cached_len, num_tokens, found.missing_ids)
