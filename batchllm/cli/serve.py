"""``batchllm serve`` and ``python -m batchllm.launch_server``: SGLang's server, with plans and the batch API."""

from __future__ import annotations

import argparse
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchllm.cli.collector import collect_rarely
from batchllm.cli.interrupts import pass_on_hangup
from batchllm.cli.outcome import DEMO_MODEL, EXIT_OK, EXIT_STOPPED, say
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError
from batchllm.srt.platforms import host_imports

if TYPE_CHECKING:
    from batchllm.server import BatchOptions, BatchService
    from batchllm.srt.entrypoints.http_server import ServerRuntime

PROGRAM = "python -m batchllm.launch_server"
_MIN_ADAPTER_PLACES = 2
_GRACE_S = 20.0
"""With this and what flushing takes, the 30 s that Kubernetes gives are enough."""


def serve(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Serve until a signal ends it; returns the exit status."""
    _check_no_replicas(server_flags)
    pass_on_hangup()  # uvicorn, which takes the other signals, leaves it to the system
    # The engine's processes are forked from this one: SGLang comes first, before there are threads.
    host_imports.import_all()
    from batchllm.server import BatchService
    from batchllm.srt.entrypoints.http_server import HttpServer
    from batchllm.srt.server_args import make_parser, make_server_args, own_flags, parse_server_flags

    parser = make_parser(PROGRAM)
    _add_batch_flags(own_flags(parser))
    given = parse_server_flags(server_flags, parser)
    grace_s = given.pop("grace", _GRACE_S)
    if not 0 <= grace_s < math.inf:
        raise ConfigError(f"--grace {grace_s}: must be a number of seconds from 0")
    batch = {name: given.pop(name) for name in list(given) if name.startswith("batch_")}
    model_path = given.pop("model_path", None)
    if not given.pop("demo_model", False) and model_path is None:
        say(DEMO_MODEL.format(flag="--model-path"))
    model_path = default_model_path() if model_path is None else model_path
    log_level = given.setdefault("log_level", "info")
    logging.basicConfig(level=log_level.upper(), format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    server_args = make_server_args(model_path, **given)
    _check_adapter_places(server_args)
    collect_rarely()
    service = BatchService(_batch_options(batch, server_args.port), page_key=server_args.api_key)
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


def _check_no_replicas(server_flags: list[str]) -> None:
    for flag in server_flags:
        if flag.partition("=")[0] in ("--replicas", "--min-replicas", "--ray-address"):
            raise ConfigError(
                f"{flag.partition('=')[0]}: a server has one engine. For batches `batchllm run --replicas N` runs N "
                "engines that share one plan; for live requests start N servers behind a router, each with a "
                "--batch-storage of its own"
            )


def _check_adapter_places(server_args: Any) -> None:
    num_places = server_args.max_loras_per_batch
    if (server_args.enable_lora or server_args.lora_paths) and num_places < _MIN_ADAPTER_PLACES:
        raise ConfigError(
            f"--max-loras-per-batch {num_places}: give at least {_MIN_ADAPTER_PLACES}; one place is left to live "
            "requests while batches run"
        )


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


def _add_batch_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--demo-model", action="store_true", help="without --model-path: do not say that the model is for trials"
    )
    group.add_argument(
        "--grace",
        type=float,
        metavar="S",
        help="seconds that live requests have to finish after SIGTERM or Ctrl-C; batches stop at once and go on with "
        f"the next start (default: {_GRACE_S:.0f})",
    )
    group.add_argument(
        "--batch-storage",
        metavar="DIR",
        help="where files and batches are kept; a server started again with the same folder goes on with them "
        "(default: batchllm/port-PORT under $XDG_STATE_HOME or ~/.local/state)",
    )
    group.add_argument(
        "--batch-max-file-bytes", type=int, metavar="N", help="largest file that may be uploaded (default: 1 GiB)"
    )
    group.add_argument(
        "--batch-storage-limit",
        type=int,
        metavar="BYTES",
        help="bytes of stored files from which on uploads are refused (default: what the disk holds)",
    )
    group.add_argument("--batch-max-rows", type=int, metavar="N", help="most rows of a batch (default: 1,000,000)")
    group.add_argument(
        "--batch-max-active-jobs",
        type=int,
        metavar="N",
        help="batches in progress at once, planned together; others wait for their turn (default: 32)",
    )
    group.add_argument(
        "--batch-max-token-bytes",
        type=int,
        metavar="N",
        help="token ids, of 4 bytes, that all batches in progress hold in memory; beyond it they are on disk, and a "
        "batch is planned in parts (default: 2 GiB)",
    )


def _batch_options(given: dict[str, Any], port: int) -> BatchOptions:
    from batchllm.server import BatchOptions

    storage = given.pop("batch_storage", None)
    if storage == "":
        raise ConfigError("--batch-storage: is empty; give a folder, or leave it out")
    if storage is None:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        storage = Path(state, "batchllm", f"port-{port}")
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return BatchOptions(storage=Path(storage), **{name.removeprefix("batch_"): value for name, value in given.items()})
