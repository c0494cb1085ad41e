"""An engine in a Ray actor: messages in order in, what has finished out. Runs in the actor's process.

The runtime has an event loop of its own, which a thread drives; Ray calls the methods on another one.

INVARIANT: messages are handled in the order in which they were numbered, whatever order they come in.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batchllm.errors import BatchLLMError, ConfigError, EngineDiedError, EngineError
from batchllm.host.messages import CloseJob, GivePlanned, OpenJob, Submit, Withdraw
from batchllm.offline.fingerprint import model_identity
from batchllm.offline.runtime import FinishedRequests, Runtime, RuntimeInfo

_NO_JOB = -1
"""Number of a job of the actor's own, which has no rows."""
_PACKAGES = {"batchllm": "sglang-batchllm", "sglang": "sglang"}

Message = OpenJob | Submit | Withdraw | CloseJob | GivePlanned
Output = tuple[int, FinishedRequests] | EngineDiedError
"""Number of a job and what of it has finished; or that nothing more will come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What has to be the same on all nodes, or answers differ.

    Attributes:
        versions: Versions of packages, by name.
        model_path: The model: a folder or a hub name.
        model: What tells it from others.
    """

    versions: dict[str, str]
    model_path: str
    model: str

    @classmethod
    def here(cls, model_path: str) -> Software:
        """What this process would run."""
        versions = {name: importlib.metadata.version(package) for name, package in _PACKAGES.items()}
        return cls(versions=versions, model_path=model_path, model=model_identity(model_path))

    def check_here(self, node: str) -> None:
        """Compare it with what is on this node.

        Raises:
            ConfigError: Something differs, or the model is not there; names the node.
        """
        if os.sep in self.model_path and not os.path.exists(self.model_path):
            raise ConfigError(
                f"node {node}: {self.model_path} is not there; the model must be at this path on every node"
            )
        here = Software.here(self.model_path)
        for name, version in self.versions.items():
            if here.versions[name] != version:
                raise ConfigError(
                    f"node {node}: {name} is {here.versions[name]}, and {version} where the job was started; "
                    f"install the same on every node"
                )
        if here.model != self.model:
            raise ConfigError(
                f"node {node}: the model at {self.model_path} is not the one that is there where the job was started"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An engine has started.

    Attributes:
        info: Fixed numbers of the engine.
        has_tokenizer: False where it runs on token ids only.
        pid: The actor's process.
        node_id: Ray's name of its node.
    """

    info: RuntimeInfo
    has_tokenizer: bool
    pid: int
    node_id: str


def free_port() -> int:
    """A port of this machine that nobody has, for engines that would else draw the same one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def own_address() -> str:
    """Address by which other nodes reach this one."""
    address: str = importlib.import_module("ray").util.get_node_ip_address()
    return address


class EngineActor:
    """Starts an engine and speaks for it.

    Args:
        start: Starts it.
        software: What is to be on this node; None: anything.
    """

    def __init__(self, start: Callable[[], Runtime], software: Software | None) -> None:
        self._start, self._software, self._node = start, software, socket.gethostname()
        self._runtime: Runtime | None = None
        self._numbers: dict[int, int] = {}  # of jobs: the driver's -> the runtime's
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._early: dict[int, Message] = {}
        self._next_number = 0
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._is_serving = threading.Event()

    # Called by Ray, on its loop

    async def node(self) -> str:
        """Host name of its node."""
        return self._node

    async def start(self) -> Started | BatchLLMError:
        """Start the engine; says what is wrong instead of raising it, since Ray would put a traceback around it."""
        self._ray_loop = asyncio.get_running_loop()
        try:
            return await asyncio.to_thread(self._start_here)
        except BatchLLMError as error:
            where = "" if str(error).startswith("node ") else f"node {self._node}: "
            return type(error)(f"{where}{error}") if isinstance(error, ConfigError | EngineError) else error

    def _start_here(self) -> Started:
        if self._software is not None:
            self._software.check_here(self._node)
        runtime = self._runtime = self._start()
        threading.Thread(target=self._serve, args=(runtime,), name="batchllm-serve", daemon=True).start()
        self._is_serving.wait()
        return Started(
            info=runtime.info,
            has_tokenizer=runtime.tokenizer is not None,
            pid=os.getpid(),
            node_id=importlib.import_module("ray").get_runtime_context().get_node_id(),
        )

    async def send(self, number: int, message: Message) -> None:
        """A message; numbers count from 0."""
        self._early[number] = message
        while self._next_number in self._early:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, self._early.pop(self._next_number))
            self._next_number += 1

    async def receive(self) -> list[Output]:
        """Wait until something has finished; all that has since the last call."""
        outputs = [await self._outputs.get()]
        while not self._outputs.empty():
            outputs.append(self._outputs.get_nowait())
        return outputs

    async def call_tokenizer(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Result of a method of the engine's tokenizer."""
        assert self._runtime is not None
        return await asyncio.to_thread(getattr(self._runtime.tokenizer, method), *args, **kwargs)

    async def shutdown(self) -> None:
        """End the engine and all its processes."""
        if self._runtime is not None:
            await asyncio.to_thread(self._runtime.shutdown)

    # In the thread and on the loop of the runtime

    def _serve(self, runtime: Runtime) -> None:
        with contextlib.suppress(EngineDiedError):  # its loop is closed: it has been shut down
            for _ in runtime.iterate(self._handle_all(runtime)):
                pass

    async def _handle_all(self, runtime: Runtime) -> AsyncGenerator[None, None]:
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._is_serving.set()
        if runtime.info.live_url is not None:  # it may die while there is no job that would hear of it
            self._inbox.put_nowait(OpenJob(_NO_JOB))
        while True:
            message = await self._inbox.get()
            try:
                self._handle(runtime, message)
            except EngineDiedError as death:
                self._put(death)
            yield

    def _handle(self, runtime: Runtime, message: Message) -> None:
        match message:
            case OpenJob(job_id):
                self._numbers[job_id] = number = runtime.open_job()
                self._readers[job_id] = asyncio.create_task(self._read(runtime, job_id, number))
            case Submit(job_id, requests):
                runtime.submit(self._numbers[job_id], requests)
            case Withdraw(job_id):
                runtime.withdraw(self._numbers[job_id])
            case CloseJob(job_id, is_complete):
                self._readers.pop(job_id).cancel()
                runtime.close_job(self._numbers.pop(job_id), is_complete=is_complete)
            case GivePlanned(share):
                runtime.give_planned(share)

    async def _read(self, runtime: Runtime, job_id: int, number: int) -> None:
        try:
            while True:
                self._put((job_id, await runtime.receive(number)))
        except EngineDiedError as death:
            self._put(death)
        except Exception as error:  # whatever it is: the driver would wait for ever if it did not hear of it
            self._put(EngineDiedError(f"{type(error).__name__}: {error}"))

    def _put(self, output: Output) -> None:
        self._ray_loop.call_soon_threadsafe(self._outputs.put_nowait, output)
