"""``batchllm serve --replicas``: one server in front of several engines, on Ray.

Batches are planned together and their groups spread over the engines, as ``batchllm run --replicas`` does it; live
requests go to the engine that has their beginning. SGLang is imported where engines are, not here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import secrets
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from batchllm.cli.collector import collect_rarely
from batchllm.cli.engine_flags import flag_value, with_config
from batchllm.cli.outcome import DEMO_MODEL, EXIT_OK, EXIT_ROWS_FAILED, EXIT_STOPPED, say
from batchllm.cli.replicas import check_replicas, start_replicas
from batchllm.cli.serve_flags import add_own_flags, batch_options, bound, grace_of
from batchllm.default_model import default_model_path
from batchllm.distributed.beginnings import BatchBeginnings
from batchllm.distributed.gateway import Gateway
from batchllm.distributed.live_metrics import merged
from batchllm.distributed.live_router import LiveRouter
from batchllm.distributed.runtime import ReplicatedRuntime
from batchllm.errors import ConfigError
from batchllm.offline.jobs import Jobs
from batchllm.server import BatchMetrics, BatchService, LiveNumbers
from batchllm.server.api_errors import ApiError
from batchllm.trace.latency import LiveLatency
from batchllm.trace.step_history import StepHistory

logger = logging.getLogger(__name__)

_REFUSED = (
    *("admin-api-key", "enable-http2", "enable-ssl-refresh", "fastapi-root-path", "log-level-http"),
    "tokenizer-worker-num",
)
"""Flags of SGLang's own server that this one does not keep."""
_TLS = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password")
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _ServeCommand:
    """What was asked for.

    Attributes:
        own: Values of the flags that are not the engines'.
        server_flags: Those that are.
    """

    replicas: int
    min_replicas: int | None
    ray_address: str | None
    model: str | None
    server_flags: tuple[str, ...]
    own: dict[str, Any]


class ServedReplicas(ReplicatedRuntime):
    """The engines of a server."""

    def shutdown(self) -> None:
        """A job ends, the server does not."""


def serve_replicas(flags: list[str]) -> int:
    """Serve until a signal ends it; returns the exit status.

    Args:
        flags: The command line.

    Raises:
        ConfigError: A flag is wrong.
        EngineError: The engines do not start.
    """
    command = _parsed(flags)
    check_replicas(command)
    own = command.own
    grace_s = grace_of(own)
    log_level = own.get("log_level", "info")
    logging.basicConfig(level=log_level.upper(), format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    collect_rarely()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bound(own["host"], own["port"]))
        batch = {name: value for name, value in own.items() if name.startswith("batch_")}
        service = BatchService(batch_options(batch, own["port"]), page_key=own.get("api_key"))
        stack.callback(service.close)
        engine_key = own.get("api_key") or secrets.token_urlsafe(32)
        runtime = _start_engines(command, grace_s, engine_key)
        stack.callback(runtime.end)
        latency, router = LiveLatency(), LiveRouter()
        key = None if own.get("api_key") else engine_key
        gateway = Gateway(lambda: runtime.live_urls, api_key=key, latency=latency, router=router)
        app = _application(command, service, runtime, gateway)
        config = uvicorn.Config(
            service.page.before(app),
            log_level=log_level,
            timeout_graceful_shutdown=math.ceil(grace_s),
            **{name: own[name] for name in _TLS if name in own},
        )
        server = _Server(config, service, runtime)
        _begin_batches(service, runtime, latency, router, has_metrics="enable_metrics" in own)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, and passes the signal on
            server.run(sockets=[listener])
    if server.is_interrupted:
        return EXIT_STOPPED
    return EXIT_OK if runtime.death is None else EXIT_ROWS_FAILED


