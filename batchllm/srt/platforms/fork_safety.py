"""Whether a process may be forked into one that computes. Runs in the template's, the engine's or the server's process.

A fork copies memory and one thread. Locks that other threads hold stay locked in it, OpenMP waits for threads that are
not there, and CUDA refuses to work in the fork of a process that has used it.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import torch

_RESTARTED = ("jemalloc_bg_thd",)
"""Threads whose library prepares for forks, and starts them again there. (jemalloc comes with pyarrow.)"""
_CUDA_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED, cuda.h


def process_state() -> str | None:
    """What makes forks of this process unsafe, in words; None where nothing does."""
    if threading.active_count() > 1:
        return f"it has {threading.active_count()} Python threads"
    threads = [name for name in _thread_names() if name not in _RESTARTED]
    if len(threads) > 1:
        return f"it has the threads {', '.join(threads)}"
    if torch.cuda.is_initialized() or _has_cuda_context():
        return "it has used CUDA"
    if torch.xpu.is_available():  # Level Zero has no way to ask
        return "it may have used an Intel GPU"
    return None


def launch_state(server_args: Any) -> str | None:
    """What of these server arguments takes a new interpreter for each process, in words; None where nothing does."""
    from sglang.srt.environ import envs

    if server_args.enable_memory_saver:
        return "--enable-memory-saver preloads a library"
    if server_args.numa_node is not None and envs.SGLANG_NUMA_BIND_V2.get():
        return "--numa-node starts processes through numactl"
    return None


def _has_cuda_context() -> bool:
    """Whether CUDA's driver was initialised in this process, by whomever; asking does not initialise it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    context = ctypes.c_void_p()
    return int(driver.cuCtxGetCurrent(ctypes.byref(context))) != _CUDA_NOT_INITIALIZED


def _thread_names() -> list[str]:
    return [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
