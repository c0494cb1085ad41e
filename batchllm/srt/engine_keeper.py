"""Keeps the engine of a server up: its processes are started again, behind the same HTTP server, when one has ended.

Runs in the server's process. (Upstream: ``srt/entrypoints/engine.py``, which ends with its processes.)

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
from batchllm.srt.detokenizer_manager import run_detokenizer_process
from batchllm.srt.processes import EngineProcesses
from batchllm.srt.scheduler import run_server_scheduler_process

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 20
"""What clients are told to wait; about what a start takes."""
_MAX_FRUITLESS = 12
"""Deaths in a row, nothing answered between and none up for `_LONG_S`, before the server ends. Jobs need some to find
the row that kills engines."""
_LONG_S = 60.0
_UP_TIMEOUT_S = 600.0
_WITHOUT_ENGINE = ("/v1/files", "/v1/batches", "/v1/models", "/health", "/metrics", "/docs", "/openapi.json")
"""Paths that are served while the engine is down."""


class EngineKeeper:
    """Starts processes of an engine again.

    Args:
        server_args: SGLang's, with which the first were started.
        processes: Knows the processes.
        end: Ends the server, where starting again is not worth trying.

    Attributes:
        num_restarts: Times that it has.
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
        self.num_restarts = 0

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
        """The server ends: nothing is started any more."""
        self._is_ending = True

    def wait_until_up(self) -> None:
        """Return when the engine answers. From any thread but the loop's.

        Raises:
            EngineError: It does not come up.
        """
        if not self._up.wait(_UP_TIMEOUT_S):
            raise EngineError("the engine has ended and does not come up again")

    def _note_up(self) -> None:
        self._up_since = time.monotonic()
        self._up.set()

    def _begin(self) -> None:
        if self._task is None and not self._is_ending:
            self._up.clear()
            self._task = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        manager = self._manager
        answered = manager.num_planned_answers > self._num_answered
        self._num_answered = manager.num_planned_answers
        is_fruitful = answered or time.monotonic() - self._up_since >= _LONG_S
        self._num_fruitless = 0 if is_fruitful else self._num_fruitless + 1
        if self._num_fruitless >= _MAX_FRUITLESS:
            logger.error("the engine has died %d times in a row; the server ends", self._num_fruitless)
            await self._end()
            return
        logger.error("a process of the engine has ended, its log is above; the engine is started again")
        manager.fail_live("the engine has ended and is started again; send the request again")
        try:
            await asyncio.to_thread(self._start)
        except (EngineError, OSError, RuntimeError, EOFError) as error:
            logger.error("the engine does not start again (%s); the server ends", error)
            await self._end()
            return
        self.num_restarts += 1
        manager.revive()
        self._task = None
        self._note_up()
        logger.warning("the engine is up again")

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
            result.wait_for_ready()
        names = [f"scheduler_{i}" for i in range(len(schedulers))] + names
        watchdog = SubprocessWatchdog(processes=[*schedulers, *others], process_names=names)
        watchdog.start()
        self._manager._subprocess_watchdog = watchdog


class WhileDown:
    """ASGI middleware: what needs an engine is answered with 503 while there is none, and every 503 says when to come
    again.

    Args:
        app: The application.
        is_up: Whether the engine answers.
    """

    def __init__(self, app: ASGIApp, is_up: Callable[[], bool]) -> None:
        self._app = app
        self._is_up = is_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 503:
                MutableHeaders(scope=message).setdefault("retry-after", str(RETRY_AFTER_S))
            await send(message)

        if self._is_up() or scope["path"].startswith(_WITHOUT_ENGINE):
            await self._app(scope, receive, send_marked)
            return
        error = {
            "message": "the engine has ended and is started again; send the request again",
            "type": "server_error",
            "param": None,
            "code": "engine_down",
        }
        await JSONResponse({"error": error}, 503)(scope, receive, send_marked)
