"""SGLang's HTTP server with our processes behind it, and room for routes of ours. Runs in the server's process.
(Upstream: ``srt/entrypoints/http_server.py``.)

Every route of SGLang's stays what it is, except that ``/health`` also says what it found to be in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import sglang.srt.entrypoints.http_server as upstream
import uvicorn
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import PortArgs, ServerArgs

from batchllm.errors import ConfigError
from batchllm.offline.event_loop import iterate_on
from batchllm.offline.runtime import FinishedRequests
from batchllm.srt import compat
from batchllm.srt.entrypoints.engine import launch_errors
from batchllm.srt.entrypoints.engine_keeper import EngineKeeper, WhileDown
from batchllm.srt.entrypoints.first_request import FirstRequest
from batchllm.srt.entrypoints.processes import EngineProcesses
from batchllm.srt.entrypoints.serving_chat import ServingCompletion, ServingEmbedding
from batchllm.srt.managers.detokenizer_manager import run_detokenizer_process
from batchllm.srt.managers.io_struct import PlannedShareReqInput
from batchllm.srt.managers.scheduler_process import run_server_scheduler_process
from batchllm.srt.managers.tokenizer_manager import ManagedRuntime, init_tokenizer_manager
from batchllm.trace.latency import LiveLatency
from batchllm.trace.step_history import StepHistory

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MIN_ADAPTER_PLACES = 2
_STOP_TIMEOUT_S = 10


class ServerRuntime(ManagedRuntime):
    """The server's runtime, for jobs that are run by threads beside the server's event loop.

    Args:
        loop: The server's event loop; jobs are fed and received on it.
        keeper: Knows whether the engine is up.

    Attributes:
        steps: The last steps that jobs have been told of.
    """

    def __init__(
        self,
        manager: Any,
        template_manager: Any,
        server_args: Any,
        init_info: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
        keeper: EngineKeeper,
    ) -> None:
        super().__init__(manager, template_manager, server_args, init_info)
        self.loop = loop
        self.steps = StepHistory()
        self._keeper = keeper

    def when_up(self) -> ServerRuntime:
        """This runtime, once its engine answers. From any thread but the loop's.

        Raises:
            EngineError: It has ended and does not come up again.
        """
        self._keeper.wait_until_up()
        return self

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """From any thread but the loop's own."""
        return iterate_on(self.loop, stream)

    @property
    def latency(self) -> LiveLatency:
        """What live requests wait."""
        return self.manager.live_latency

    async def receive(self, job_id: int) -> FinishedRequests:
        finished = await super().receive(job_id)
        self.steps.add(finished.steps)
        return finished

    def withdraw(self, job_id: int) -> None:
        """From any thread."""
        self.loop.call_soon_threadsafe(super().withdraw, job_id)

    def give_planned(self, share: float) -> None:
        """Let planned requests have this part of what they and live ones compete for, at least. From any thread."""
        self.loop.call_soon_threadsafe(self.manager.send, PlannedShareReqInput(share=share))

    def shutdown(self) -> None:
        """A job ends, the server does not."""


