"""Host time of `plan_layout` for one decode step: what every step pays before its first kernel.

Every level of a group's path is 64 tokens. "one group" is one path that all rows read; "many groups" are paths of
16 rows each, that share their levels but the innermost two by two.

    OMP_NUM_THREADS=1 .venv/bin/python eval/bench_layout.py
"""

from __future__ import annotations

import time

import numpy as np

from batchllm.attention import PrefixPaths, check_layout, plan_layout

_LEVEL_LEN, _ROWS_OF_A_GROUP, _REPEATS = 64, 16, 300


def main() -> None:
    print("| rows | depth | groups | segments | plan, us | check, us |")
    print("|---|---|---|---|---|---|")
    for num_rows in (512, 1024, 4096):
        for depth in (1, 2, 3):
            for num_groups in (1, num_rows // _ROWS_OF_A_GROUP):
                num_segments, plan_us, check_us = _measure(num_rows, depth, num_groups)
                print(f"| {num_rows} | {depth} | {num_groups} | {num_segments} | {plan_us:.1f} | {check_us:.1f} |")


def _measure(num_rows: int, depth: int, num_groups: int) -> tuple[int, float, float]:
    """Segments of the step, and the median time of planning and of checking it, in microseconds."""
    random = np.random.default_rng(0)
    paths = PrefixPaths()
    leaves = _add_groups(paths, depth, num_groups)
    step = {
        "table_rows": random.permutation(num_rows).astype(np.int32),
        "qo_len": np.ones(num_rows, np.int32),
        "kv_len": random.integers(depth * _LEVEL_LEN + 1, 1000, num_rows).astype(np.int32),
        "leaf": np.array(leaves, np.int32)[random.integers(0, num_groups, num_rows)],
    }
    table = np.zeros((num_rows, 1000), np.int32)
    plan_us, check_us = [], []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        layout = plan_layout(**step, paths=paths)
        planned = time.perf_counter()
        check_layout(layout, table)
        plan_us.append((planned - start) * 1e6)
        check_us.append((time.perf_counter() - planned) * 1e6)
    return len(layout.segment_span), float(np.median(plan_us)), float(np.median(check_us))


def _add_groups(paths: PrefixPaths, depth: int, num_groups: int) -> list[int]:
    """The innermost prefix of each group; two share the prefix around it, four the one around that, and so on."""
    level = [-1]
    for below in range(depth - 1, -1, -1):
        num_nodes = -(-num_groups // 2**below)
        end = (depth - below) * _LEVEL_LEN
        level = [paths.add(level[i // 2] if len(level) > 1 else level[0], end) for i in range(num_nodes)]
    return level


if __name__ == "__main__":
    main()
