"""SGLang's LoRA layers on a CPU: they ask for pinned memory, which is of no use there and needs a GPU's driver. Runs in
the scheduler's process.

(Upstream: ``srt/lora/layers.py``, ``srt/lora/backend/torch_backend.py``,
``srt/lora/lora.py``.)
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

_MAKERS = ("arange", "empty", "tensor", "zeros")


class _WithoutPinning(types.ModuleType):
    """``torch`` for a module of SGLang's; what makes a tensor takes ``pin_memory`` and makes an ordinary one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return make_unpinned


def install() -> None:
    """Let SGLang's LoRA layers make ordinary tensors in this process."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    unpinned = _WithoutPinning("torch")
    for name in _MAKERS:
        setattr(unpinned, name, _unpinned(getattr(torch, name)))
    layers.torch = torch_backend.torch = unpinned
    # Adapters' weights pin themselves by the method. torch has no other way to leave that out.
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
