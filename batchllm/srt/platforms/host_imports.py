"""How SGLang is imported: once, before anything computes, without libraries that an engine has no use for. Runs in the
template's or the server's process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from batchllm.cache_folder import cache_folder
from batchllm.srt.platforms.cpu_environment import set_environment_defaults

_MADV_DONTNEED = 4  # sys/mman.h
_MAPPING = re.compile(r"^([0-9a-f]+-[0-9a-f]+ .*)\n((?:[A-Z].*\n)+)", re.MULTILINE)
"""A mapping in /proc/PID/smaps: its header, and its fields."""
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri")
_NEVER_USED = ("sklearn",)
"""Assisted generation in transformers draws a curve with it."""
_USED_ON_GPUS = ("flashinfer",)
"""Kernels, and the compilers that they come with."""


def may_have_accelerator() -> bool:
    """Whether this machine has a device file of a GPU. Asking loads no driver."""
    return any(map(os.path.exists, _ACCELERATORS))


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """While this is open, the libraries above are not found; afterwards they can be imported as ever.

    They take a fifth of the time and of the memory of an import of SGLang.
    """
    names = _NEVER_USED if may_have_accelerator() else _NEVER_USED + _USED_ON_GPUS
    hidden = [name for name in names if name not in sys.modules]
    # `import` finds no module, and `importlib.util.find_spec`, by which libraries ask, no spec.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # as the documentation of sys.modules says
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def prepare_environment() -> None:
    """Set what libraries read when they are loaded, unless the user has set it. Nothing heavy may be imported yet."""
    # Of numpy and scipy, which have little to compute here: it would start threads at import.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Whether there is a GPU is answered without CUDA, which cannot be used in a fork of a process that has used it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    # Folders that are made at import, by default among temporary files, where they would stay behind.
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torchinductor"), ("CUTE_DSL_CACHE_DIR", "cute-dsl")):
        if variable in os.environ:
            continue
        with contextlib.suppress(OSError):  # where the home cannot be written, the default is as good
            folder = cache_folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(folder)
    if not may_have_accelerator():
        set_environment_defaults()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While this is open, parts of SGLang can be imported in this process: their notices are not printed."""
    loggers = [logging.getLogger(name) for name in ("torch.utils.cpp_extension", "sglang", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with left_out():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_all() -> None:
    """Import what the processes of an engine need."""
    # Nothing that is imported is ever freed: each collection would look at all of it and find nothing.
    gc.disable()
    from batchllm.srt.platforms.untouched_cuda import untouched_cuda

    with left_out(), untouched_cuda():
        import sglang.srt.managers.data_parallel_controller  # noqa: F401 - SGLang imports it when an engine starts

        from batchllm.srt.entrypoints import engine  # noqa: F401 - for the forks
        from batchllm.srt.model_loader import model_registry
        from batchllm.srt.platforms import platform_cpu  # noqa: F401 - for the forks

        model_registry.make_lazy()
    give_back_clean_pages()
    gc.freeze()
    gc.enable()


def give_back_clean_pages() -> None:
    """Give back memory that only holds what is in a library's file: pages that were read once, while it was loaded.

    The kernel reads them again where they are needed. Mappings that may be written, or have been (relocations), stay.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for start, length in _clean_mappings(Path("/proc/self/smaps").read_text(errors="replace")):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


def _clean_mappings(smaps: str) -> list[tuple[int, int]]:
    """Start and length of the mappings of files that cannot be written and hold nothing but the file."""
    mappings = []
    for header, fields in _MAPPING.findall(smaps):
        span, permissions, _, _, inode, *_ = header.split()
        start, end = (int(address, 16) for address in span.split("-"))
        is_clean = re.search(r"^Anonymous:\s+0 kB$", fields, re.MULTILINE) is not None
        if inode != "0" and permissions[1] == "-" and permissions[3] == "p" and is_clean:
            mappings.append((start, end - start))
    return mappings
