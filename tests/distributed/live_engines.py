"""Small HTTP servers that stand where engines answer live requests, for tests of what is in front of them.

Each says in its answer which it is and what it was sent; what else it does, the path says. Claims nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from batchllm.distributed.gateway import Gateway
from batchllm.trace.latency import LiveLatency


class LiveEngine:
    """An application as an engine answers.

    Attributes:
        asked: Paths of the requests that have come.
        num_left: Streams whose client has gone before their end.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[str] = []
        self.num_left = 0
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._stream, methods=["POST"]),
                Route("/generate", self._break, methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/{path:path}", self._echo, methods=["GET", "POST", "PUT"]),
            ]
        )

    async def _echo(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        told = {
            "engine": self.name,
            "path": request.url.path,
            "query": request.url.query,
            "authorization": request.headers.get("authorization"),
            "body": (await request.body()).decode(),
        }
        status = 418 if request.headers.get("x-fail") == self.name else 200
        return JSONResponse(told, status, headers={"x-engine": self.name})

    async def _stream(self, request: Request) -> Response:
        self.asked.append(request.url.path)

        async def pieces() -> AsyncIterator[str]:
            try:
                for number in range(int(request.query_params.get("pieces", 3))):
                    yield f"data: {self.name} {number}\n\n"
                    await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                self.num_left += 1
                raise

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def _break(self, request: Request) -> Response:
        """The engine ends in the middle of a stream."""
        self.asked.append(request.url.path)

        async def pieces() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await asyncio.sleep(0.05)
            raise ConnectionResetError

        return StreamingResponse(pieces(), media_type="text/event-stream")

    async def _metrics(self, request: Request) -> Response:
        return Response(f'# TYPE asked counter\nasked_total{{kind="all"}} {len(self.asked)}\n', media_type="text/plain")


@contextlib.asynccontextmanager
async def dying() -> AsyncIterator[tuple[str, list[bytes]]]:
    """The URL of an engine that ends connections instead of answering, and the beginnings of what it was asked."""
    asked: list[bytes] = []

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.transport.abort()

    server = await asyncio.start_server(end, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """The URL of an application that is served on this loop."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]  # they are pytest's
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def gateway_to(
    urls: Mapping[int, str], key: str | None = None
) -> AsyncIterator[tuple[str, Gateway, LiveLatency]]:
    """A gateway in front of engines, served: its URL, itself, and what it has told of delays."""
    latency = LiveLatency()
    gateway = Gateway(lambda: urls, api_key=key, latency=latency)
    try:
        async with served(gateway) as url:
            yield url, gateway, latency
    finally:
        await gateway.close()
