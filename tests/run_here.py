"""The command in this process, on engines that are forked as those of other tests are."""

from __future__ import annotations

import signal
from pathlib import Path

from batchllm.cli import main


def run_here(*arguments: str | Path) -> int:
    """Runs ``batchllm`` with these arguments; returns its exit status."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
