"""What a row costs the driver: a million rows of 16 prompt tokens, all of the way but the engine.

Rows are read from a file, checked, planned, submitted in runs; an engine that answers at once gives completions, which
go to the journal and from there to the output, in input order. The bounds: 25 us a row, and the memory of the token
table (4 bytes a token) plus 300 MB.

    python eval/bench_driver.py --out eval/results/driver.md
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import compare

from batchllm.dataset import open_input, read_rows
from batchllm.offline.fake_runtime import FakeRequest, FakeRuntime
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.journal import Journal
from batchllm.offline.outputs import Outputs
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.runtime import RuntimeInfo
from batchllm.offline.stop import StopSignal
from batchllm.request import Completion, SamplingParams

T = TypeVar("T")
_PROMPT_LEN = 16


INFO = RuntimeInfo(
    model_name="instant",
    context_len=2048,
    vocab_size=4096,
    kv_capacity_tokens=131_072,
    kv_limit_tokens=131_072,
    num_unstored_tokens=1,
    page_size=1,
    random_seed=0,
    has_seeded_sampling=True,
    has_grammar=True,
)


class InstantRuntime(FakeRuntime):
    """Answers whatever was submitted, at once, each request with one token."""

    def __init__(self) -> None:
        super().__init__(INFO)

    def answer(self, request: FakeRequest) -> Completion:
        return Completion(
            index=0,
            text="An answer.",
            output_ids=[7],
            finish_reason="length",
            prompt_tokens=_PROMPT_LEN,
            cached_tokens=4,
        )

    def shutdown(self) -> None:
        assert self.closed == [True]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--input", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.input:
        print(json.dumps(_run(Path(args.input))))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "in.jsonl")
        _write_rows(path, args.rows)
        for _ in range(args.repetitions):
            done = subprocess.run(
                [sys.executable, __file__, "--input", str(path)], capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout))
    fields = ["us a row, wall", "us a row, processor", "of it ingest", "plan", "run", "output"]
    rows = [[field, f"{compare.median(results, field):.1f}", 25 if " row" in field else ""] for field in fields]
    rows += [
        [field, f"{compare.median(results, field):.0f}", ""] for field in ("table MB", "peak MB before", "peak MB")
    ]
    over = compare.median(results, "peak MB") - compare.median(results, "table MB")
    rows.append(["peak less table, MB", f"{over:.0f}", 300])
    compare.write(args.out, f"The driver, {args.rows:,} rows", compare.table(["", "median", "bound"], rows), results)


def _run(path: Path) -> dict[str, Any]:
    before = _peak_mb()
    started, started_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name, "job")
        source = open_input(str(path), spool_folder=folder)
        out = Path(name, "out.jsonl")
        with (
            Journal.create(folder, fingerprint=Fingerprint({"input": source.content_hash()}), command={}) as journal,
            Progress(None, show=False) as progress,
            StopSignal(0.0) as stop,
        ):
            outputs = Outputs(str(out), errors_path=None, order="input", journal=journal)
            runner = Runner(
                InstantRuntime,
                journal=journal,
                recorder=Recorder(journal, outputs, progress, None),
                progress=progress,
                stop=stop,
                folder=folder,
                options=RunOptions(),
            )
            outputs.begin()
            assert runner.run(read_rows(source, defaults=SamplingParams()))
            answered = time.perf_counter()
            outputs.finish()
            runner.close()
        finished, finished_cpu = time.perf_counter(), time.process_time()
        with out.open("rb") as file:
            num_lines = sum(1 for _ in file)
    num_rows, stats = runner.num_rows, runner.stats
    assert num_lines == num_rows
    return {
        "us a row, wall": (finished - started) / num_rows * 1e6,
        "us a row, processor": (finished_cpu - started_cpu) / num_rows * 1e6,
        "of it ingest": (stats.read_s + stats.tokenize_s) / num_rows * 1e6,
        "plan": stats.plan_s / num_rows * 1e6,
        "run": stats.run_s / num_rows * 1e6,
        "output": (finished - answered) / num_rows * 1e6,
        "table MB": num_rows * _PROMPT_LEN * 4 / 1e6,
        "peak MB before": before,
        "peak MB": _peak_mb(),
        "reuse": 1 - stats.num_computed_prompt_tokens / stats.num_prompt_tokens,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _write_rows(path: Path, num_rows: int) -> None:
    """Groups of 100 rows share 12 of their 16 tokens, in random order."""
    rng = random.Random(0)
    groups = [[rng.randrange(4096) for _ in range(12)] for _ in range(max(1, num_rows // 100))]
    with path.open("w") as file:
        for i in range(num_rows):
            ids = rng.choice(groups) + [rng.randrange(4096) for _ in range(_PROMPT_LEN - 12)]
            sampling = {"temperature": 0, "max_new_tokens": 1}
            file.write(json.dumps({"id": f"row-{i}", "input_ids": ids, "sampling_params": sampling}) + "\n")


if __name__ == "__main__":
    main()
