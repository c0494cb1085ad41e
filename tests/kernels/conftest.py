"""Each test of kernels runs on every instruction set, with one thread and with two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchllm.kernels.cpu import CpuKernels
from tests.kernels.levels import LEVELS, kernels_of, num_threads


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return kernels_of(request.param)


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with num_threads(request.param):
        yield
