"""Flags of ``batchllm serve`` that are not the engine's, whether it has one engine or several."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchllm.cli.engine_flags import flag_value, with_config
from batchllm.cli.replica_flags import add_replica_flags
from batchllm.errors import ConfigError

if TYPE_CHECKING:
    from batchllm.server import BatchOptions

_GRACE_S = 20.0
"""With this and what flushing takes, the 30 s that Kubernetes gives are enough."""


def wants_replicas(flags: list[str]) -> bool:
    """Whether these flags of a command line ask for several engines, or for engines on a Ray that is there.

    Those that ask for help get the help of one, which has every flag.
    """
    if {"-h", "--help"} & set(flags):
        return False
    flags = with_config(flags)
    return flag_value(flags, "ray-address") is not None or flag_value(flags, "replicas") not in (None, "1")


def grace_of(given: dict[str, Any]) -> float:
    """Seconds that live requests have to finish; taken out of what was given.

    Raises:
        ConfigError: It is no such number.
    """
    grace_s: float = given.pop("grace", _GRACE_S)
    if not 0 <= grace_s < math.inf:
        raise ConfigError(f"--grace {grace_s}: must be a number of seconds from 0")
    return grace_s


def add_own_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags, without defaults."""
    add_replica_flags(group, argparse.SUPPRESS)
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


def batch_options(given: dict[str, Any], port: int) -> BatchOptions:
    """Options of the batch API.

    Args:
        given: Values of flags, by their names with ``batch_`` in front.
        port: The server's; names the storage where none is given.

    Raises:
        ConfigError: A value is out of range.
    """
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


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with the server's address, taken before engines start; nobody is let in before it listens.

    Raises:
        ConfigError: The address cannot be had.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family = min(family for family, *_ in found)  # IPv4's is less: of a name that has both, such as localhost
            listener = stack.enter_context(socket.socket(family))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(f"--host {host} --port {port}: {error}; give another address") from error
        yield listener
