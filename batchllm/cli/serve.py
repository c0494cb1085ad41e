"""``batchllm serve`` and ``python -m batchllm.launch_server``: SGLang's server, with plans and the batch API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

from batchllm.cli.collector import collect_rarely
from batchllm.cli.interrupts import pass_on_hangup
from batchllm.cli.outcome import DEMO_MODEL, EXIT_OK, EXIT_STOPPED, say
from batchllm.cli.serve_flags import add_own_flags, batch_options, bound, grace_of, wants_replicas
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError
from batchllm.srt.platforms import host_imports

if TYPE_CHECKING:
    from batchllm.server import BatchService
    from batchllm.srt.entrypoints.http_server import ServerRuntime

PROGRAM = "python -m batchllm.launch_server"


def serve(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Serve until a signal ends it; returns the exit status."""
    pass_on_hangup()  # uvicorn, which takes the other signals, leaves it to the system
    if sys.stdout is None:  # closed by whoever started us; uvicorn asks whether it is a terminal
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    if wants_replicas(server_flags):
        from batchllm.cli.serve_replicas import serve_replicas

        return serve_replicas(server_flags)
    # The engine's processes are forked from this one: SGLang comes first, before there are threads.
    host_imports.import_all()
    from batchllm.server import BatchService
    from batchllm.srt.entrypoints.http_server import HttpServer
    from batchllm.srt.server_args import make_parser, make_server_args, own_flags, parse_server_flags

    parser = make_parser(PROGRAM)
    add_own_flags(own_flags(parser))
    given = parse_server_flags(server_flags, parser)
    given.pop("replicas", None)  # one
    if "min_replicas" in given:
        raise ConfigError("--min-replicas: is for several; give --replicas N with it")
    grace_s = grace_of(given)
    batch = {name: given.pop(name) for name in list(given) if name.startswith("batch_")}
    model_path = given.pop("model_path", None)
    if not given.pop("demo_model", False) and model_path is None:
        say(DEMO_MODEL.format(flag="--model-path"))
    model_path = default_model_path() if model_path is None else model_path
    log_level = given.setdefault("log_level", "info")
    logging.basicConfig(level=log_level.upper(), format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    server_args = make_server_args(model_path, **given)
    collect_rarely()
    with bound(server_args.host, server_args.port):
        pass  # uvicorn takes the address only when the engine is up, and would end with another status
    service = BatchService(batch_options(batch, server_args.port), page_key=server_args.api_key)
    try:
        server = HttpServer(
            server_args,
            router=service.router,
            in_front=service.page.before,
            when_up=lambda runtime: _start(service, runtime, server_args.enable_metrics),
            when_down=lambda is_crash: service.stop(is_crash=is_crash),
            grace_s=grace_s,
        )
        server.run()
    except KeyboardInterrupt:  # the server has ended in order, and passes the signal on
        return EXIT_STOPPED
    finally:
        service.close()
    return EXIT_OK


def _start(service: BatchService, runtime: ServerRuntime, has_metrics: bool) -> None:
    from batchllm.offline.jobs import Jobs
    from batchllm.server import BatchMetrics, LiveNumbers

    jobs = Jobs(runtime)
    metrics = BatchMetrics(job_stats=lambda: jobs.stats) if has_metrics else None
    numbers = LiveNumbers(
        job_stats=lambda: jobs.stats,
        steps=runtime.steps.recent,
        latency=runtime.latency,
        kv_limit_tokens=runtime.info.kv_limit_tokens,
    )
    service.start(runtime.when_up, jobs.make_job, metrics, numbers, runtime.give_planned)
