"""Questions about GPUs that SGLang asks while it is imported, answered without CUDA. Runs in the template's or the
server's process.

Upstream asks ``torch.cuda`` for the compute capability at import, which initialises CUDA: ``sgl_kernel/load_utils.py``,
``srt/layers/deep_gemm_wrapper/configurer.py``, ``kernels/ops/quantization/fp8_kernel.py``. CUDA cannot be used in the
fork of a process that has initialised it. NVIDIA's management library answers the same questions from the driver and
initialises nothing. `batchllm.srt.platforms.fork_safety` checks afterwards whether that was enough.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

_NAMES = ("current_device", "get_device_capability", "get_device_name", "get_device_properties")


class Properties:
    """What ``torch.cuda.get_device_properties`` has, as far as the management library knows; the rest by CUDA.

    Args:
        device: Number of the device, as CUDA counts.
    """

    def __init__(self, device: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
            self.major, self.minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            self.name = _text(pynvml.nvmlDeviceGetName(handle))
            self.total_memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        finally:
            pynvml.nvmlShutdown()
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda.get_device_properties(self._device), name)


@contextlib.contextmanager
def untouched_cuda() -> Iterator[None]:
    """While this is open, the functions above do not initialise CUDA; afterwards they are torch's own.

    Also where an import has kept one of them.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        yield
        return
    is_open = True
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (_properties(device).major, _properties(device).minor),
        "get_device_name": lambda device=None: _properties(device).name,
        "get_device_properties": lambda device=None: _properties(device),
    }

    def replaced(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def ask(*args: Any, **kwargs: Any) -> Any:
            return (answers[name] if is_open else own)(*args, **kwargs)

        return ask

    before = {name: getattr(torch.cuda, name) for name in _NAMES}
    for name, own in before.items():
        setattr(torch.cuda, name, replaced(name, own))
    try:
        yield
    finally:
        is_open = False
        for name, own in before.items():
            setattr(torch.cuda, name, own)


@functools.cache
def _properties(device: Any) -> Properties:
    if device is None:
        return Properties(0)
    return Properties(device if isinstance(device, int) else torch.device(device).index or 0)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
