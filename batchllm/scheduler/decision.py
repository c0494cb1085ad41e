"""What a decision returns: values, to be carried out by whoever holds the KV."""

from __future__ import annotations

from dataclasses import dataclass

from batchllm.scheduler.view import WaitingRequest


@dataclass(frozen=True, slots=True)
class Admission:
    """Start this request in this step.

    Attributes:
        request: The one to start.
        cached_len: Prompt tokens whose KV it reads from resident prefixes.
        num_tokens: Tokens of it to compute in this step.
        led_prefix_ids: Planned prefixes that it computes for the others, outermost first.
    """

    request: WaitingRequest
    cached_len: int
    num_tokens: int
    led_prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Requests to start in this step, in plan order.

    Attributes:
        admissions: The requests.
        lacks_room: True where the first request that may start does not fit: it waits for KV to become free.
    """

    admissions: tuple[Admission, ...] = ()
    lacks_room: bool = False


class SettledDecision:
    """A decision for want of room stays true until KV becomes free: it need not be made in every step."""

    def __init__(self) -> None:
        self._decision: Decision | None = None
        self._num_running = 0

    def get(self, num_running: int) -> Decision | None:
        """The decision, if it was made beside as many requests; None if one has to be made."""
        return self._decision if num_running == self._num_running else None

    def keep(self, decision: Decision, num_running: int) -> None:
        """This decision was made beside so many requests and will be the same until `invalidate`."""
        self._decision, self._num_running = decision, num_running

    def invalidate(self) -> None:
        """Requests or prefixes have changed, or KV has become free."""
        self._decision = None
