"""A full disk in the test's own process: no file may grow, for the time of the operation that is to meet it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_may_have(num_bytes: int) -> Iterator[None]:
    """Writing beyond so many bytes of a file is refused, as on a full disk.

    The limit is of the whole process, and pytest's output may be a longer file already. So only the operation under
    test belongs inside: what the process has to print is written before, and nothing is printed within.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
