"""How many threads compute on a CPU. Runs in the scheduler's process.

Knows: what Linux says of cores, how many processes an engine has. Must not know: kernels, models.
Invariant: a number that the user has set stands.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_VARIABLE = "OMP_NUM_THREADS"
_MIN_CORES_TO_SPARE = 8
"""Of so many one is left to the processes beside this one. They take a twentieth of a core's time: with fewer cores a
thread would cost more than it is disturbed."""


@dataclass(frozen=True, slots=True)
class Cores:
    """What a process may run on.

    Attributes:
        nodes: The processors of each NUMA node that it may use, one for each physical core.
        quota: Cores' worth of time that its container has; None without a limit.
    """

    nodes: list[set[int]]
    quota: float | None = None


def set_num_threads(server_args: Any, gpu_id: int) -> None:
    """Set how many threads compute in this process, and say so.

    Args:
        server_args: SGLang's.
        gpu_id: SGLang's number of this process among those of the machine.
    """
    num_processes = server_args.tp_size * server_args.pp_size
    if not server_args.enable_dp_attention:
        num_processes *= server_args.dp_size
    num_processes = max(1, num_processes // server_args.nnodes)
    rank = gpu_id % num_processes
    if os.environ.get(_VARIABLE):
        logger.info("%d threads compute (%s)", torch.get_num_threads(), _VARIABLE)
        return
    cores = read_cores()
    processors, reason = choose(cores, num_processes, rank)
    if len(cores.nodes) > 1:
        # With all processors of its cores: memory and threads stay on the node.
        os.sched_setaffinity(0, set().union(*(_siblings(p) for p in processors)) & os.sched_getaffinity(0))
    torch.set_num_threads(len(processors))
    logger.info("%d threads compute (%s; %s sets another number)", len(processors), reason, _VARIABLE)


def choose(cores: Cores, num_processes: int, rank: int) -> tuple[set[int], str]:
    """The processors to compute on, and why as many.

    A process stays on one node, whose memory is near; processes are spread over the nodes.
    """
    num_nodes = len(cores.nodes)
    node = sorted(cores.nodes[rank % num_nodes])
    neighbours = range(rank % num_nodes, num_processes, num_nodes)
    each = len(node) // len(neighbours)
    first = neighbours.index(rank) * each
    mine = node[first : first + max(1, each)] or node[:1]
    reason = f"{sum(map(len, cores.nodes))} cores"
    if num_nodes > 1:
        reason += f", {len(node)} of them on this NUMA node"
    if cores.quota is not None and cores.quota / num_processes < len(mine):
        mine = mine[: max(1, int(cores.quota / num_processes))]
        reason += f", {cores.quota:g} of them for this container"
    elif len(mine) >= _MIN_CORES_TO_SPARE:
        mine = mine[:-1]
        reason += ", one left to the other processes"
    return set(mine), reason


def read_cores() -> Cores:
    """What this process may run on, now."""
    allowed = os.sched_getaffinity(0)
    firsts = {min(_siblings(p) & allowed | {p}) for p in allowed}
    nodes = [_cpu_list(path) & firsts for path in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist")]
    nodes = sorted((node for node in nodes if node), key=min)
    return Cores(nodes or [firsts], _quota())


def _siblings(processor: int) -> set[int]:
    """Processors of the same physical core."""
    return _cpu_list(Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")) or {processor}


def _cpu_list(path: Path) -> set[int]:
    """What a file like ``0-3,8`` names; nothing where there is none."""
    try:
        parts = [part.split("-") for part in path.read_text().strip().split(",") if part]
    except OSError:
        return set()
    return {processor for part in parts for processor in range(int(part[0]), int(part[-1]) + 1)}


def _quota() -> float | None:
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)
