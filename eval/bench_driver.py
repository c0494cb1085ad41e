"""What a row costs the driver: a million rows of 16 prompt tokens, all of the way but the engine.

Rows are read from a file, checked, planned, submitted in runs; an engine that answers at once gives completions, which
go to the journal and from there to the output, in input order. The bounds: 25 us a row, and the memory of the token
table (4 bytes a token) plus 300 MB.

    python eval/bench_driver.py --out eval/results/driver.md
    python eval/bench_driver.py --cases one replicas text --repetitions 1 --out eval/results/driver_replicas.md

Cases: one engine, in the driver's process; two in Ray actors (replicas), which take the processors from the driver, so
that what counts is the driver's own processor time; the same with rows of text, which are tokenized in the actors.
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
from multiprocessing import get_context
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
from batchllm.offline.runtime import Runtime, RuntimeInfo
from batchllm.offline.stop import StopSignal
from batchllm.request import Completion, SamplingParams

T = TypeVar("T")
_PROMPT_LEN = 16
_CASES = {"one": "one engine", "replicas": "two in Ray actors", "text": "the same, text"}


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

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(INFO, tokenizer)

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


def start_engine() -> InstantRuntime:
    """An engine in an actor, with the tokenizer of the embedded model."""
    return InstantRuntime(_tokenizer())


def start_replicas() -> Runtime:
    """Two of them."""
    from batchllm.distributed.cluster import Cluster, Resources
    from batchllm.distributed.runtime import ReplicatedRuntime

    resources = Resources(num_cpus=1, num_gpus=0)
    return ReplicatedRuntime(start_engine, cluster=Cluster(None), resources=resources, num_engines=2)


def _tokenizer() -> Any:
    from batchllm.default_model import default_model_path
    from batchllm.tokenizer import Tokenizer

    return Tokenizer.from_model(default_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=_CASES, default=["one"])
    parser.add_argument("--out")
    parser.add_argument("--input", help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=_CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.input:
        print(json.dumps(_run(Path(args.input), args.case)))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        for is_text in {case == "text" for case in args.cases}:
            # In a process of its own: the memory that it takes would count as that of who is measured.
            write = get_context("spawn").Process(target=_write_rows, args=(Path(name), args.rows, is_text))
            write.start()
            write.join()
        for case in args.cases * args.repetitions:
            path = Path(name, "text" if case == "text" else "ids")
            done = subprocess.run(
                [sys.executable, __file__, "--input", str(path), "--case", case],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results.append({"case": case} | json.loads(done.stdout))
    compare.write(args.out, f"The driver, {args.rows:,} rows", _text(results, args.cases), results)


def _text(results: list[compare.Result], cases: list[str]) -> str:
    of_cases = [[result for result in results if result["case"] == case] for case in cases]
    rows = []
    for field in ("us a row, processor", "us a row, wall", "of it ingest", "plan", "run", "output"):
        rows.append([field, *(f"{compare.median(runs, field):.1f}" for runs in of_cases), ""])
    rows[0][-1] = "25"
    for field in ("table MB", "peak MB before", "peak MB"):
        rows.append([field, *(f"{compare.median(runs, field):.0f}" for runs in of_cases), ""])
    over = [compare.median(runs, "peak MB") - compare.median(runs, "table MB") for runs in of_cases]
    rows.append(["peak less table, MB", *(f"{number:.0f}" for number in over), "300"])
    return compare.table(["", *(_CASES[case] for case in cases), "bound"], rows)


def _run(path: Path, case: str) -> dict[str, Any]:
    before = _peak_mb()
    runtime = InstantRuntime() if case == "one" else start_replicas()
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
                lambda: runtime,
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
        "table MB": stats.num_prompt_tokens * 4 / 1e6,
        "peak MB before": before,
        "peak MB": _peak_mb(),
        "reuse": 1 - stats.num_computed_prompt_tokens / stats.num_prompt_tokens,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _write_rows(folder: Path, num_rows: int, is_text: bool) -> None:
    """Groups of 100 rows share 12 of their 16 tokens, in random order; the texts of these where ``is_text``."""
    rng = random.Random(0)
    decode = _tokenizer().decode if is_text else None
    groups = [[rng.randrange(4096) for _ in range(12)] for _ in range(max(1, num_rows // 100))]
    with (folder / ("text" if is_text else "ids")).open("w") as file:
        for i in range(num_rows):
            ids = rng.choice(groups) + [rng.randrange(4096) for _ in range(_PROMPT_LEN - 12)]
            sampling = {"temperature": 0, "max_new_tokens": 1}
            prompt = {"input_ids": ids} if decode is None else {"prompt": decode(ids)}
            file.write(json.dumps({"id": f"row-{i}", **prompt, "sampling_params": sampling}) + "\n")


if __name__ == "__main__":
    main()
