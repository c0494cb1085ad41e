"""What memory a process has: of tensors, and what it has freed. Runs in the scheduler's process."""

from __future__ import annotations

import ctypes
import mmap
import os

import torch

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 << 20
"""Bytes; glibc takes no larger one."""
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Let freed tensors' memory be taken by the next ones instead of going back to the system. What is free now, of
    loading the model, goes back.

    A step makes the same tensors for every layer. What comes from the system comes a page at a time and is set to zero,
    which takes as long as writing it several times. What the user has set stays, and nothing changes where the C
    library is not glibc.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def give_back_zeros(tensor: torch.Tensor) -> None:
    """Give the memory of a tensor of zeros back to the system, which gives zeros again where it is read or written.

    SGLang's table of slots is made for the most requests that could run. A tensor that has other numbers, is not on the
    CPU or not contiguous stays as it is.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or madvise is None or size <= 0:
        return
    lowest, highest = tensor.aminmax()  # `any` would make a byte for each number, and they would be kept
    if not lowest and not highest:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
