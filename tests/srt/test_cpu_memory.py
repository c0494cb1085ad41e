"""Claims about memory that a process on a CPU has."""

from __future__ import annotations

import psutil
import torch

from batchllm.srt.platforms.cpu_memory import give_back_zeros

_NUM_BYTES = 64 << 20


def test_a_tensor_of_zeros_gives_its_memory_back_and_stays_one() -> None:
    zeros = torch.zeros(1 << 14, _NUM_BYTES >> 16, dtype=torch.int32)
    before = psutil.Process().memory_info().rss
    give_back_zeros(zeros)
    assert psutil.Process().memory_info().rss < before - _NUM_BYTES // 2
    assert not zeros.any()
    zeros[5, 7] = 3
    assert zeros.sum() == 3


def test_a_tensor_that_has_numbers_keeps_them() -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.int32)
    tensor[1 << 19] = 1
    for view in (tensor, tensor[::2], tensor[1:]):
        give_back_zeros(view)
    assert tensor.sum() == 1 and tensor[1 << 19] == 1
