"""Whose turn is it, when live and planned requests wait for the same KV memory?

Knows: counts of prompt tokens and of steps. Must not know: requests, KV, clocks.

INVARIANT: while both wait, planned requests are behind by less than a step's live tokens when their turn comes, and a
turn in which nothing fits ends after `_PATIENCE_STEPS`: neither kind waits for the other for ever.
"""

from __future__ import annotations

_LIVE_SHARE = 3
"""Prompt tokens of live requests for each planned one: somebody waits for a live request, a job has time."""
_PATIENCE_STEPS = 64


class Turns:
    """Live requests go first; whenever they have had three times the tokens of planned ones, those go first.

    Attributes:
        live_share: Prompt tokens of live requests for each planned one; less than three times while a batch is late.
    """

    def __init__(self) -> None:
        self.live_share: float = _LIVE_SHARE
        self._num_live_ahead = 0.0
        self._num_steps_in_vain = 0

    def give_planned(self, share: float) -> None:
        """Let planned requests have this part of the prompt tokens at least, a quarter anyhow."""
        self.live_share = min(_LIVE_SHARE, 1.0 / share - 1.0)

    @property
    def is_planned(self) -> bool:
        """Planned requests go first, and what becomes free is kept for them."""
        return self._num_live_ahead > 0

    def reset(self) -> None:
        """One of the two does not wait any more: live requests go first."""
        self._num_live_ahead, self._num_steps_in_vain = 0.0, 0

    def add(self, num_live_tokens: int, num_planned_tokens: int) -> None:
        """A step has taken so many prompt tokens of each while both waited; of neither, the turn was wasted."""
        if not num_live_tokens and not num_planned_tokens:
            self.wait()
            return
        # What planned requests got long ago does not count against them: they are ahead by their last step at most.
        floor = -self.live_share * num_planned_tokens if num_planned_tokens else self._num_live_ahead
        self._num_live_ahead = max(self._num_live_ahead + num_live_tokens - self.live_share * num_planned_tokens, floor)
        self._num_steps_in_vain = 0

    def wait(self) -> None:
        """Record that the side whose turn it is found no room in this step, while both wait."""
        self._num_steps_in_vain += 1
        if self._num_steps_in_vain >= _PATIENCE_STEPS:
            self._num_live_ahead = 0 if self.is_planned else 1
            self._num_steps_in_vain = 0
