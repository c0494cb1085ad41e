"""Claims about how many threads compute, and where."""

from __future__ import annotations

import os

import pytest

from batchllm.srt.platforms.cpu_threads import Cores, choose, read_cores


@pytest.mark.parametrize(
    ("num_cores", "quota", "num_threads"),
    [(1, None, 1), (2, None, 2), (7, None, 7), (8, None, 7), (64, None, 63), (64, 2.0, 2), (64, 0.5, 1)],
)
def test_one_process_takes_a_nodes_cores(num_cores: int, quota: float | None, num_threads: int) -> None:
    """But for one where there are many, and no more than its container's time."""
    mine, reason = choose(Cores([set(range(num_cores))], quota), 1, 0)
    assert len(mine) == num_threads and f"{num_cores} cores" in reason


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 5])
def test_processes_share_no_core_and_stay_on_a_node(num_processes: int) -> None:
    nodes = [set(range(6)), set(range(6, 12))]
    taken: set[int] = set()
    for rank in range(num_processes):
        mine, reason = choose(Cores(nodes), num_processes, rank)
        assert mine and any(mine <= node for node in nodes) and "NUMA" in reason
        assert not mine & taken
        taken |= mine


def test_more_processes_than_cores_have_a_thread_each() -> None:
    assert all(len(choose(Cores([{0, 1}]), 4, rank)[0]) == 1 for rank in range(4))


def test_only_cores_that_the_process_may_run_on_count() -> None:
    cores = read_cores()
    assert set().union(*cores.nodes) <= os.sched_getaffinity(0)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert read_cores().nodes == [{min(before)}]
    finally:
        os.sched_setaffinity(0, before)
