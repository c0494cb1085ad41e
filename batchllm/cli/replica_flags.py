"""Flags of ``batchllm run`` and ``batchllm serve`` that ask for several engines."""

from __future__ import annotations

import argparse
from typing import Any


def add_replica_flags(parser: argparse._ActionsContainer, default: Any) -> None:
    """Add the flags.

    Args:
        parser: Where; the default of the others is its own.
        default: Of ``--replicas``.
    """
    parser.add_argument(
        "--replicas",
        type=int,
        default=default,
        metavar="N",
        help="engines that share the work, on Ray, each with a GPU or a part of the CPU cores (default: 1, no Ray)",
    )
    parser.add_argument(
        "--min-replicas", type=int, metavar="M", help="begin when so many are up; others join later (default: all)"
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="a Ray cluster that is there: auto, HOST:PORT or ray://HOST:PORT (default: a Ray of the command's own)",
    )
