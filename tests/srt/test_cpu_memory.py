"""Claims about memory that a process on a CPU has."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
import torch

from batchllm.srt.platforms.cpu_memory import give_back_zeros

_NUM_BYTES = 64 << 20
_REPEATS_A_STEP = """
import resource, sys
import numpy as np
from batchllm.srt.platforms.cpu_memory import keep_freed_memory

keep_freed_memory()
def num_faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(16 << 20, np.uint8) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([num_faults_of_a_step() for _ in range(4)][-1])
"""


@pytest.mark.parametrize(("variables", "is_kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)])
def test_a_step_takes_the_memory_of_the_one_before(variables: dict[str, str], is_kept: bool) -> None:
    """No page of it is new, unless the user has set something else."""
    done = subprocess.run(
        [sys.executable, "-c", _REPEATS_A_STEP], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 100) == is_kept, done.stdout


def test_a_tensor_of_zeros_gives_its_memory_back_and_stays_one() -> None:
    zeros = torch.zeros(1 << 14, _NUM_BYTES >> 16, dtype=torch.int32)
    before = psutil.Process().memory_info().rss
    give_back_zeros(zeros)
    assert psutil.Process().memory_info().rss < before - _NUM_BYTES // 2
    assert not zeros.any()
    zeros[5, 7] = 3
    assert zeros.sum() == 3


def test_the_look_at_a_tensor_takes_no_memory_that_is_kept() -> None:
    """It is looked at where what has been freed stays with the process."""
    code = f"""
import psutil, torch
from batchllm.srt.platforms.cpu_memory import give_back_zeros, keep_freed_memory

keep_freed_memory()
zeros = torch.zeros(1 << 14, {_NUM_BYTES} >> 16, dtype=torch.int32)
give_back_zeros(zeros[:1])  # what the first call needs anyway
before = psutil.Process().memory_info().rss
give_back_zeros(zeros)
print(before - psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.9 * _NUM_BYTES, done.stdout


def test_a_tensor_that_has_numbers_keeps_them() -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.int32)
    tensor[1 << 19] = 1
    for view in (tensor, tensor[::2], tensor[1:]):
        give_back_zeros(view)
    assert tensor.sum() == 1 and tensor[1 << 19] == 1
