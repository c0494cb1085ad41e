"""What is asked of a scheduler beside generation, where it fails: whoever asked hears of it, and the scheduler lives.

(Upstream: ``Scheduler.process_input_requests``, which such an exception ends, and ``FanOutCommunicator``, which then
waits for an answer that never comes.)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import (
    BaseReq,
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    ShutdownReq,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.utils import TypeBasedDispatcher

logger = logging.getLogger(__name__)

_NOT_CONTROL = (
    *(TokenizedGenerateReqInput, BatchTokenizedGenerateReqInput),
    *(TokenizedEmbeddingReqInput, BatchTokenizedEmbeddingReqInput, ShutdownReq),
)


class ControlFault(BaseReq):
    """Scheduler to whoever asked: it could not be done.

    Attributes:
        asked: Name of the type of the message that asked for it.
        message: Why not.
    """

    asked: str
    message: str


def guard(handlers: dict[type, Callable[[Any], Any]]) -> None:
    """Have faults of handlers be answers. Runs in the scheduler's process.

    Args:
        handlers: SGLang's, by the type of what they handle; changed.
    """
    for kind, handler in handlers.items():
        if kind not in _NOT_CONTROL:
            handlers[kind] = _guarded(handler)


def _guarded(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def handle(message: Any) -> Any:
        try:
            return handler(message)
        except Exception as error:  # SGLang raises many kinds; whatever it is, it belongs to who asked
            asked = type(message).__name__
            logger.exception("%s could not be done", asked)
            return ControlFault(asked=asked, message=str(error) or type(error).__name__)

    return handle


class HearingCommunicator(FanOutCommunicator[Any]):
    """SGLang's, which also hears that something could not be done. Runs in the engine's or the server's process."""

    asked = ""
    """Name of the type of the message that was sent last."""

    @classmethod
    def take_places(cls, manager: Any) -> list[HearingCommunicator]:
        """Be all communicators of a tokenizer manager; returns them."""
        found = [value for value in vars(manager).values() if type(value) is FanOutCommunicator]
        for communicator in found:
            communicator.__class__ = cls
        pairs = [(ControlFault, lambda fault: [one.hear(fault) for one in found])]
        manager._result_dispatcher += TypeBasedDispatcher(pairs)
        return found

    async def __call__(self, obj: Any) -> Any:
        """SGLang's answers.

        Raises:
            ValueError: It could not be done.
        """
        self.asked = type(obj).__name__
        answers = await super().__call__(obj)
        for answer in answers:
            if isinstance(answer, ControlFault):
                raise ValueError(answer.message)
        return answers

    def hear(self, fault: ControlFault) -> None:
        """Something could not be done; whether it was asked for here."""
        if fault.asked == self.asked:
            self.handle_recv(fault)

    def forget(self) -> None:
        """What was asked for is not answered any more: whoever asks next must not wait for that."""
        self._result_event = self._result_values = self._result_fan_out = None


def guard_profiler(manager: Any) -> None:
    """Have a profile that fails in a step end the profile, and not the scheduler. Runs in the scheduler's process.

    Args:
        manager: SGLang's ``SchedulerProfilerManager``; changed.
    """
    step = manager._profile_batch_predicate

    def guarded(batch: Any) -> None:
        try:
            step(batch)
        except Exception as error:  # of a folder that cannot be written, a kind of step, or a kind of activity
            logger.error("the profile is given up: %s: %s", type(error).__name__, error)
            if manager.torch_profiler is not None:
                with contextlib.suppress(Exception):  # it may be stopped already
                    manager.torch_profiler.stop()
            manager.torch_profiler = None
            manager.profile_in_progress = manager.profile_by_stage = False
            manager.profiler_start_forward_ct = manager.profiler_target_forward_ct = None

    manager._profile_batch_predicate = guarded
