"""What the C library does with freed memory. Runs in the scheduler's process."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 << 20
"""Bytes; glibc takes no larger one."""
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let freed tensors' memory be taken by the next ones instead of going back to the system. What is free now, of
    loading the model, goes back.

    A step makes the same tensors for every layer. What comes from the system comes a page at a time and is set to zero,
    which takes as long as writing it several times. Nothing changes where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
