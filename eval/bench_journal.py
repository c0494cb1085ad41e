"""What the journal costs a job on the embedded model: runs with it and without, in turn, on one engine.

Without it, results are kept in a list and written to the output in the end. The bound: at most 3 % slower.

    python eval/bench_journal.py --out eval/results/journal.md
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import numpy as np

from batchllm import BatchEngine
from batchllm.dataset import read_rows
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.journal import Journal
from batchllm.offline.outputs import Outputs
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.stop import StopSignal
from batchllm.request import SamplingParams


class ListJournal:
    """A journal that forgets when the process ends."""

    def __init__(self) -> None:
        self._lines: dict[int, bytes] = {}

    def __enter__(self) -> ListJournal:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def num_rows(self) -> int:
        return len(self._lines)

    def finished(self) -> np.ndarray:
        return np.zeros(0, np.int64)

    failed = finished

    def append(self, index: int, line: bytes, **_: Any) -> None:
        self._lines[index] = line

    def is_due(self, now: float) -> bool:
        return False

    def commit(self) -> int:
        return 0

    def note(self, key: str, value: Any) -> None:
        pass

    def results(self, order: str, *, failed: bool | None = None) -> Iterator[bytes]:
        return (self._lines[index] for index in sorted(self._lines))


class Kept:
    """A runtime that the end of a job does not end."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def shutdown(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--out")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=".") as name, BatchEngine(max_total_tokens=16_384, random_seed=1) as engine:
        folder = Path(name)
        _write_rows(folder / "in.jsonl", args.rows)
        for repetition in range(-1, args.repetitions):  # the first warms up
            for kind in ("off", "on") if repetition % 2 else ("on", "off"):
                elapsed_s = _run(folder, f"{kind}{repetition}", kind == "on", Kept(engine.runtime))
                if repetition >= 0:
                    results.append({"journal": kind, "elapsed_s": elapsed_s})
    times = {kind: [r["elapsed_s"] for r in results if r["journal"] == kind] for kind in ("off", "on")}
    ratios = [on / off for on, off in zip(times["on"], times["off"], strict=True)]
    rows = [
        [kind, f"{statistics.median(found):.2f}", ", ".join(f"{t:.2f}" for t in found)] for kind, found in times.items()
    ]
    text = compare.table(["journal", "seconds, median", "each run"], rows)
    text += (
        f"\n\nOn / off, pair by pair: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), "
    )
    text += f"of {args.rows:,} rows; the bound is 1.03."
    compare.write(args.out, "Journal on and off", text, results)


def _run(folder: Path, name: str, has_journal: bool, runtime: Kept) -> float:
    job_folder = folder / name
    started = time.perf_counter()
    journal: Any = ListJournal()
    if has_journal:
        journal = Journal.create(job_folder, fingerprint=Fingerprint({}), command={})
    with journal, Progress(None, show=False) as progress, StopSignal(0.0) as stop:
        outputs = Outputs(str(folder / f"{name}.jsonl"), errors_path=None, order="input", journal=journal)
        runner = Runner(
            lambda: runtime,  # it stands in for one
            journal=journal,
            recorder=Recorder(journal, outputs, progress, None),
            progress=progress,
            stop=stop,
            folder=folder,
            options=RunOptions(),
        )
        assert runner.run(read_rows(folder / "in.jsonl", defaults=SamplingParams()))
        outputs.finish()
        runner.close()
    return time.perf_counter() - started


def _write_rows(path: Path, num_rows: int) -> None:
    """Groups of 20 rows share 48 of their 64 tokens; 8 are generated."""
    rng = random.Random(0)
    groups = [[rng.randrange(10, 4000) for _ in range(48)] for _ in range(num_rows // 20)]
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    with path.open("w") as file:
        for i in range(num_rows):
            ids = rng.choice(groups) + [rng.randrange(10, 4000) for _ in range(16)]
            file.write(json.dumps({"id": str(i), "input_ids": ids, "sampling_params": sampling}) + "\n")


if __name__ == "__main__":
    main()
