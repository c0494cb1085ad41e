"""An engine in a Ray actor as the driver sees it. On the driver's event loop.

Knows: the actor's methods, and how Ray says that it is gone. Must not know: jobs, plans, other engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from typing import Any

from batchllm.distributed.actor import EngineActor, Message, Output, Software, Started
from batchllm.distributed.cluster import Cluster, ClusterLostError, Resources
from batchllm.errors import BatchLLMError, EngineDiedError, EngineError
from batchllm.host.messages import CloseJob, Submit, Withdraw
from batchllm.offline.runtime import Runtime

_STOP_TIMEOUT_S = 40.0
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
"""What tells a terminal to change its color."""
_NAMES = ("class_name:", "actor_id:", "namespace:")
"""Begin lines that say what only Ray knows."""


class Replica:
    """An actor with an engine, or on the way to it.

    Args:
        number: Its number; no two of a driver have the same.
        cluster: Where it is to be.
        resources: What it takes of its node.
        start: Starts the engine, in the actor.
        software: What is to be on its node.

    Attributes:
        number: As given.
        jobs: Jobs that it has been told of.
        node: Host name of its node; None while it waits for one.
        started: Numbers of the engine, once it has started.
    """

    def __init__(
        self,
        number: int,
        cluster: Cluster,
        resources: Resources,
        start: Callable[[], Runtime],
        software: Software | None,
    ) -> None:
        self.number = number
        self.jobs: set[int] = set()
        self.node: str | None = None
        self.started: Started | None = None
        self._in_flight: dict[int, int] = {}  # requests sent and not sent back, by job
        self._drain = asyncio.Event()
        self._cluster, self._ray = cluster, cluster.ray
        self._num_sent = 0
        actor = self._ray.remote(EngineActor).options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy="SPREAD",
        )
        self._actor = actor.remote(start, software)

    async def start(self) -> Started:
        """Wait until the engine has started.

        Raises:
            ClusterLostError: The connection to Ray is gone.
            BatchLLMError: It does not; says why, and on which node.
        """
        try:
            self.node = await self._ask("node")
            started: Started | BatchLLMError = await self._ask("start")
        except self._ray.exceptions.RayError as error:
            raise EngineError(f"an engine did not start: {words_of(error)}") from error
        if isinstance(started, BatchLLMError):
            raise started
        self.started = started
        return started

    @property
    def live_url(self) -> str | None:
        """Where it answers live requests; None where it answers none, has not started, or begins nothing more."""
        return None if self.started is None or self.is_draining else self.started.info.live_url

    def send(self, message: Message) -> None:
        """Send a message; they arrive in this order. That the actor is gone, `receive` says."""
        if isinstance(message, Submit):
            self._in_flight[message.job_id] = self._in_flight.get(message.job_id, 0) + len(message.requests.run)
        elif isinstance(message, CloseJob):
            self._in_flight.pop(message.job_id, None)
        if self._cluster.is_connected:
            with contextlib.suppress(ConnectionError):
                self._actor.send.remote(self._num_sent, message)
        self._num_sent += 1

    @property
    def is_draining(self) -> bool:
        """It is to begin nothing more."""
        return self._drain.is_set()

    @property
    def _is_drained(self) -> bool:
        return self.is_draining and not any(self._in_flight.values())

    def drain(self) -> None:
        """Its node is about to go: what it has not begun comes back as aborted."""
        self._drain.set()
        for job_id in self.jobs:
            self.send(Withdraw(job_id))

    async def receive(self) -> list[Output]:
        """Wait for what has finished; nothing comes where it is draining and has sent all back.

        Raises:
            ClusterLostError: The connection to Ray is gone.
            EngineError: The actor is gone.
        """
        received = asyncio.ensure_future(self._receive())
        drain = asyncio.ensure_future(self._drain.wait())
        try:
            while not received.done() and not self._is_drained:
                waits_for = {received} if self.is_draining else {received, drain}
                await asyncio.wait(waits_for, return_when=asyncio.FIRST_COMPLETED)
            if not received.done():
                return []
            for output in received.result():
                if not isinstance(output, EngineDiedError) and output[0] in self._in_flight:
                    self._in_flight[output[0]] -= len(output[1].positions)
            return received.result()
        finally:
            received.cancel()
            drain.cancel()

    async def _receive(self) -> list[Output]:
        try:
            outputs: list[Output] = await self._ask("receive")
        except self._ray.exceptions.RayError as error:
            raise EngineError(words_of(error)) from error
        return outputs

    async def call_tokenizer(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Result of a method of the engine's tokenizer.

        Raises:
            ClusterLostError: The connection to Ray is gone.
            EngineError: The actor is gone.
            Exception: What the method raises.
        """
        try:
            return await self._ask("call_tokenizer", method, args, kwargs)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise EngineError(words_of(error)) from error

    async def _ask(self, method: str, *args: Any) -> Any:
        """Result of a method of the actor.

        Raises:
            ClusterLostError: The connection to Ray is gone, which Ray's client does not say by an error of Ray's.
            RayError: The actor is gone.
        """
        if not self._cluster.is_connected:
            raise ClusterLostError("it was closed")
        try:
            return await getattr(self._actor, method).remote(*args)
        except ConnectionError as error:
            raise ClusterLostError(words_of(error)) from error

    async def shutdown(self) -> None:
        """End the engine, if it still answers, and the actor; one that has not started has no time for that."""
        if self.started is None:
            self.kill()
            return
        try:
            with contextlib.suppress(self._ray.exceptions.RayError, ClusterLostError, TimeoutError):
                await asyncio.wait_for(self._ask("shutdown"), _STOP_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the actor at once; its engine's processes end with it. Without a connection Ray does so by itself."""
        if self._cluster.is_connected:
            with contextlib.suppress(ConnectionError):
                self._ray.kill(self._actor)


def words_of(error: Exception) -> str:
    """What Ray says of an actor, in one line: of a traceback, what happened and what came of it."""
    text = _COLOR.sub("", str(getattr(error, "error_msg", None) or error))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(_NAMES)]
    if "traceback" in text.lower() and len(lines) > 1:
        lines = [f"{lines[0].partition(', ')[0]}:", lines[-1]]
    return " ".join(" ".join(lines).split())[:400] or type(error).__name__
