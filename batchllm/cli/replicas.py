"""``--replicas`` of ``batchllm run`` and ``batchllm serve``: several engines that share jobs, on Ray."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from batchllm.cli.engine_flags import flag_value, with_config
from batchllm.cli.outcome import say
from batchllm.distributed.actor import Software, free_port, own_address
from batchllm.distributed.cluster import Cluster
from batchllm.distributed.runtime import ReplicatedRuntime
from batchllm.errors import ConfigError
from batchllm.host.runtime import HostedRuntime
from batchllm.offline.runtime import Runtime

R = TypeVar("R", bound=ReplicatedRuntime)
_SEEDS = 1 << 30
"""SGLang draws from as many."""


class ReplicaFlags(Protocol):
    """What a command says of replicas, and of the engine of each."""

    @property
    def replicas(self) -> int: ...
    @property
    def min_replicas(self) -> int | None: ...
    @property
    def ray_address(self) -> str | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def server_flags(self) -> tuple[str, ...]: ...


def start_engine(model_path: str | None, *, is_local: bool, **options: Any) -> Runtime:
    """Start an engine in the process of a replica.

    SGLang draws the port on which its processes meet with the random seed, which is the same for all replicas.

    Args:
        model_path: As for `HostedRuntime`.
        is_local: Live requests come from this machine only.
        **options: Further arguments of `HostedRuntime`.
    """
    if options.get("live_grace_s") is not None:
        options |= {"host": "127.0.0.1" if is_local else own_address(), "port": free_port()}
    if flag_value(with_config(list(options["flags"])), "nccl-port") is None:
        options["nccl_port"] = free_port()
    return HostedRuntime(model_path, **options)


def check_replicas(command: ReplicaFlags) -> None:
    """The flags of replicas fit each other.

    Raises:
        ConfigError: They do not.
    """
    if command.replicas < 1:
        raise ConfigError(f"--replicas {command.replicas}: must be at least 1")
    least = command.min_replicas
    if least is not None and not 1 <= least <= command.replicas:
        raise ConfigError(f"--min-replicas {least}: must be from 1 to the {command.replicas} of --replicas")


def start_replicas(command: ReplicaFlags, model_path: str, options: dict[str, Any], make: Callable[..., R]) -> R:
    """Engines on Ray, all with the same seed.

    Args:
        command: How many, and where.
        model_path: The model that they load.
        options: Further arguments of each.
        make: What they are to be together.

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
    return make(
        partial(start_engine, command.model, is_local=cluster.is_own, **options),
        cluster=cluster,
        resources=resources,
        num_engines=command.replicas,
        min_engines=command.min_replicas,
        software=Software.here(model_path),
        tell=say,
    )
