"""Keeps the engine of a server up: its processes are started again, behind the same HTTP server, when one has ended.
Runs in the server's process.

(Upstream: ``srt/entrypoints/engine.py``, which ends with its processes.)

Live requests in flight are answered with 503; what comes while the engine is down is asked to come again. Jobs are told
that the engine has died, and wait for the next.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.utils.watchdog import SubprocessWatchdog
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchllm.errors import EngineError
from batchllm.srt.entrypoints.processes import EngineProcesses
from batchllm.srt.managers.detokenizer_manager import run_detokenizer_process
from batchllm.srt.managers.scheduler_process import run_server_scheduler_process

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 20
"""What clients are told to wait; about what a start takes."""
_MAX_FRUITLESS = 12
"""Deaths in a row, nothing answered between and none up for `_LONG_S`, before the server ends. Jobs need some to find
the row that kills engines."""
_LONG_S = 60.0
_PAUSES_S = (0.0, 2.0, 5.0, 10.0)
"""Before each try to start: the memory of a device may not be free at once."""
_UP_TIMEOUT_S = 600.0
_LOOK_EVERY_S = 0.5
_DOWN = "the engine has ended and is started again; send the request again"
_WITHOUT_ENGINE = ("/v1/files", "/v1/batches", "/v1/models", "/health", "/metrics", "/docs", "/openapi.json")
"""Paths that are served while the engine is down."""


class EngineKeeper:
    """Starts processes of an engine again.

    Args:
        server_args: SGLang's, with which the first were started.
        processes: Knows the processes.
        end: Ends the server, where starting again is not worth trying.

    Attributes:
        unanswered: Tasks of HTTP requests that need the engine and have no answer yet.
    """

    def __init__(self, server_args: Any, processes: EngineProcesses, end: Callable[[], Awaitable[None]]) -> None:
        self._args = server_args
        self._processes = processes
        self._end = end
        self._manager: Any = None
        self._ports: Any = None
        self._up = threading.Event()
        self._up_since = 0.0
        self._num_answered = 0
        self._num_fruitless = 0
        self._task: asyncio.Task[None] | None = None
        self._is_ending = False
        self._starting: list[Any] = []
        self.unanswered: set[asyncio.Task[Any]] = set()

    @property
    def is_up(self) -> bool:
        """The engine answers."""
        return self._up.is_set()

    def watch(self, manager: Any, ports: Any, loop: asyncio.AbstractEventLoop) -> None:
        """The engine is up; see to it that it stays so.

        Args:
            manager: The `BatchTokenizerManager`.
            ports: SGLang's names of the sockets.
            loop: Where the manager lives.
        """
        self._manager, self._ports = manager, ports
        self._note_up()
        manager.on_death = lambda: loop.call_soon_threadsafe(self._begin)

    def stop(self) -> None:
        """The server ends: nothing is started any more, and what is being started is not waited for."""
        self._is_ending = True
        for process in self._starting:
            process.kill()

    def wait_until_up(self) -> None:
        """Return when the engine answers. From any thread but the loop's.

        Raises:
            EngineError: It does not come up.
        """
        deadline = time.monotonic() + _UP_TIMEOUT_S
        while not self._up.wait(_LOOK_EVERY_S):
            if self._is_ending or time.monotonic() > deadline:
                raise EngineError("the engine has ended and does not come up again")

    def _note_up(self) -> None:
        self._up_since = time.monotonic()
        self._up.set()

    def _begin(self) -> None:
        if self._task is None and not self._is_ending:
            self._up.clear()
            self._task = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        try:
            self._check_worth()
            logger.error("a process of the engine has ended, its log is above; the engine is started again")
            self._manager.fail_live(_DOWN)
            # The model that runs, not the one that the server was started with.
            weights = {name: self._manager.config_value(name) for name in ("model_path", "load_format")}
            self._args.override("batchllm", **weights)
            await asyncio.sleep(_LOOK_EVERY_S)
            lost, self.unanswered = self.unanswered, set()
            for task in lost:  # not generation, which has been ended: they wait for answers that were lost
                task.cancel()
            if self._args.enable_lora:
                adapters = await self._manager.forget_lost_adapters()
                self._args.override("batchllm", lora_paths=adapters or self._args.lora_paths)
            await self._try_to_start()
        except Exception as error:  # whatever it is: nobody else would hear of it, and the server would stay down
            if not self._is_ending:
                logger.error("the engine is not started again, and the server ends: %s", error)
                await self._end()
            return
        self._manager.revive()
        self._task = None
        self._note_up()
        logger.warning("the engine is up again")

    def _check_worth(self) -> None:
        """Count a death.

        Raises:
            EngineError: There were too many, or another engine would answer with other weights.
        """
        if self._manager.has_given_weights:
            raise EngineError("it had weights that were given at run time, which end with it; start the server again")
        answered = self._manager.num_planned_answers > self._num_answered
        self._num_answered = self._manager.num_planned_answers
        is_fruitful = answered or time.monotonic() - self._up_since >= _LONG_S
        self._num_fruitless = 0 if is_fruitful else self._num_fruitless + 1
        if self._num_fruitless >= _MAX_FRUITLESS:
            raise EngineError(f"it has died {self._num_fruitless} times in a row")

    async def _try_to_start(self) -> None:
        for number, pause_s in enumerate(_PAUSES_S, start=1):
            await asyncio.sleep(pause_s)
            if self._is_ending:
                raise EngineError("the server ends")
            try:
                await asyncio.to_thread(self._start)
                return
            except (OSError, RuntimeError, EOFError) as error:  # of a process that does not come up
                if number == len(_PAUSES_S) or self._is_ending:
                    raise
                logger.error("the engine does not come up (%s); it is tried again", error)

    def _start(self) -> None:
        """In a thread: it takes as long as the first start did."""
        if self._manager._subprocess_watchdog is not None:
            self._manager._subprocess_watchdog.stop()
        with self._processes.starting(self._args):
            result, schedulers = Engine._launch_scheduler_processes(
                self._args, self._ports, run_server_scheduler_process
            )
            others, names = Engine._launch_detokenizer_subprocesses(
                server_args=self._args, port_args=self._ports, run_detokenizer_process_func=run_detokenizer_process
            )
            self._starting = [*schedulers, *others]
            if self._is_ending:
                self.stop()
            result.wait_for_ready()
        self._starting = []
        names = [f"scheduler_{i}" for i in range(len(schedulers))] + names
        watchdog = SubprocessWatchdog(processes=[*schedulers, *others], process_names=names)
        watchdog.start()
        self._manager._subprocess_watchdog = watchdog


class WhileDown:
    """ASGI middleware: what needs an engine is answered with 503 while there is none, or when it dies before it has
    answered, and every 503 says when to come again.

    Args:
        app: The application.
        keeper: Knows whether the engine answers.
    """

    def __init__(self, app: ASGIApp, keeper: EngineKeeper) -> None:
        self._app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        task, unanswered = asyncio.current_task(), self._keeper.unanswered
        assert task is not None

        async def send_marked(message: Message) -> None:
            unanswered.discard(task)
            if message["type"] == "http.response.start" and message["status"] == 503:
                MutableHeaders(scope=message).setdefault("retry-after", str(RETRY_AFTER_S))
            await send(message)

        if scope["path"].startswith(_WITHOUT_ENGINE):
            await self._app(scope, receive, send_marked)
            return
        if self._keeper.is_up:
            unanswered.add(task)
            try:
                await self._app(scope, receive, send_marked)
                return
            except asyncio.CancelledError:
                if unanswered is self._keeper.unanswered or task not in unanswered:
                    raise  # not the keeper's doing
                task.uncancel()
            finally:
                unanswered.discard(task)
        error = {
            "message": _DOWN,
            "type": "server_error",
            "param": None,
            "code": "engine_down",
        }
        await JSONResponse({"error": error}, 503)(scope, receive, send_marked)
