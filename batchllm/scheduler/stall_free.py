"""What may a step carry, so that nobody who reads a stream waits longer than a bound for the next token?

Sarathi-Serve's stall-free batching (Agrawal et al., OSDI 2024, arXiv 2403.02310, section 4, algorithm 3), with a bound
in seconds in place of a constant number of tokens, and with a plan beside the live requests. A step takes, in this
order: every live row that decodes; prompt tokens of live requests, of a prompt in pieces first; planned rows that
decode, in plan order, or prompt tokens of planned requests. Each takes what time is left; that may be nothing.

Knows counts and the step-time model. Must not know requests, KV, clocks.

INVARIANT: a step in which a live row decodes is predicted to stay within the bound, unless its live rows alone exceed
it, or planned work was overdue; while planned work waits it is in one step of `PATIENCE_STEPS` at least.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchllm.scheduler.step_time import StepLoad, StepTimeModel
from batchllm.tokens import page_floor

PLANNED_SHARE = 1 / 8
"""Part of each step that live prompts leave to planned work, while there is some and no batch is late."""
PATIENCE_STEPS = 64
"""Planned work that no step has carried for so long is carried by the next, whatever that takes."""
NO_LIVE_STRETCH = 1.8
"""A step in which no live row decodes may take so many times the bound: a request that arrives waits for its end."""

PROMPT_STEP = 1 / 2
"""A step that carries live prompts takes this part of the bound, or more if they need it: a first token waits for the
whole step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to do.

    Attributes:
        live: The live rows that decode.
        live_waits: Whether live prompts are to be computed.
        live_cached_len: Tokens in front of the first of these that have KV.
        planned_kv_lens: Tokens that each planned row which could decode attends to, in plan order. int64[num_rows].
        planned_waits: Whether planned prompts are to be computed.
        planned_cached_len: Tokens in front of the first of these that have KV.
        mixes: Whether the step carries rows that decode beside prompt tokens; else prompts make them wait.
        page_size: Prompts are cut at a page.
    """

    live: StepLoad
    live_waits: bool
    live_cached_len: int = 0
    planned_kv_lens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    planned_waits: bool = False
    planned_cached_len: int = 0
    mixes: bool = True
    page_size: int = 1

    @property
    def has_live(self) -> bool:
        """Somebody waits for a token."""
        return self.live_waits or self.live.num_decode_rows > 0

    @property
    def has_planned(self) -> bool:
        """The plan has something to do."""
        return self.planned_waits or len(self.planned_kv_lens) > 0


class StallFree:
    """Budgets of steps under a bound.

    Args:
        bound_s: Most seconds of a step in which a live row decodes.
        model: Predicts them.

    Attributes:
        planned_share: Part of each step that live prompts leave to planned work, while there is some.
    """

    def __init__(self, bound_s: float, model: StepTimeModel) -> None:
        self.bound_s = bound_s
        self.model = model
        self.planned_share = PLANNED_SHARE
        self._num_steps_without_planned = 0

    @property
    def is_overdue(self) -> bool:
        """Planned work has waited for as many steps as it may."""
        return self._num_steps_without_planned >= PATIENCE_STEPS

    def limit_s(self, work: Work) -> float:
        """Seconds up to which a step may be predicted, with the margin."""
        if work.live.num_decode_rows:
            return self.bound_s
        # Nobody's next token waits for it, so it may take as long on the average.
        return NO_LIVE_STRETCH * self.bound_s * self.model.margin

    def observe(self, load: StepLoad, seconds: float, *, has_live_row: bool) -> None:
        """A step has taken so long.

        Args:
            load: What it carried.
            seconds: How long it took.
            has_live_row: Whether a live row decoded in it.
        """
        is_bounded = has_live_row and self.model.upper(load) > self.bound_s / 2
        self.model.observe(load, seconds, is_bounded=is_bounded)

    def live_tokens(self, work: Work) -> int:
        """Prompt tokens of live requests that the coming step may carry.

        Where no live row decodes nobody waits for the step, and the first token is soonest if it carries the whole
        prompt; a page at least.
        """
        if not work.live_waits:
            return 0
        limit = self.limit_s(work)
        if work.has_planned:
            limit *= 1.0 - self.planned_share
        num_tokens = self.model.prefill_that_fits(work.live, work.live_cached_len, limit)
        if not work.live.num_decode_rows:
            num_tokens = max(num_tokens, work.page_size)
        return page_floor(num_tokens, work.page_size)

    def planned_tokens(self, work: Work, num_live_tokens: int) -> int:
        """Prompt tokens of planned requests that the coming step may carry.

        A step with prompts costs more than one without, whatever their length: where steps are mixed, planned prompts
        are computed in few steps and have these for themselves. As long as the rows that could decode fill a step,
        there are none.

        Args:
            work: As of `live_tokens`.
            num_live_tokens: Prompt tokens of live requests that the step will carry.
        """
        if not work.planned_waits:
            return 0
        load, limit = self._live_load(work, num_live_tokens)
        num_rows = len(work.planned_kv_lens)
        if work.mixes and self.model.rows_that_fit(load, work.planned_kv_lens, limit) < num_rows:
            return 0
        num_tokens = self.model.prefill_that_fits(load, work.planned_cached_len, limit)
        if not num_rows and (self.is_overdue or not work.has_live):
            num_tokens = max(num_tokens, work.page_size)
        return page_floor(num_tokens, work.page_size)

    def planned_rows(self, work: Work, num_live_tokens: int, num_planned_tokens: int) -> int:
        """How many of ``planned_kv_lens``, from the first on, may decode in the coming step, or in the one after it
        where prompts make rows wait.

        Args:
            work: As of `live_tokens`.
            num_live_tokens: Prompt tokens of live requests that the step will carry.
            num_planned_tokens: Those of planned requests.
        """
        load, limit = self._live_load(work, num_live_tokens)
        if work.mixes and num_planned_tokens:
            load = load.with_prefill(num_planned_tokens, work.planned_cached_len)
        num_rows = self.model.rows_that_fit(load, work.planned_kv_lens, limit)
        if num_rows == 0 and len(work.planned_kv_lens) and (self.is_overdue or not work.has_live):
            return 1
        return num_rows

    def _live_load(self, work: Work, num_live_tokens: int) -> tuple[StepLoad, float]:
        """What live requests make of a step, and the seconds that it may take with planned work."""
        load = work.live.with_prefill(num_live_tokens, work.live_cached_len) if num_live_tokens else work.live
        limit = self.limit_s(work)
        if work.live_waits:
            limit = min(limit, max(PROMPT_STEP * self.bound_s, self.model.upper(load) + self.planned_share * limit))
        return load, limit

    def note(self, *, has_planned: bool, carries_planned: bool) -> None:
        """A step is about to run.

        Args:
            has_planned: Whether planned work was there.
            carries_planned: Whether the step does some of it.
        """
        self._num_steps_without_planned = (
            self._num_steps_without_planned + 1 if has_planned and not carries_planned else 0
        )
