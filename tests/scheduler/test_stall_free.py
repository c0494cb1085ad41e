"""Claims about steps under a bound, on traces of a machine whose times are known: Sarathi-Serve's algorithm, and a plan
beside it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.scheduler.stall_free import NO_LIVE_STRETCH, PATIENCE_STEPS, PLANNED_SHARE, StallFree, Work
from batchllm.scheduler.step_time import StepLoad, StepTimeModel
from tests.scheduler.test_step_time import with_rows
from tests.sizes import sized

_EXAMPLES = sized(40, 600)


@dataclass
class _Row:
    """A request: prompt tokens still to be computed, those computed, and tokens still to be generated."""

    num_left: int
    num_output: int
    num_done: int = 0

    @property
    def kv_len(self) -> int:
        return self.num_done + 1


@dataclass
class _Machine:
    """Runs what `StallFree` composes; times are those of the model that it predicts by."""

    bound_s: float
    page_size: int
    live: list[_Row] = field(default_factory=list)
    planned: list[_Row] = field(default_factory=list)
    live_queue: list[_Row] = field(default_factory=list)
    planned_queue: list[_Row] = field(default_factory=list)
    num_waited: int = 0

    def __post_init__(self) -> None:
        self.model = _model()
        self.stall_free = StallFree(self.bound_s, self.model)

    @property
    def is_done(self) -> bool:
        return not (self.live or self.planned or self.live_queue or self.planned_queue)

    def work(self) -> Work:
        return Work(
            live=StepLoad(len(self.live), sum(row.kv_len for row in self.live)),
            live_waits=bool(self.live_queue),
            live_cached_len=self.live_queue[0].num_done if self.live_queue else 0,
            planned_kv_lens=np.array([row.kv_len for row in self.planned], np.int64),
            planned_waits=bool(self.planned_queue),
            planned_cached_len=self.planned_queue[0].num_done if self.planned_queue else 0,
            page_size=self.page_size,
        )

    def step(self) -> None:
        """Run a step, and hold what is claimed of it."""
        work, was_overdue = self.work(), self.stall_free.is_overdue
        live_tokens = self.stall_free.live_tokens(work)
        first_live = self.live_queue[0] if self.live_queue else None
        live_spent, new_live = _prefill(self.live_queue, live_tokens)
        planned_tokens = self.stall_free.planned_tokens(work, live_spent)
        planned_spent, new_planned = _prefill(self.planned_queue, planned_tokens)
        num_rows = self.stall_free.planned_rows(work, live_spent, planned_spent)
        load = with_rows(work.live, num_rows, int(work.planned_kv_lens[:num_rows].sum()))
        if live_spent:
            load = load.with_prefill(live_spent, work.live_cached_len)
        if planned_spent:
            load = load.with_prefill(planned_spent, work.planned_cached_len)
        assert live_tokens % self.page_size == planned_tokens % self.page_size == 0
        limit = self.bound_s if work.live.num_decode_rows else NO_LIVE_STRETCH * self.bound_s * self.model.margin
        is_exempt = was_overdue or self.model.upper(work.live) > self.bound_s
        is_exempt |= not work.live.num_decode_rows and live_spent <= self.page_size and num_rows <= 1
        if not is_exempt:
            assert self.model.upper(load) <= limit * (1 + 1e-6)
        if first_live is not None and live_spent:
            assert first_live.num_done > 0  # the prompt in pieces, or the first that came, before any other
        carries_planned = bool(num_rows or planned_spent)
        self.num_waited = self.num_waited + 1 if work.has_planned and not carries_planned else 0
        assert self.num_waited <= PATIENCE_STEPS
        self.stall_free.note(has_planned=work.has_planned, carries_planned=carries_planned)
        for row in [*self.live, *self.planned[:num_rows]]:  # every live row, in every step
            row.num_done += 1
            row.num_output -= 1
        assert load.num_decode_rows or live_spent or planned_spent, "a step that does nothing"
        self.live = [row for row in self.live + new_live if row.num_output > 0]
        self.planned = [row for row in self.planned + new_planned if row.num_output > 0]


def _prefill(queue: list[_Row], num_tokens: int) -> tuple[int, list[_Row]]:
    """Compute prompts in order; returns the tokens computed, and the requests whose prompts are complete."""
    num_spent, complete = 0, []
    while queue and num_spent < num_tokens:
        row = queue[0]
        num = min(row.num_left, num_tokens - num_spent)
        row.num_left -= num
        row.num_done += num
        num_spent += num
        if row.num_left == 0:
            complete.append(queue.pop(0))
    return num_spent, complete


def _model() -> StepTimeModel:
    """Of a machine whose times are linear and without noise."""
    model, draw = StepTimeModel(), random.Random(0)
    for _ in range(300):
        rows = draw.randint(0, 200)
        load = StepLoad(rows, rows * draw.randint(1, 800))
        if draw.random() < 0.5 or not rows:
            load = load.with_prefill(draw.randint(1, 1000), draw.randint(0, 2000))
        seconds = 4e-3 + 1.5e-4 * load.num_decode_rows + 1e-7 * load.decode_kv_tokens
        model.observe(load, seconds + 8e-5 * load.num_prefill_tokens + 5e-9 * load.prefill_pairs)
    return model


_SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 60))


@settings(max_examples=_EXAMPLES, deadline=None)
@given(
    planned=st.lists(_SIZES, max_size=60),
    arrivals=st.lists(st.tuples(st.integers(0, 30), _SIZES), max_size=30),
    bound_ms=st.sampled_from([6, 10, 25, 60]),
    page_size=st.sampled_from([1, 16]),
)
def test_every_step_keeps_the_bound_and_all_work_is_done(
    planned: list[tuple[int, int]],
    arrivals: list[tuple[int, tuple[int, int]]],
    bound_ms: int,
    page_size: int,
) -> None:
    """Each live row decodes in each step; predicted times stay within the bound; nobody waits for ever.

    Rows that came before a flood and rows that come with it: the claims of each step are in `_Machine.step`.
    """
    machine = _Machine(bound_ms / 1e3, page_size)
    machine.planned_queue = [_Row(prompt, output) for prompt, output in planned]
    coming = [row for gap, row in arrivals for row in [(gap, row)]]
    wait = 0
    for _ in range(1_000_000):
        while coming and wait >= coming[0][0]:
            _, (prompt, output) = coming.pop(0)
            machine.live_queue.append(_Row(prompt, output))
            wait = 0
        wait += 1
        if machine.is_done:
            if not coming:
                return
            continue
        machine.step()
    raise AssertionError("work is left")


@pytest.mark.parametrize("share", [PLANNED_SHARE, 0.4])
def test_a_flood_of_live_prompts_leaves_the_share_of_the_time_to_the_plan(share: float) -> None:
    machine = _Machine(0.030, 1)
    machine.stall_free.planned_share = share
    machine.planned = [_Row(0, 10_000, 300) for _ in range(100)]
    machine.live_queue = [_Row(500, 20) for _ in range(200)]
    shares = []
    while machine.live_queue:
        work = machine.work()
        tokens = machine.stall_free.live_tokens(work)
        num_rows = machine.stall_free.planned_rows(work, tokens, 0)
        load = work.live.with_prefill(tokens, 0) if tokens else work.live
        more = num_rows + 1  # a row is not divided
        kv_tokens = int(work.planned_kv_lens[:more].sum())  # they grow by a token in each step that carries them
        beside = machine.model.upper(with_rows(load, more, kv_tokens)) - machine.model.upper(load)
        shares.append(beside / machine.bound_s)
        machine.step()
    assert min(shares) > 0.8 * share  # live rows that were admitted grow by a token a step


def test_a_step_in_which_no_live_row_decodes_may_take_more_than_the_bound() -> None:
    machine = _Machine(0.020, 1)
    machine.planned_queue = [_Row(100_000, 1)]
    tokens = machine.stall_free.planned_tokens(machine.work(), 0)
    seconds = machine.model.predict(StepLoad().with_prefill(tokens, 0))
    assert 0.9 * NO_LIVE_STRETCH < seconds / 0.020 <= NO_LIVE_STRETCH


def test_planned_prompts_have_steps_for_themselves_beside_live_rows() -> None:
    """Rows that fill a step leave none to prompts; prompts come before rows that do not."""
    machine = _Machine(0.030, 1)
    machine.live, machine.planned_queue = [_Row(0, 100, 300)], [_Row(10_000, 1)]
    for num_rows in (200, 20):
        machine.planned = [_Row(0, 100, 300) for _ in range(num_rows)]
        work = machine.work()
        tokens = machine.stall_free.planned_tokens(work, 0)
        rows = machine.stall_free.planned_rows(work, 0, tokens)
        assert (tokens == 0) == (rows > 0) == (num_rows == 200)


def test_a_chunk_may_be_nothing_where_live_rows_take_all_the_time() -> None:
    machine = _Machine(0.010, 1)
    machine.live = [_Row(0, 10, 300) for _ in range(60)]
    machine.live_queue = [_Row(100, 1)]
    machine.planned_queue = [_Row(100, 1)]
    work = machine.work()
    assert machine.stall_free.live_tokens(work) == 0
    assert machine.stall_free.planned_tokens(work, 0) == machine.stall_free.planned_rows(work, 0, 0) == 0