def _parsed(flags: list[str]) -> _ServeCommand:
    expanded = with_config(flags)
    parser = argparse.ArgumentParser(
        prog="batchllm serve", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS
    )
    add_own_flags(parser.add_argument_group())
    for name, kind in (("host", str), ("port", int), ("api-key", str), ("log-level", str)):
        parser.add_argument(f"--{name}", type=kind)
    for name in _TLS:
        parser.add_argument(f"--{name.replace('_', '-')}")
    if expanded != flags:
        parser.add_argument("--config")  # its flags stand here by now
    given, server_flags = parser.parse_known_args(expanded)
    own = {"host": "127.0.0.1", "port": 30000, **vars(given)}  # SGLang's own defaults
    for name in _REFUSED:
        if flag_value(server_flags, name) is not None:
            raise ConfigError(f"--{name}: a server of several replicas does not keep it; leave it out")
    if flag_value(server_flags, "enable-metrics") is not None:
        own["enable_metrics"] = True
    model = flag_value(server_flags, "model-path") or flag_value(server_flags, "model")
    if model is None and "demo_model" not in own:
        say(DEMO_MODEL.format(flag="--model-path"))
    return _ServeCommand(
        replicas=own.get("replicas", 1),
        min_replicas=own.get("min_replicas"),
        ray_address=own.get("ray_address"),
        model=model,
        server_flags=tuple(server_flags),
        own=own,
    )


def _start_engines(command: _ServeCommand, grace_s: float, key: str) -> ServedReplicas:
    default = default_model_path()
    options = {
        "default_model_path": default,
        "flags": command.server_flags,
        "is_verbose": "log_level" in command.own,
        "live_grace_s": grace_s,
        "api_key": key,
    }
    if "log_level" in command.own:
        options["log_level"] = command.own["log_level"]
    return start_replicas(command, command.model or default, options, ServedReplicas)


def _begin_batches(
    service: BatchService, runtime: ServedReplicas, latency: LiveLatency, router: LiveRouter, *, has_metrics: bool
) -> None:
    jobs = Jobs(runtime)
    numbers = LiveNumbers(
        job_stats=lambda: jobs.stats,
        steps=StepHistory().recent,  # those of several engines are not on one clock
        latency=latency,
        kv_limit_tokens=runtime.info.kv_limit_tokens,
    )
    metrics = BatchMetrics(job_stats=lambda: jobs.stats) if has_metrics else None
    service.start(
        lambda: runtime, jobs.make_job, metrics, numbers, runtime.give_planned, lambda: BatchBeginnings(router)
    )


def _application(command: _ServeCommand, service: BatchService, runtime: ServedReplicas, gateway: Gateway) -> FastAPI:
    """Batches and health here, everything else by the engines."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.close()

    key = command.own.get("api_key")

    async def check_key(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if key and not (kind.lower() == "bearer" and secrets.compare_digest(given.encode(), key.encode())):
            raise ApiError(401, "the API key is missing or wrong; send it as a bearer token", code="invalid_api_key")

    async def health() -> JSONResponse:
        num_up = len(runtime.live_urls)
        content = {"status": "ok" if num_up else "no replica is up", "replicas": command.replicas, "up": num_up}
        return JSONResponse(content, 200 if num_up else 503)

    async def metrics() -> Response:
        return Response(merged(await gateway.scrape()), media_type=CONTENT_TYPE_LATEST)

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(service.router, dependencies=[Depends(check_key)])
    app.add_api_route("/health", health)
    if "enable_metrics" in command.own:
        app.add_api_route("/metrics", metrics)
    app.router.default = gateway
    return app


class _Server(uvicorn.Server):
    """Ends batches first, beside live requests; and ends by itself where there will be no engine any more."""

    def __init__(self, config: uvicorn.Config, service: BatchService, runtime: ReplicatedRuntime) -> None:
        super().__init__(config)
        self._service, self._runtime = service, runtime
        self.is_interrupted = False

    async def main_loop(self) -> None:
        watch = asyncio.create_task(self._watch())
        await super().main_loop()
        watch.cancel()

    async def _watch(self) -> None:
        while self._runtime.death is None:
            await asyncio.sleep(_LOOK_EVERY_S)
        logger.error("the server ends: %s", self._runtime.death)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.is_interrupted = signal.SIGINT in self._captured_signals
        is_crash = self._runtime.death is not None
        batches = asyncio.create_task(asyncio.to_thread(self._service.stop, is_crash=is_crash))
        await super().shutdown(sockets)
        await batches
