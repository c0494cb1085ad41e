"""What processes have left in shared memory: files of theirs that no process has open any more."""

from __future__ import annotations

import os
import time
from pathlib import Path

_FOLDER = Path("/dev/shm")
_PREFIXES = ("sem.", "sglang", "batchllm")
_SETTLE_S = 10.0


def ownerless() -> set[str]:
    """Semaphores, and what SGLang and we keep there, without what any process has in its memory."""
    names = {name for name in os.listdir(_FOLDER) if name.startswith(_PREFIXES)}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except (OSError, ValueError):
            continue  # it has ended, or is not ours
        names = {name for name in names if f"{_FOLDER / name}" not in text}
    return names


def left_behind(before: set[str]) -> set[str]:
    """What is there and was not, and stays: engines of other tests come and go, and for a moment own nothing."""
    deadline = time.monotonic() + _SETTLE_S
    while (left := ownerless() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
