"""``batchllm run --replicas``: several engines that share a job, on Ray."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

from batchllm.cli.engine_flags import flag_value, with_config
from batchllm.cli.outcome import say
from batchllm.cli.run_command import RunCommand
from batchllm.distributed.actor import Software, free_port
from batchllm.distributed.cluster import Cluster
from batchllm.distributed.runtime import ReplicatedRuntime
from batchllm.errors import ConfigError
from batchllm.host.runtime import HostedRuntime
from batchllm.offline.runtime import Runtime

_SEEDS = 1 << 30
"""SGLang draws from as many."""


def start_engine(model_path: str | None, **options: Any) -> Runtime:
    """Start an engine in the process of a replica. Arguments are those of `HostedRuntime`.

    SGLang draws the port on which its processes meet with the random seed, which is the same for all replicas.
    """
    if flag_value(with_config(list(options["flags"])), "nccl-port") is None:
        options["nccl_port"] = free_port()
    return HostedRuntime(model_path, **options)


def check_replicas(command: RunCommand) -> None:
    """The flags of replicas fit each other, and the others.

    Raises:
        ConfigError: They do not.
    """
    if command.replicas < 1:
        raise ConfigError(f"--replicas {command.replicas}: must be at least 1")
    least = command.min_replicas
    if least is not None and not 1 <= least <= command.replicas:
        raise ConfigError(f"--min-replicas {least}: must be from 1 to the {command.replicas} of --replicas")
    if command.is_on_ray and command.trace is not None:
        raise ConfigError("--trace: the steps of several engines are not on one clock; trace one, without --replicas")


def start_replicas(command: RunCommand, model_path: str, options: dict[str, Any]) -> ReplicatedRuntime:
    """Engines on Ray, all with the same seed.

    Args:
        command: How many, and where.
        model_path: The model that they load.
        options: Further arguments of each.

    Raises:
        ConfigError: There is no Ray, or not enough of what they need, or an argument is wrong.
        EngineError: They do not start.
    """
    flags = with_config(list(command.server_flags))
    if flag_value(flags, "random-seed") is None:
        options = {"random_seed": secrets.randbelow(_SEEDS)} | options
    tp_size = flag_value(flags, "tp-size") or flag_value(flags, "tensor-parallel-size") or flag_value(flags, "tp")
    if tp_size is not None and not tp_size.isdigit():
        raise ConfigError(f"--tp-size {tp_size}: must be a number")
    cluster = Cluster(command.ray_address, is_verbose=options["is_verbose"])
    try:
        resources = cluster.resources(command.replicas, int(tp_size or 1))
    except BaseException:
        cluster.close()
        raise
    return ReplicatedRuntime(
        partial(start_engine, command.model, **options),
        cluster=cluster,
        resources=resources,
        num_engines=command.replicas,
        min_engines=command.min_replicas,
        software=Software.here(model_path),
        tell=say,
    )
