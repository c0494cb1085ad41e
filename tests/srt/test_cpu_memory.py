"""Claims about what becomes of freed memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
