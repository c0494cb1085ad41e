"""An engine that answers live requests by HTTP, beside what the process that uses it asks for. Runs in the engine's
process.

It is SGLang's server with `EngineHost` on its event loop: planned requests come as messages, live ones by HTTP, and
both run on one engine.
"""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from multiprocessing.connection import Connection

from fastapi import APIRouter

from batchllm.host import messages
from batchllm.srt.entrypoints import child_process
from batchllm.srt.entrypoints.engine_host import EngineHost, arguments_of
from batchllm.srt.entrypoints.http_server import HttpServer, ServerRuntime
from batchllm.srt.server_args import make_server_args

_ENDED = "the engine has ended; send the request again"


def serve(start: messages.Start, connection: Connection) -> None:
    """Serve until the user of the engine ends it, or goes, and live requests have had their time to finish.

    Raises:
        ConfigError: An argument is wrong or not supported; nothing was started.
        EngineError: The processes did not come up.
    """
    model_path, given = arguments_of(start)
    given.setdefault("log_level", "error")
    args = make_server_args(model_path, **given)
    assert start.live_grace_s is not None

    def begin(runtime: ServerRuntime) -> None:
        info = replace(runtime.info, live_url=args.url())
        host = _LiveHost(runtime, connection, info=info)
        asyncio.run_coroutine_threadsafe(_serve_messages(host, server), runtime.loop)

    server = HttpServer(
        args,
        router=APIRouter(),
        in_front=lambda app: app,
        when_up=begin,
        when_down=lambda is_crash: None,
        grace_s=start.live_grace_s,
    )
    server.run()


async def _serve_messages(host: EngineHost, server: HttpServer) -> None:
    # On the loop, which runs in the main thread: what is said of signals there holds for the process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # uvicorn took it; it reaches all of a terminal's job
    child_process.outlive_parent()
    try:
        await host.serve()
    finally:
        server.stop()


class _LiveHost(EngineHost):
    """An engine that has ended is not started again here: whoever uses it starts another one."""

    def _tell_death(self) -> None:
        self._runtime.manager.fail_live(_ENDED)
        super()._tell_death()
