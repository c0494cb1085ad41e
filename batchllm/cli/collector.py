"""How often Python's garbage collector looks, in a process that handles millions of rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_EVERY = 100_000
"""Containers made between two looks of the garbage collector: those of a row go without it, and there are millions."""


def collect_rarely() -> None:
    """From now on, in a process that has nothing else to do."""
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


@contextmanager
def rare_collections() -> Iterator[None]:
    """The same, in here."""
    thresholds = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
