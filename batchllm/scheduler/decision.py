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