class HttpServer:
    """SGLang's server. There is one in a process.

    Args:
        server_args: From `batchllm.srt.server_args.make_server_args`.
        router: Further routes.
        in_front: Makes of an ASGI application one that answers some of its requests itself, before any middleware.
        when_up: Called in a thread once the engine answers.
        when_down: Called in a thread when the server ends: with False as soon as it has been asked to, while live
            requests are still answered, with True if the engine has died.
        grace_s: Seconds that live requests have to finish once the server has been asked to end.

    Raises:
        ConfigError: There would be no place for an adapter of live requests.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        *,
        router: APIRouter,
        in_front: Callable[[Any], Any],
        when_up: Callable[[ServerRuntime], None],
        when_down: Callable[[bool], None],
        grace_s: float,
    ) -> None:
        _check_adapter_places(server_args)
        self._args = server_args
        self._in_front = in_front
        self._when_up = when_up
        self._when_down = when_down
        self._grace_s = grace_s
        self._is_interrupted = False
        self._uvicorn: uvicorn.Server | None = None
        self._ending: asyncio.Task[None] | None = None
        self._first_request = FirstRequest()
        self._processes = EngineProcesses()
        self._keeper = EngineKeeper(server_args, self._processes, self._die)
        self._ports: Any = None
        self._manager: Any = None
        self._template_manager: Any = None
        self._init_info: dict[str, Any] = {}
        self._runtime: ServerRuntime | None = None
        self._upstream_lifespan = upstream.app.router.lifespan_context
        upstream.app.router.lifespan_context = self._lifespan
        upstream.app.include_router(router)
        upstream.app.add_middleware(WhileDown, keeper=self._keeper)
        self._wrap_health()

    def run(self) -> None:
        """Serve until a signal ends it.

        Raises:
            EngineError: The engine did not come up.
            KeyboardInterrupt: SIGINT has ended it, in order.
        """
        compat.check_once()
        before, upstream.Engine = upstream.Engine, self._engine_class()
        try:
            upstream.launch_server(
                self._args,
                init_tokenizer_manager,
                run_server_scheduler_process,
                run_detokenizer_process,
                execute_warmup_func=self._first_request.ask,
                launch_callback=self._is_up,
            )
        finally:
            upstream.Engine = before
            self._processes.end(self._manager)
        if self._is_interrupted:  # uvicorn keeps it to itself
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Ask it to end, as a signal does. On its loop."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _engine_class(self) -> type[Engine]:
        server = self

        class _ServerEngine(Engine):
            """Launches as SGLang's does, but keeps track of what is to be ended."""

            @classmethod
            def _launch_subprocesses(cls, server_args: ServerArgs, **kwargs: Any) -> Any:
                with server._processes.starting(server_args), launch_errors(server_args):
                    ports = PortArgs.init_new(server_args)
                    ports.instance_id = server._processes.instance_id  # names a file in shared memory
                    launched = super()._launch_subprocesses(server_args=server_args, port_args=ports, **kwargs)
                server._manager, server._template_manager = launched[:2]
                server._ports = ports
                server._init_info = launched[3].scheduler_infos[0]
                return launched

        return _ServerEngine

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        self._manager.auto_create_handle_loop()
        self._keeper.watch(self._manager, self._ports, loop)
        self._runtime = ServerRuntime(
            self._manager, self._template_manager, self._args, self._init_info, loop, self._keeper
        )
        async with self._upstream_lifespan(app):
            app.state.openai_serving_completion = ServingCompletion(self._manager, self._template_manager)
            app.state.openai_serving_embedding = ServingEmbedding(self._manager, self._template_manager)
            # SGLang adds its middleware until now; requests come through this attribute.
            upstream.app.middleware_stack = self._in_front(upstream.app.middleware_stack)
            self._end_in_order()
            yield
            await self._end_batches()
            await self._processes.ask_to_end(self._manager)

    def _end_in_order(self) -> None:
        """When uvicorn is asked to end, batches end first, beside live requests, and those have `grace_s`.

        Uvicorn would wait for the last of them for ever, and batches would go on to start rows until then.
        """
        server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if not isinstance(server, uvicorn.Server):  # it is not the one that takes the signals
            return
        self._uvicorn = server
        server.config.timeout_graceful_shutdown = math.ceil(self._grace_s)
        shut_down = server.shutdown

        async def shutdown(sockets: Any = None) -> None:
            self._is_interrupted = signal.SIGINT in server._captured_signals
            batches = asyncio.create_task(self._end_batches())
            await shut_down(sockets)
            await batches

        # SGLang makes the server itself, so that a class of ours has no way in.
        server.shutdown = shutdown  # type: ignore[method-assign]

    async def _end_batches(self) -> None:
        """Batches end while the engine still answers. Whoever calls this again waits for the same end."""
        self._keeper.stop()
        self._first_request.cut_off()
        if self._ending is None:
            self._ending = asyncio.create_task(asyncio.to_thread(self._when_down, False))
        await self._ending

    def _is_up(self) -> None:
        assert self._runtime is not None
        self._when_up(self._runtime)

    async def _die(self) -> None:
        """The engine has ended and cannot be started again: so does the server, for whoever watches it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._when_down, True), _STOP_TIMEOUT_S)
        self._processes.end(self._manager)
        os._exit(1)  # requests wait for what will never come, and would keep it from ending otherwise

    # What is really in

    def _wrap_health(self) -> None:
        router = upstream.app.router
        (stock,) = [route for route in router.routes if getattr(route, "path", None) == "/health"]
        router.routes.remove(stock)

        async def health(request: Request) -> Response:
            if not self._keeper.is_up:
                return JSONResponse({"status": "the engine is started again"}, status_code=503)
            response: Response = await stock.endpoint(request)
            if response.status_code != 200:
                return response
            parts = self._init_info.get("batchllm", {})
            is_in = parts.get("scheduler") == "BatchScheduler" and parts.get("radix_cache") == "PlannedRadixCache"
            content = {"status": "ok" if is_in else "the scheduler or the cache is not batchllm's", **parts}
            return JSONResponse(content, status_code=200 if is_in else 503)

        upstream.app.add_api_route("/health", health, methods=["GET"], include_in_schema=stock.include_in_schema)


def _check_adapter_places(server_args: ServerArgs) -> None:
    num_places = server_args.max_loras_per_batch
    if (server_args.enable_lora or server_args.lora_paths) and num_places < _MIN_ADAPTER_PLACES:
        raise ConfigError(
            f"--max-loras-per-batch {num_places}: give at least {_MIN_ADAPTER_PLACES}; one place is left to live "
            "requests while batches run"
        )
