"""What starts in a step, exactly; and a whole plan run to its end in a tiny world, whatever happens to it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner import BatchPlan, plan_batch
from batchllm.planner.planner import PlannedRun, RunCutter
from batchllm.prefix_cache import PinLedger, PrefixState
from batchllm.prefix_cache.pin_ledger import NO_PREFIX
from batchllm.scheduler import Admission, Decision, PlannedPolicy, SchedulerView
from batchllm.scheduler.admission import RunningKv, footprint
from batchllm.scheduler.feed_window import FeedWindow
from batchllm.scheduler.output_length import OutputEstimate, OutputLengths
from batchllm.scheduler.running_kv import PromptInPieces, project
from batchllm.scheduler.token_batching import prefill_budget
from batchllm.scheduler.window import RequestWindow
from batchllm.tokens import TokenTable, page_ceil
from tests.sizes import sized

# Exact decisions


@dataclass(frozen=True)
class _Waiting:
    """A request by numbers: its prompt, and its output of one token unless said otherwise."""

    name: str
    prefix_id: int
    prefill_len: int
    max_new_len: int = 1
    is_ready: bool = True
    lora_id: str | None = None
    num_generated: int = 0
    plan_order: tuple[int, int] = (0, 0)

    @property
    def share_len(self) -> int:
        return self.prefill_len

    @property
    def total_len(self) -> int:
        return self.prefill_len + self.max_new_len - 1

    @property
    def output(self) -> OutputEstimate:
        return OutputEstimate(max_new_len=self.max_new_len, known_len=self.max_new_len, kind=0, position=0)


def _ledger(*prefixes: tuple[int, int], longest: int = 12, end_order: tuple[int, int] = (0, 0)) -> PinLedger:
    """Prefixes ``(parent_id, end_len)``, numbered from 0. Unless told their end, each request is looked at."""
    ledger = PinLedger()
    for prefix_id, (parent_id, end_len) in enumerate(prefixes):
        ledger.add(
            prefix_id,
            parent_id=parent_id,
            start_len=0 if parent_id == NO_PREFIX else ledger.end_len(parent_id),
            end_len=end_len,
            num_consumers=5,
            longest_consumer_len=longest,
            end_order=end_order,
        )
    return ledger


def _open(ledger: PinLedger, *prefix_ids: int) -> None:
    for prefix_id in prefix_ids:
        ledger.start_computing(prefix_id)
        ledger.mark_resident(prefix_id)


def _view(waiting: Iterable[_Waiting], ledger: PinLedger | None = None) -> SchedulerView:
    """Room for all; narrow it with `replace`."""
    return SchedulerView(
        waiting=list(waiting),
        ledger=PinLedger() if ledger is None else ledger,
        lengths=OutputLengths(),
        running=RunningKv(),
        kv_limit_tokens=1000,
        kv_shared_tokens=0,
        num_free_slots=100,
        num_step_tokens=1000,
        chunk_tokens=1000,
        can_chunk=True,
        is_mixed=True,
    )


def _free(view: SchedulerView, kv_free_tokens: int) -> SchedulerView:
    """All but so many slots are taken by something else."""
    return replace(view, kv_shared_tokens=view.kv_limit_tokens - kv_free_tokens)


def _beside(view: SchedulerView, *running: tuple[int, int], longest: int = 0) -> SchedulerView:
    """Others run, ``(private_len, remaining_len)`` each."""
    private_len, remaining_len = zip(*running, strict=True)
    return replace(
        view, running=RunningKv(np.array(private_len), np.array(remaining_len), np.zeros(len(running), bool), longest)
    )


def _decide(view: SchedulerView) -> list[Admission]:
    return list(PlannedPolicy().decide(view).admissions)


def _names(view: SchedulerView) -> str:
    names = []
    for admission in _decide(view):
        assert isinstance(admission.request, _Waiting)
        names.append(admission.request.name)
    return "".join(names)


def _lone(*prefill_lens: int, max_new_len: int = 1) -> list[_Waiting]:
    """Requests a, b, c, ... that share nothing."""
    return [
        _Waiting(chr(ord("a") + i), NO_PREFIX, prefill_len, max_new_len) for i, prefill_len in enumerate(prefill_lens)
    ]


def _group(names: str, prefix_id: int, prefill_len: int) -> list[_Waiting]:
    return [_Waiting(name, prefix_id, prefill_len) for name in names]


def test_nothing_waiting_gives_no_admissions() -> None:
    assert _decide(_view([])) == []


def test_requests_that_share_nothing_start_together_in_plan_order() -> None:
    requests = _lone(3, 2, 5)
    assert _decide(_view(requests)) == [
        Admission(requests[0], 0, 3),
        Admission(requests[1], 0, 2),
        Admission(requests[2], 0, 5),
    ]


def test_the_first_of_a_group_leads_and_its_siblings_wait() -> None:
    group = _group("abc", 0, 6)
    assert _decide(_view(group, _ledger((NO_PREFIX, 4)))) == [Admission(group[0], 0, 6, (0,))]


def test_a_leader_computes_every_missing_prefix_of_its_path_outermost_first() -> None:
    ledger = _ledger((NO_PREFIX, 2), (0, 4), (1, 6))
    _open(ledger, 0)
    leader = _Waiting("a", 2, 9)
    assert _decide(_view([leader], ledger)) == [Admission(leader, 2, 7, (1, 2))]


def test_siblings_start_in_the_next_step_and_read_the_prefix() -> None:
    ledger = _ledger((NO_PREFIX, 4))
    _open(ledger, 0)
    group = _group("bc", 0, 6)
    assert _decide(_view(group, ledger)) == [Admission(request, 4, 2) for request in group]


def test_siblings_wait_as_long_as_their_prefix_is_being_computed() -> None:
    ledger = _ledger((NO_PREFIX, 4))
    ledger.start_computing(0)
    assert _names(_view(_group("bc", 0, 6), ledger)) == ""


def test_a_sibling_of_the_part_that_is_resident_does_not_wait_for_the_deeper_part() -> None:
    ledger = _ledger((NO_PREFIX, 4), (0, 6))
    _open(ledger, 0)
    ledger.start_computing(1)
    assert _names(_view([*_group("a", 1, 8), *_group("b", 0, 8)], ledger)) == "b"


def test_a_group_under_a_prefix_that_was_claimed_in_this_step_waits() -> None:
    ledger = _ledger((NO_PREFIX, 2), (0, 4), (0, 5))
    assert _names(_view([*_group("ab", 1, 8), *_group("cd", 2, 8)], ledger)) == "a"


def test_leaders_of_other_groups_fill_the_step_meanwhile() -> None:
    ledger = _ledger((NO_PREFIX, 4), (NO_PREFIX, 4))
    requests = [*_group("abc", 0, 6), *_group("de", 1, 6), *_group("f", NO_PREFIX, 3)]
    assert _names(_view(requests, ledger)) == "adf"


def test_stops_at_the_first_that_does_not_fit() -> None:
    assert _names(_free(_view(_lone(4, 8, 1)), 10)) == "a"


def test_a_decision_says_that_the_first_does_not_fit() -> None:
    """Not where there is something to start, or the step is full, or nothing waits."""
    view = _view(_lone(5, 5, max_new_len=3))
    beside = _beside(view, (3, 9))
    assert PlannedPolicy().decide(_free(beside, 4)) == Decision((), lacks_room=True)
    assert not PlannedPolicy().decide(_free(view, 9)).lacks_room
    assert not PlannedPolicy().decide(replace(view, num_step_tokens=0)).lacks_room
    assert not PlannedPolicy().decide(replace(view, num_step_tokens=3, can_chunk=False)).lacks_room
    assert not PlannedPolicy().decide(_view([])).lacks_room


def test_a_prefix_that_may_not_be_opened_lacks_room() -> None:
    """Beside a request that may yet need the memory."""
    ledger = _ledger((NO_PREFIX, 8), longest=12)
    view = replace(_beside(_view(_group("a", 0, 9), ledger), (1, 1), longest=90), kv_limit_tokens=95)
    assert PlannedPolicy().decide(view) == Decision((), lacks_room=True)


def test_the_output_to_come_counts_as_taken() -> None:
    view = _view(_lone(4, 4, max_new_len=3))
    assert _names(_free(view, 12)) == "ab"
    assert _names(_free(view, 11)) == "a"


def test_where_results_come_a_step_late_what_ends_keeps_its_slots_for_a_step() -> None:
    """Others take theirs meanwhile."""
    view = replace(_view(_lone(4, 4, max_new_len=3)), release_lag=1)
    assert _names(_free(view, 14)) == "ab"
    assert _names(_free(view, 13)) == "a"


def test_a_request_starts_when_the_peak_over_the_coming_finishes_has_room_for_it() -> None:
    """Not for all that each will ever take: 10 + 6, 10 + 20 and 4 + 6 are never in use at once."""
    view = _beside(replace(_view(_lone(4, max_new_len=7)), is_mixed=False), (10, 6), (10, 20))
    assert _names(_free(view, (10 + 6) + (10 + 6) + (4 + 6))) == "a"
    assert _names(_free(view, (10 + 6) + (10 + 6) + (4 + 6) - 1)) == ""


def test_in_a_mixed_step_the_others_are_a_token_ahead_of_what_starts_in_it() -> None:
    """It ends a step later than they would make one believe, beside one that grows as long."""
    view = _beside(_view(_lone(4, max_new_len=4)), (10, 4))
    assert _names(_free(view, (10 + 4) + (4 + 3))) == "a"
    assert _names(_free(view, (10 + 4) + (4 + 3) - 1)) == ""


def test_a_request_that_outlives_the_others_uses_what_they_free() -> None:
    view = _beside(replace(_view(_lone(4, max_new_len=31)), is_mixed=False), (10, 5), (10, 5))
    assert _names(_free(view, 30 + 4 + 5)) == "a"  # 34 of its own once they are gone
    assert _names(_free(view, 30 + 4 + 4)) == ""


def test_a_follower_needs_no_room_for_what_it_reads() -> None:
    ledger = _ledger((NO_PREFIX, 4))
    _open(ledger, 0)
    view = _view(_group("a", 0, 6), ledger)
    view = _beside(replace(view, is_mixed=False), (1, 0))
    assert _names(_free(view, 1 + 2)) == "a"
    assert _names(_free(view, 1 + 1)) == ""


def test_the_last_prompt_of_a_step_is_cut_and_sets_memory_aside_for_all_of_it() -> None:
    requests = _lone(4, 8, 1)
    view = replace(_view(requests), num_step_tokens=7)
    assert _decide(view) == [Admission(requests[0], 0, 4), Admission(requests[1], 0, 3)]
    assert _names(_free(view, 4 + 7)) == "a"


def test_a_full_step_takes_nothing_more() -> None:
    assert _names(replace(_view(_lone(4, 4, 4)), num_step_tokens=8)) == "ab"


@pytest.mark.parametrize("num_step_tokens", [0, -3])
def test_a_step_that_a_prompt_in_pieces_fills_admits_nothing(num_step_tokens: int) -> None:
    assert _names(replace(_view(_lone(1)), num_step_tokens=num_step_tokens)) == ""


def test_nothing_is_cut_where_cutting_is_off_or_a_prompt_is_in_pieces_already() -> None:
    view = replace(_view(_lone(4, 8, 1)), num_step_tokens=7, can_chunk=False)
    assert _names(view) == "a"


def test_a_led_prompt_that_is_cut_claims_its_prefix_all_the_same() -> None:
    group = _group("ab", 0, 6)
    view = replace(_view(group, _ledger((NO_PREFIX, 4))), num_step_tokens=3)
    assert _decide(view) == [Admission(group[0], 0, 3, (0,))]


def test_no_more_requests_than_slots() -> None:
    assert _names(replace(_view(_lone(1, 1, 1)), num_free_slots=2)) == "ab"
    assert _names(replace(_view(_lone(1, 1, 1)), num_free_slots=0)) == ""


def test_an_exact_duplicate_computes_its_last_token() -> None:
    ledger = _ledger((NO_PREFIX, 6))
    _open(ledger, 0)
    duplicate = _Waiting("a", 0, 6)
    assert _decide(_view([duplicate], ledger)) == [Admission(duplicate, 5, 1)]


def test_with_pages_an_exact_duplicate_computes_its_last_page() -> None:
    ledger = _ledger((NO_PREFIX, 32))
    _open(ledger, 0)
    duplicate = _Waiting("a", 0, 32)
    assert _decide(replace(_view([duplicate], ledger), page_size=16)) == [Admission(duplicate, 16, 16)]


def test_with_pages_memory_is_set_aside_in_whole_pages() -> None:
    view = replace(_view(_lone(16, 16)), page_size=16)
    # Where each request will end in its last page is not known, so a page less one is left for it.
    assert _names(_free(view, 2 * 31)) == "ab"
    assert _names(_free(view, 2 * 31 - 1)) == "a"


def test_with_pages_a_prompt_is_cut_at_a_page() -> None:
    requests = _lone(8, 64)
    view = replace(_view(requests), page_size=16, num_step_tokens=45)
    assert _decide(view) == [Admission(requests[0], 0, 8), Admission(requests[1], 0, 32)]
    assert _names(replace(view, num_step_tokens=23)) == "a"


def test_a_retracted_request_computes_what_it_had_generated_again() -> None:
    ledger = _ledger((NO_PREFIX, 6))
    _open(ledger, 0)
    retracted = _Waiting("a", 0, 6 + 3)  # an exact prompt of the prefix, and three tokens generated
    assert _decide(_view([retracted], ledger)) == [Admission(retracted, 6, 3)]


def test_the_walk_ends_at_the_first_adapter_that_has_no_place() -> None:
    """The base model takes a place like any adapter. What runs has places already."""
    requests = [replace(r, lora_id=i) for r, i in zip(_lone(2, 2, 2, 2), (None, "x", "x", "y"), strict=True)]
    view = _view(requests)
    assert _names(view) == "abcd"
    assert _names(replace(view, max_lora_ids=3)) == "abcd"
    assert _names(replace(view, max_lora_ids=2)) == "abc"
    assert _names(replace(view, max_lora_ids=1)) == "a"
    beside = replace(view, lora_ids=frozenset({"y"}))
    assert _names(replace(beside, max_lora_ids=2)) == "a"
    assert _names(replace(beside, max_lora_ids=1)) == ""
    assert PlannedPolicy().decide(replace(beside, max_lora_ids=1)).lacks_room


def test_a_request_that_is_not_ready_is_passed_over() -> None:
    requests = _lone(2, 2)
    assert _names(_view([replace(requests[0], is_ready=False), requests[1]])) == "b"


def test_the_next_of_a_group_leads_where_the_first_is_not_ready() -> None:
    first, second = _group("ab", 0, 6)
    view = _view([replace(first, is_ready=False), second], _ledger((NO_PREFIX, 4)))
    assert _decide(view) == [Admission(second, 0, 6, (0,))]


def test_a_prefix_opened_out_of_order_leaves_room_for_the_longest_request_behind() -> None:
    ledger = _ledger((NO_PREFIX, 4))
    held = replace(_lone(20)[0], is_ready=False)  # 20 slots once it may start
    view = _view([held, *_group("b", 0, 6)], ledger)
    assert _names(replace(view, kv_limit_tokens=25)) == "b"
    assert _names(replace(view, kv_limit_tokens=24)) == ""


def test_prefixes_opened_in_the_same_step_are_counted_for_those_behind() -> None:
    ledger = _ledger((NO_PREFIX, 4), (NO_PREFIX, 4))
    held = replace(_lone(20)[0], is_ready=False)
    view = _view([held, *_group("b", 0, 6), *_group("c", 1, 6)], ledger)
    assert _names(replace(view, kv_limit_tokens=29)) == "bc"
    assert _names(replace(view, kv_limit_tokens=28)) == "b"


def test_a_prefix_is_opened_beside_what_runs_only_if_that_could_still_run_to_its_limit() -> None:
    """It may run longer than expected, and a pinned prefix does not give way to it."""
    view = _beside(_view(_group("b", 0, 6), _ledger((NO_PREFIX, 4))), (5, 1), longest=20)
    assert _names(replace(view, kv_limit_tokens=25)) == "b"
    assert _names(replace(view, kv_limit_tokens=24)) == ""


def test_what_comes_after_the_head_of_the_plan_does_not_take_the_room_that_it_waits_for() -> None:
    ledger = _ledger((NO_PREFIX, 4))
    view = _beside(_view([*_group("b", 0, 6), *_lone(1)], ledger), (5, 1), longest=20)
    assert _names(replace(view, kv_limit_tokens=24)) == ""
    assert _names(replace(view, kv_limit_tokens=25)) == "ba"


def test_a_request_starts_only_if_its_longest_output_fits_beside_the_prefixes_that_are_open() -> None:
    ledger = _ledger((NO_PREFIX, 4))
    _open(ledger, 0)
    view = _view(_lone(6, max_new_len=15), ledger)
    assert _names(replace(view, kv_shared_tokens=4, kv_limit_tokens=25)) == "a"
    assert _names(replace(view, kv_shared_tokens=4, kv_limit_tokens=24)) == ""


def test_prefixes_opened_out_of_order_leave_room_for_their_own_consumers_to_come() -> None:
    ledger = _ledger((NO_PREFIX, 4), longest=50)
    held = replace(_lone(1)[0], is_ready=False)
    view = _view([held, *_group("b", 0, 6)], ledger)
    assert _names(replace(view, kv_limit_tokens=55)) == "b"
    assert _names(replace(view, kv_limit_tokens=54)) == ""


def test_in_plan_order_a_prefix_is_opened_wherever_its_leader_fits() -> None:
    view = _view(_group("b", 0, 6), _ledger((NO_PREFIX, 4), longest=50))
    assert _names(replace(view, kv_limit_tokens=7)) == "b"


def test_a_request_without_a_missing_prefix_may_overtake_whatever_is_open() -> None:
    held = replace(_lone(900)[0], is_ready=False)
    assert _names(_view([held, *_group("b", NO_PREFIX, 500)])) == "b"


def test_the_consumers_of_a_prefix_that_must_wait_are_passed_over_at_once() -> None:
    """Not one by one: there may be a million. Told that the group ends behind c, the walk goes on with d."""
    ledger = _ledger((NO_PREFIX, 4), end_order=(0, 3))
    ledger.start_computing(0)
    requests = [replace(r, plan_order=(0, i)) for i, r in enumerate([*_group("abc", 0, 6), *_lone(1)])]
    requests[3] = replace(requests[3], name="d")
    assert _names(_view(requests, ledger)) == "d"


def test_no_more_than_so_many_groups_are_passed_over() -> None:
    ledger = _ledger(*[(NO_PREFIX, 4)] * 200)
    for prefix_id in range(200):
        ledger.start_computing(prefix_id)
    waiting = [_Waiting("x", prefix_id, 6) for prefix_id in range(200)]
    assert _names(_view([*waiting[:60], *_lone(1)], ledger)) == "a"
    assert _names(_view([*waiting, *_lone(1)], ledger)) == ""


def test_where_prefill_makes_decoding_rows_wait_a_few_requests_wait_for_more() -> None:
    """100 run for 50 more steps each: two finish a step, and 20 at a time is cheapest."""
    view = replace(_view(_lone(*[1] * 26)), is_mixed=False, kv_limit_tokens=9999)
    view = _beside(view, *[(1, 50)] * 100)
    for num_slots, num_started in ((26, 26), (20, 20), (19, 0)):
        assert len(_decide(replace(view, num_free_slots=num_slots))) == num_started
    assert len(_decide(replace(view, num_free_slots=19, is_mixed=True))) == 19


def test_requests_do_not_wait_for_more_where_there_are_no_more_or_the_step_is_full() -> None:
    view = replace(_view(_lone(1, 1)), is_mixed=False, kv_limit_tokens=9999)
    view = _beside(view, *[(1, 50)] * 100)
    assert _names(view) == "ab"
    assert _names(replace(view, num_step_tokens=1)) == "a"


def test_a_leader_does_not_wait_for_more() -> None:
    view = replace(_view(_group("ab", 0, 6), _ledger((NO_PREFIX, 4))), is_mixed=False, kv_limit_tokens=9999)
    assert _names(_beside(view, *[(1, 50)] * 100)) == "a"


def test_deciding_twice_gives_the_same_and_changes_nothing() -> None:
    ledger = _ledger((NO_PREFIX, 4), (0, 6), (NO_PREFIX, 3))
    _open(ledger, 0)
    requests = [*_group("ab", 1, 8), *_group("cd", 2, 6), *_lone(4)]
    view = replace(_view(requests, ledger), num_step_tokens=15)
    before = copy.deepcopy(view)
    policy = PlannedPolicy()
    decision = policy.decide(view)
    assert policy.decide(view) == decision == PlannedPolicy().decide(before)
    assert view.waiting == before.waiting
    assert [view.ledger.lookup(i) for i in range(3)] == [before.ledger.lookup(i) for i in range(3)]
    assert (view.ledger.num_pinned_tokens, view.ledger.num_open_tokens) == (4, 4)


# A tiny world

_MAX_RETRACTIONS = 30


@dataclass(eq=False)
class _Request:
    """A request in the world: tokens, and how many KV slots of whom."""

    position: int
    tokens: tuple[int, ...]
    max_new_len: int
    num_new_tokens: int  # what it will generate before it stops by itself
    prefix_id: int
    is_ready: bool
    lora_id: str | None
    output: OutputEstimate
    scored_behind: int | None = None  # tokens behind so many are scored, and not shared
    num_generated: int = 0
    kv_len: int = 0  # tokens with KV, its own or read
    shared_len: int = 0  # of them those that belong to planned prefixes
    is_admitted: bool = False
    led: list[int] = field(default_factory=list)

    @property
    def prefill_len(self) -> int:
        return len(self.tokens) + self.num_generated

    @property
    def share_len(self) -> int:
        return self.prefill_len if self.scored_behind is None else self.scored_behind

    @property
    def plan_order(self) -> tuple[int, int]:
        return (0, self.position)

    @property
    def total_len(self) -> int:
        return len(self.tokens) + self.max_new_len - 1

    def num_private(self, page_size: int) -> int:
        return page_ceil(self.kv_len, page_size) - self.shared_len


@dataclass(frozen=True)
class _Trouble:
    """Chance per step that something happens to one request; 0 is a quiet world."""

    abort: float = 0.0
    retract: float = 0.0
    not_ready: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.abort or self.retract or self.not_ready)


@dataclass(frozen=True)
class _Setup:
    """A workload and a machine. Capacity is that of the longest request, once, plus ``spare_pages``."""

    prompts: list[list[int]]
    max_new_lens: list[int]
    page_size: int
    spare_pages: int
    step_pages: int
    num_slots: int
    can_chunk: bool
    is_mixed: bool
    lengths: str  # known, bounded or learned
    seed: int
    has_overlap: bool = False  # a step starts before the results of the one before it are there
    max_lora_ids: int | None = None


class _World:
    """Runs one plan as a scheduler would, on KV that is only counted, and checks every step."""

    def __init__(self, setup: _Setup, trouble: _Trouble) -> None:
        self.random = random.Random(setup.seed)
        self.page_size = setup.page_size
        self.trouble = trouble
        self.num_slots = setup.num_slots
        self.can_chunk = setup.can_chunk
        self.is_mixed = setup.is_mixed
        self.has_overlap = setup.has_overlap
        self.max_lora_ids = setup.max_lora_ids
        self.lengths_mode = setup.lengths
        self.lengths = OutputLengths()
        totals = [len(p) + new for p, new in zip(setup.prompts, setup.max_new_lens, strict=True)]
        self.capacity = footprint(max(totals), self.page_size) + setup.spare_pages * self.page_size
        self.step_tokens = setup.step_pages * self.page_size
        if not self.can_chunk:
            self.step_tokens = max(self.step_tokens, max(totals))
        table = TokenTable.from_lists(setup.prompts)
        share_lens = np.array(
            [len(p) if self.random.random() < 0.5 else self.random.randint(1, len(p)) for p in setup.prompts], np.int32
        )
        self.plan: BatchPlan = plan_batch(table, page_size=self.page_size, share_lens=share_lens)
        max_new_len = np.array(setup.max_new_lens, np.int64)
        self.cutter = RunCutter(self.plan, table, max_new_len)
        self.feed = FeedWindow(self.cutter.kv_cost, self.capacity)
        # Alone, a request takes a step per token at most, and being held back or retracted costs some again.
        self.max_steps = 100 + 10 * sum(totals) + _MAX_RETRACTIONS * max(totals)
        self.ledger = PinLedger()
        self.policy = PlannedPolicy()
        self.path_tokens: dict[int, tuple[int, ...]] = {NO_PREFIX: ()}
        self.resident: dict[int, tuple[int, ...]] = {}  # KV that is there: the tokens up to its end
        self.window: RequestWindow[_Request] = RequestWindow()
        self.running: list[_Request] = []
        self.chunked: _Request | None = None
        self.in_flight: list[_Request] = []  # whose next token is there, but not known yet
        self.finished: list[int] = []
        self.num_computed = 0
        self.num_retractions = 0

    # Coming and going

    def take_in(self, run: PlannedRun) -> None:
        start = 0
        for i, end_len in enumerate(run.prefix_end_len.tolist()):
            parent_id, start_len = int(run.prefix_parent[i]), int(run.prefix_start_len[i])
            prefix_id = run.first_prefix + i
            self.ledger.add(
                prefix_id,
                parent_id=parent_id,
                start_len=start_len,
                end_len=end_len,
                num_consumers=int(run.prefix_num_consumers[i]),
                longest_consumer_len=int(run.prefix_longest_consumer_len[i]),
                end_order=(0, int(run.prefix_end_position[i])),
            )
            own = tuple(run.prefix_tokens[start : start + end_len - start_len].tolist())
            self.path_tokens[prefix_id] = self.path_tokens[parent_id] + own
            start += end_len - start_len
        start = 0
        for i, private_len in enumerate(run.private_len.tolist()):
            prefix_id, max_new_len = int(run.request_prefix[i]), int(run.request_max_new_len[i])
            private = tuple(run.private_tokens[start : start + private_len].tolist())
            start += private_len
            num_new_tokens = self.random.choice([max_new_len, self.random.randint(1, max_new_len)])
            known_len = {"known": num_new_tokens, "bounded": max_new_len, "learned": 0}[self.lengths_mode]
            position = run.first_position + i
            self.window.add(
                _Request(
                    position=position,
                    tokens=self.path_tokens[prefix_id] + private,
                    max_new_len=max_new_len,
                    num_new_tokens=num_new_tokens,
                    prefix_id=prefix_id,
                    is_ready=self.random.random() >= self.trouble.not_ready,
                    lora_id=self.adapter(prefix_id, position),
                    output=OutputEstimate(max_new_len=max_new_len, known_len=known_len, kind=0, position=position),
                    scored_behind=self.scored_behind(int(run.request_share_len[i]), prefix_id, private_len),
                )
            )

    def scored_behind(self, share_len: int, prefix_id: int, private_len: int) -> int | None:
        return None if share_len == len(self.path_tokens[prefix_id]) + private_len else share_len

    def free_private(self, request: _Request) -> None:
        """Its private KV is gone; a prefix it had not completed is for the next to compute."""
        self.running.remove(request)
        if request in self.in_flight:
            self.in_flight.remove(request)
        if self.chunked is request:
            self.chunked = None
        for prefix_id in request.led:
            self.ledger.abandon(prefix_id)
        request.led = []
        request.kv_len = request.shared_len = 0
        request.is_admitted = False

    def finish(self, request: _Request) -> None:
        if request.is_admitted:
            self.free_private(request)
        else:
            self.window.remove([request])
        self.lengths.finish(request.output, request.num_generated)
        for prefix_id in self.ledger.finish_consumer(request.prefix_id):
            del self.resident[prefix_id]
        self.finished.append(request.position)
        self.feed.finish([request.position])

    def retract(self, request: _Request) -> None:
        self.free_private(request)
        self.num_retractions += 1
        self.window.add(request)

    def make_trouble(self) -> None:
        for request in self.window:
            request.is_ready = request.is_ready or self.random.random() < 0.3
        is_unlucky = self.random.random() < self.trouble.retract
        if is_unlucky and self.running and self.num_retractions < _MAX_RETRACTIONS:
            self.retract(self.random.choice(self.running))
        unfinished = [*self.window, *self.running]
        if unfinished and self.random.random() < self.trouble.abort:
            self.finish(self.random.choice(unfinished))

    # One step

    @property
    def num_used(self) -> int:
        private = sum(request.num_private(self.page_size) for request in self.running)
        return self.ledger.num_pinned_tokens + private

    def decoding(self) -> list[_Request]:
        """Whoever is known to end with what is in flight runs no further; whoever stops by itself does."""
        ending = [request for request in self.in_flight if request.num_generated + 1 >= request.max_new_len]
        going_on = [request for request in self.running if request is not self.chunked and request not in ending]
        is_short = self.num_used + self.page_size * len(going_on) > self.capacity
        return going_on + ending if is_short else going_on

    def budget(self) -> int:
        return prefill_budget(
            chunk_tokens=self.step_tokens,
            num_decoding=len(self.decoding()),
            kv_free_tokens=self.capacity - self.num_used,
            is_mixed=self.is_mixed,
            page_size=self.page_size,
        )

    def running_kv(self) -> RunningKv:
        admitted, in_pieces = self.running, None
        if self.chunked is not None:
            request = self.chunked
            admitted = [*(r for r in self.running if r is not request), request]
            led_tokens = sum(map(self.ledger.num_tokens, request.led))
            in_pieces = PromptInPieces(request.prefill_len, led_tokens, self.step_tokens, self.is_mixed)
        return project(
            self.lengths,
            [request.output for request in admitted],
            prompt_len=[len(request.tokens) for request in admitted],
            num_generated=[request.num_generated for request in admitted],
            stored_len=[request.kv_len for request in admitted],
            shared_len=[request.shared_len for request in admitted],
            longest_total_len=max((request.total_len for request in admitted), default=0),
            page_size=self.page_size,
            release_lag=int(self.has_overlap),
            in_pieces=in_pieces,
        )

    def view(self) -> SchedulerView:
        in_pieces = 0 if self.chunked is None else self.chunked.prefill_len - self.chunked.kv_len
        return SchedulerView(
            waiting=self.window,
            ledger=self.ledger,
            lengths=self.lengths,
            running=self.running_kv(),
            kv_limit_tokens=self.capacity,
            kv_shared_tokens=self.ledger.num_open_tokens,
            num_free_slots=self.num_slots - len(self.running),
            num_step_tokens=self.budget() - in_pieces,
            chunk_tokens=self.step_tokens,
            can_chunk=self.can_chunk and self.chunked is None,
            is_mixed=self.is_mixed,
            page_size=self.page_size,
            release_lag=int(self.has_overlap),
            lora_ids=frozenset(request.lora_id for request in self.running),
            max_lora_ids=self.max_lora_ids,
        )

    def adapter(self, prefix_id: int, position: int) -> str | None:
        """Of three and the base model: all that share a token have the same."""
        path = self.ledger.path(prefix_id) if prefix_id != NO_PREFIX else ()
        return (None, "x", "y", "z")[(next(iter(path), position)) % 4]

    def make_room(self) -> None:
        """Retract until the decoding rows find their slots: a prompt in pieces first, then the least generated."""
        while self.num_used + self.num_new_slots() > self.capacity:
            decoding = sorted(self.decoding(), key=lambda request: request.num_generated)
            assert self.chunked is not None or len(decoding) > 1, "a request does not fit even alone"
            self.retract(self.chunked or decoding[0])

    def num_new_slots(self) -> int:
        """Slots that the next token of every decoding row takes."""
        return sum(self.page_size for request in self.decoding() if request.kv_len % self.page_size == 0)

    def step(self) -> None:
        budget = self.budget()
        decision = self.policy.decide(self.view()) if budget else Decision()
        assert not budget or self.policy.decide(self.view()) == decision, "deciding twice gave another answer"
        if not self.running and self.window and all(request.is_ready for request in self.window):
            assert decision.admissions, "deadlock: nothing runs and nothing may start"
        is_prefill = bool(budget and (decision.admissions or self.chunked))
        if not is_prefill:
            self.make_room()
        decoding = self.decoding() if self.is_mixed or not is_prefill else []
        num_left = budget
        computing: list[_Request] = []
        if is_prefill and self.chunked is not None:
            request = self.chunked
            rest = request.prefill_len - request.kv_len
            num_tokens = rest if rest <= num_left else num_left // self.page_size * self.page_size
            num_left -= num_tokens
            computing.append(request)
            self.compute(request, num_tokens)
            self.chunked = request if request.kv_len < request.prefill_len else None
        for admission in decision.admissions:
            num_left -= admission.num_tokens
            computing.append(self.admit(admission))
        assert num_left >= 0, "more prompt tokens than the step carries"
        positions = [a.request.position for a in decision.admissions if isinstance(a.request, _Request)]
        assert positions == sorted(positions), "not in plan order"
        for request in decoding:
            request.kv_len += 1
        self.check()
        num_adapters = len({request.lora_id for request in self.running})
        assert self.max_lora_ids is None or num_adapters <= self.max_lora_ids
        launched = decoding + [r for r in computing if r is not self.chunked]
        done, self.in_flight = (self.in_flight, launched) if self.has_overlap else (launched, [])
        for request in done:
            request.num_generated += 1
            if request.num_generated >= request.num_new_tokens:
                self.finish(request)

    def admit(self, admission: Admission) -> _Request:
        request = admission.request
        assert isinstance(request, _Request)
        assert request.is_ready
        assert not request.is_admitted
        cached_len = admission.cached_len
        assert cached_len % self.page_size == 0
        assert cached_len < request.share_len
        if cached_len:
            paths = [self.resident[i] for i in self.ledger.path(request.prefix_id) if i in self.resident]
            assert paths[0][:cached_len] == request.tokens[:cached_len], "reads what is not there"
        self.window.remove([request])
        self.running.append(request)
        request.is_admitted = True
        request.kv_len = request.shared_len = cached_len
        for prefix_id in admission.led_prefix_ids:
            self.ledger.start_computing(prefix_id)
        request.led = list(admission.led_prefix_ids)
        self.compute(request, admission.num_tokens)
        if request.kv_len < request.prefill_len:
            assert self.chunked is None, "two prompts in pieces"
            self.chunked = request
        return request

    def compute(self, request: _Request, num_tokens: int) -> None:
        """Prefill tokens; pin each prefix that it completes."""
        num_prompt = len(request.tokens)
        before = min(request.kv_len, num_prompt)
        request.kv_len += num_tokens
        assert request.kv_len <= request.prefill_len
        self.num_computed += min(request.kv_len, num_prompt) - before
        while request.led and self.ledger.end_len(request.led[0]) <= request.kv_len:
            prefix_id = request.led.pop(0)
            assert prefix_id not in self.resident, "computed twice"
            self.ledger.mark_resident(prefix_id)
            request.shared_len = self.ledger.end_len(prefix_id)
            self.resident[prefix_id] = request.tokens[: request.shared_len]

    def check(self) -> None:
        self.ledger.check_integrity()
        pinned = sum(self.ledger.num_tokens(prefix_id) for prefix_id in self.resident)
        assert pinned == self.ledger.num_pinned_tokens
        assert len(self.running) <= self.num_slots
        assert self.num_used <= self.capacity, "more KV than there is"
        if self.lengths_mode != "learned" and not self.trouble.any:
            assert self.num_retractions == 0, "retracted although every length was known"
        computing = [i for request in self.running for i in request.led]
        assert len(computing) == len(set(computing)), "two requests compute one prefix"
        assert all(self.ledger.state(i) is PrefixState.COMPUTING for i in computing)

    def run(self) -> None:
        """To the end, which must come."""
        for _ in range(self.max_steps):
            while (bounds := self.feed.take_next()) is not None:
                self.take_in(self.cutter.cut(*bounds))
            self.make_trouble()
            self.step()
            if self.feed.is_done:
                return
        raise AssertionError(f"not done after {self.max_steps} steps")


_TAILS = st.lists(st.integers(0, 2), max_size=6)


@st.composite
def _prompts(draw: st.DrawFn, page_size: int) -> list[list[int]]:
    """Prompts that begin as others do: grown from earlier ones, repeated, cut, or new."""
    run = st.tuples(st.integers(0, 1), st.integers(1, page_size + 6)).map(lambda r: [r[0]] * r[1])
    prompts: list[list[int]] = []
    for _ in range(draw(st.integers(1, 22))):
        kind = draw(st.sampled_from(["grow", "grow", "repeat", "cut", "new"])) if prompts else "new"
        base = list(draw(st.sampled_from(prompts))) if kind != "new" else []
        if kind == "cut":
            base = base[: draw(st.integers(1, len(base)))]
        if kind in ("grow", "new"):
            base += draw(run)
        if kind != "repeat":
            base += draw(_TAILS)
        prompts.append(base)
    return prompts


@st.composite
def _setups(draw: st.DrawFn) -> _Setup:
    page_size = draw(st.sampled_from([1, 1, 4, 16]))
    prompts = draw(_prompts(page_size))
    max_new_len = st.integers(1, draw(st.sampled_from([1, 3, 14])))
    return _Setup(
        prompts=prompts,
        max_new_lens=draw(st.lists(max_new_len, min_size=len(prompts), max_size=len(prompts))),
        page_size=page_size,
        spare_pages=draw(st.sampled_from([0, 0, 1, 3, 8, 20, 500])),
        step_pages=draw(st.sampled_from([1, 2, 5, 200])),
        num_slots=draw(st.sampled_from([1, 2, 4, 100])),
        can_chunk=draw(st.booleans()),
        is_mixed=draw(st.booleans()),
        lengths=draw(st.sampled_from(["known", "bounded", "learned"])),
        has_overlap=draw(st.booleans()),
        max_lora_ids=draw(st.sampled_from([None, 1, 2])),
        seed=draw(st.integers(0, 2**20)),
    )


def _run(setup: _Setup, trouble: _Trouble) -> _World:
    world = _World(setup, trouble)
    world.run()
    assert sorted(world.finished) == list(range(world.plan.num_requests)), "not each finished once"
    assert len(world.ledger) == 0
    assert (world.ledger.num_pinned_tokens, world.ledger.num_open_tokens) == (0, 0)
    assert world.resident == {}
    assert len(world.window) == 0
    assert world.running == []
    return world


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_an_exact_duplicate_whose_footprint_is_the_whole_pool_runs_beside_the_prefix_it_reads(
    page_size: int,
) -> None:
    """It reads all pages but its last and needs a copy of that one, while the pinned prefix keeps its own."""
    stem = [0] * page_size
    setup = _Setup(
        prompts=[stem, stem, [*stem, 1]],
        max_new_lens=[page_size, 2 * page_size, 1],
        page_size=page_size,
        spare_pages=0,
        step_pages=200,
        num_slots=100,
        can_chunk=True,
        is_mixed=True,
        lengths="known",
        seed=0,
    )
    _run(setup, _Trouble())


def test_scored_prompts_that_need_the_whole_pool_run() -> None:
    """One reads a page less than the prefix that it ends with, and computes all behind it, while that is pinned."""
    setup = _Setup(
        prompts=[[0] * 7, [0] * 7, [0] * 7, [0] * 5],
        max_new_lens=[1] * 4,
        page_size=4,
        spare_pages=0,
        step_pages=200,
        num_slots=100,
        can_chunk=False,
        is_mixed=True,
        lengths="learned",
        seed=335468,
    )
    _run(setup, _Trouble())


@given(_setups())
@settings(deadline=None, max_examples=sized(80, 250), database=None)
def test_a_quiet_world_computes_exactly_the_optimum_and_leaves_nothing(setup: _Setup) -> None:
    world = _run(setup, _Trouble())
    if world.num_retractions == 0:  # always, unless lengths are learned
        assert world.num_computed == world.plan.optimal_prefill_tokens


@given(_setups())
@settings(deadline=None, max_examples=sized(80, 250), database=None)
def test_aborts_retractions_and_held_back_requests_never_stop_a_plan_nor_overfill_the_pool(
    setup: _Setup,
) -> None:
    _run(setup, _Trouble(abort=0.1, retract=0.15, not_ready=0.3))


@given(_setups())
@settings(deadline=None, max_examples=sized(40, 100), database=None)
def test_a_plan_whose_requests_are_often_retracted_ends(setup: _Setup) -> None:
    _run(setup, _Trouble(retract=0.5))


@given(_setups())
@settings(deadline=None, max_examples=sized(40, 100), database=None)
def test_a_plan_whose_requests_are_mostly_held_back_at_first_ends(setup: _Setup) -> None:
    _run(setup, _Trouble(not_ready=0.8))
