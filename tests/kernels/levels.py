"""The instruction sets that the compiled kernels are tested on: all that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchllm.kernels.cpu import CpuKernels, levels, load

LEVELS = levels()
"""Best first."""

DTYPES = [torch.float32, torch.bfloat16]


def kernels_of(level: str) -> CpuKernels:
    """The kernels; a test that needs them fails where they were not built, with the reason."""
    kernels = load(level)
    assert isinstance(kernels, CpuKernels), kernels
    return kernels


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """So many threads within, as many as before behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """The same numbers each time, of a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
