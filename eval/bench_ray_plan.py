"""A dataset of 100,000,000 tokens put in units by Ray Data, beside the planner that has them in memory.

Both begin with the same parquet files. The plan of Ray Data is the local planner's but for the borders of units, which
state what they cost: each unit that comes out is planned by itself, and what all of them compute together is counted.

    python eval/bench_ray_plan.py --out eval/results/ray_plan.md
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import bench_planner
import compare
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.planner import plan_batch
from batchllm.ray import plan
from batchllm.tokens import TokenTable

_NUM_FILES = 8
_STORE_BYTES = 3 << 29
_DEFAULT_SCALES = {"documents": 100 / 256, "zipf_groups": 0.89}
"""What makes about 100,000,000 tokens of each shape."""


class _PeakMemory:
    """The most memory that this process and its children have at a time, above what it began with.

    Attributes:
        bytes: Proportional set sizes.
    """

    def __init__(self) -> None:
        self.bytes = self._before = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _PeakMemory:
        self._before = _set_size(psutil.Process())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            me = psutil.Process()
            now = sum(_set_size(process) for process in [me, *me.children(recursive=True)])
            self.bytes = max(self.bytes, now - self._before)


def _set_size(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(_DEFAULT_SCALES), default=list(_DEFAULT_SCALES))
    parser.add_argument("--scale", type=float, help="instead of what makes about 100,000,000 tokens")
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--out")
    args = parser.parse_args()
    results = []
    for shape in args.shape:
        folder = Path(tempfile.mkdtemp())
        try:
            _write(shape, args.scale or _DEFAULT_SCALES[shape], folder / "in")
            result = {"shape": shape} | _locally(folder / "in")
            result |= _through_ray(folder, args.engines)
            results.append(result)
        finally:
            shutil.rmtree(folder)
    compare.write(args.out, "100,000,000 tokens planned through Ray Data", _text(results, args.engines), results)


def _write(shape: str, scale: float, folder: Path) -> None:
    """The rows of a shape of `bench_planner`, in a few files."""
    table = bench_planner.tokenized(bench_planner.SHAPES[shape](scale))
    folder.mkdir()
    ids = pa.ListArray.from_arrays(pa.array(table.offsets.astype(np.int32)), pa.array(table.tokens))
    rows = pa.table({"id": pa.array([f"row-{i}" for i in range(len(table))]), "input_ids": ids})
    size = -(-len(table) // _NUM_FILES)
    for number in range(_NUM_FILES):
        pq.write_table(rows.slice(number * size, size), folder / f"{number}.parquet")


def _tokens(ids: pa.Array) -> TokenTable:
    ids = pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(ids.value_lengths())), pa.int32()), ids.flatten())
    return TokenTable(tokens=ids.values.to_numpy().astype(np.int32), offsets=ids.offsets.to_numpy().astype(np.int64))


def _locally(folder: Path) -> dict[str, Any]:
    plan_batch(TokenTable.from_lists([[1, 2], [1, 3]]))  # compiled
    with _PeakMemory() as peak:
        began = time.perf_counter()
        table = _tokens(pq.read_table(folder, columns=["input_ids"])["input_ids"].combine_chunks())
        planned = plan_batch(table)
        seconds = time.perf_counter() - began
    return {
        "num_rows": len(table),
        "num_tokens": table.num_tokens,
        "num_computed_locally": int(planned.computed_lens().sum()),
        "local_s": seconds,
        "local_bytes": peak.bytes,
    }


def _through_ray(folder: Path, num_engines: int) -> dict[str, Any]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", "RAY_AUTH_MODE": "disabled"}
    import ray
    import ray.data

    ray.init(
        include_dashboard=False, object_store_memory=_STORE_BYTES, _temp_dir=str(folder / "ray"), log_to_driver=False
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        with _PeakMemory() as peak:
            began = time.perf_counter()
            units = plan(ray.data.read_parquet(str(folder / "in")), num_engines=num_engines)
            cut_s = time.perf_counter() - began
            blocks = units.materialize()
            seconds = time.perf_counter() - began
        num_rows = num_units = num_computed = num_stated = 0
        for batch in blocks.iter_batches(batch_size=1, batch_format="pyarrow"):
            ids = batch.column("rows").combine_chunks().flatten().field("input_ids")
            num_computed += int(plan_batch(_tokens(ids)).computed_lens().sum())
            num_rows, num_units = num_rows + len(ids), num_units + 1
            num_stated += batch.column("num_cut_tokens")[0].as_py()
    finally:
        ray.shutdown()
    return {
        "num_rows_in_units": num_rows,
        "num_units": num_units,
        "num_computed_in_units": num_computed,
        "num_stated_cut_tokens": num_stated,
        "borders_s": cut_s,
        "ray_s": seconds,
        "ray_bytes": peak.bytes,
    }


def _text(results: list[compare.Result], num_engines: int) -> str:
    rows = []
    for r in results:
        more = r["num_computed_in_units"] - r["num_computed_locally"]
        rows += [
            [r["shape"], "rows", f"{r['num_rows']:,}", f"{r['num_rows_in_units']:,}"],
            ["", "tokens", f"{r['num_tokens']:,}", ""],
            ["", "units", "", r["num_units"]],
            ["", "prompt tokens computed", f"{r['num_computed_locally']:,}", f"{r['num_computed_in_units']:,}"],
            ["", "more than locally", "", f"{more:,}, stated {r['num_stated_cut_tokens']:,}"],
            ["", "s until the borders are known", "", f"{r['borders_s']:.0f}"],
            ["", "s, all", f"{r['local_s']:.1f}", f"{r['ray_s']:.0f}"],
            ["", "peak memory above the start, MB", f"{r['local_bytes'] / 1e6:.0f}", f"{r['ray_bytes'] / 1e6:.0f}"],
        ]
    header = ["shape", "", "local planner", f"Ray Data, for {num_engines} engines"]
    return (
        f"{compare.table(header, rows)}\n\nSeconds from files on disk: locally to a plan, by Ray Data to units with "
        f"all their rows. Memory is of the driver and all processes that it starts, Ray's store of "
        f"{_STORE_BYTES / 1e6:.0f} MB in it."
    )


if __name__ == "__main__":
    main()
