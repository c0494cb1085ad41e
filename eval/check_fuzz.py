"""Whatever file is given to ``batchllm run``, it ends with a status and words: thousands of damaged and odd inputs.

Each is run by the real command, in this process, on an engine that answers at once. Checked: no exception escapes and
nothing hangs or crashes; the status is 0, 1 or 2, and 2 only where the file cannot be read at all or has no rows; a
finished job has one line for each non-blank line, or each row of a table, in order, and failed ones name their line;
standard error has our own lines only.

    python eval/check_fuzz.py --files 10000 --seed 0 --out eval/results/fuzz.md
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import compare
import fuzz_files
import pyarrow.parquet as pq
import zstandard

_MAX_FILE_S = 30
_SHOWN_LEN = 600
_REPORT_ROW = re.compile(
    r"(requests|prompt tokens|  computed|  optimum|output tokens|peak KV tokens|retractions|lengths learned|elapsed"
    r"|prompt tokens/s|output tokens/s) +[\d.,]+( .*)?"
)
_OUTPUTS = ("out.jsonl",) * 8 + ("out.jsonl.gz", "out.jsonl.zst", "out.parquet")
_FLAGS: tuple[tuple[str, ...], ...] = (
    *((),) * 8,
    ("--order", "finished"),
    ("--dedupe",),
    ("--errors", "err.jsonl"),
    ("--token-memory", "0.0000001"),
    ("--prompt-column", "prompt"),
    ("--messages-column", "messages"),
    ("--template", "{id}: {prompt}", "--carry", "id,sampling_params"),
    ("--id-column", "prompt", "--carry", "messages,input_ids"),
    ("--sampling", '{"max_new_tokens": 3, "n": 2}', "--retry", "1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # of a worker: the first of its files
    args = parser.parse_args()
    if args.first is not None:
        _work(range(args.first, args.files, args.workers), args.seed)
        return
    started = time.monotonic()
    with ThreadPoolExecutor(args.workers) as pool:
        results = [result for part in pool.map(lambda n: list(_watch(args, n)), range(args.workers)) for result in part]
    results.sort(key=lambda result: result["file"])
    assert [result["file"] for result in results] == list(range(args.files))
    elapsed = time.monotonic() - started
    wrong = [result for result in results if result["wrong"]]
    compare.write(args.out, f"Fuzz, {args.files:,} files", _table(results, elapsed), results)
    for result in wrong[:20]:
        print(f"file {result['file']}: {result['format']}, {result['kind']}, {result['flags']}: {result['wrong']}")
    if wrong:
        sys.exit(f"{len(wrong)} of {args.files} files went wrong")


def _table(results: list[dict[str, Any]], elapsed_s: float) -> str:
    counts = Counter((result["format"], result["status"]) for result in results)
    formats = sorted({result["format"] for result in results})
    rows = [[form, *(counts[form, status] for status in (0, 1, 2))] for form in formats]
    num_lines = sum(result["lines"] for result in results)
    num_failed = sum(result["failed"] for result in results)
    kinds = Counter(result["kind"] for result in results)
    return "\n\n".join(
        [
            compare.table(["input", "status 0", "status 1", "status 2"], rows),
            compare.table(["change", "files"], [[kind, num] for kind, num in kinds.most_common()]),
            f"{num_lines:,} lines of output, {num_failed:,} of them of failed rows. "
            f"{sum(bool(result['wrong']) for result in results)} files went wrong. "
            f"{len(results) / elapsed_s:.0f} files a second.",
        ]
    )


def _watch(args: argparse.Namespace, first: int) -> Iterator[dict[str, Any]]:
    """Results of a worker's files. One that ends before its time has crashed or hung on the file it was at."""
    while first < args.files:
        command = [sys.executable, __file__, "--first", str(first)]
        command += ["--files", str(args.files), "--seed", str(args.seed), "--workers", str(args.workers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None and worker.stderr is not None
            for line in worker.stdout:
                result = json.loads(line)
                yield result
                first = result["file"] + args.workers
            last_words = worker.stderr.read()
        if first < args.files:
            wrong = f"the process ended with {worker.returncode}: {last_words[-_SHOWN_LEN:]}"
            yield {"file": first, "format": "?", "kind": "?", "flags": [], "status": None, "lines": 0, "failed": 0} | {
                "wrong": wrong
            }
            first += args.workers


def _work(numbers: range, seed: int) -> None:
    """Runs files in this process, and prints a line of JSON for each."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cli"))
    from instant_engine import Settings, use_instant_engine

    use_instant_engine(Settings())
    told = os.fdopen(os.dup(1), "w")
    last_words = os.fdopen(os.dup(2), "w")
    shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)  # what libraries write there counts too
        for number in numbers:
            faulthandler.dump_traceback_later(_MAX_FILE_S, exit=True, file=last_words)
            with tempfile.TemporaryDirectory(dir=shared_memory) as name:
                result = _run_file(Path(name), number, seed, heard)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(result), file=told, flush=True)


def _run_file(folder: Path, number: int, seed: int, heard: Any) -> dict[str, Any]:
    from batchllm.cli import main as command

    rng = random.Random(f"{seed},{number}")
    made = fuzz_files.make(folder, rng)
    model = folder / "model"  # the embedded one would be read and hashed for every file
    model.mkdir()
    flags = rng.choice(_FLAGS)
    out = folder / rng.choice(_OUTPUTS)
    given = [str(folder / "err.jsonl") if flag == "err.jsonl" else flag for flag in flags]
    heard.seek(0)
    heard.truncate()
    lines: list[dict[str, Any]] = []
    try:
        status = command(["run", "-i", str(made.path), "-o", str(out), "-m", str(model), *given])
        sys.stderr.flush()
        heard.seek(0)
        said = heard.read().decode(errors="replace")
        if status in (0, 1):
            lines = _lines_of(out) + (_lines_of(folder / "err.jsonl") if "--errors" in flags else [])
        wrong = _find_wrong(made, flags, status, lines, said)
    except (Exception, SystemExit) as error:  # this is what is looked for
        status, wrong = None, f"{type(error).__name__}: {error}"[:_SHOWN_LEN]
    return {
        "file": number,
        "format": made.format,
        "kind": made.kind,
        "flags": list(flags),
        "status": status,
        "lines": len(lines),
        "failed": sum(_failed_line(line) is not None for line in lines),
        "wrong": wrong,
    }


def _find_wrong(
    made: fuzz_files.Made, flags: tuple[str, ...], status: int, lines: list[dict[str, Any]], said: str
) -> str | None:
    """What is not as it should be, in words."""
    for line in said.splitlines():
        if not line.startswith("batchllm: ") and not _REPORT_ROW.fullmatch(line):
            return f"on standard error: {line!r}"
    if status not in (0, 1, 2):
        return f"status {status}"
    if status == 2:
        return f"refused: {said}"[:_SHOWN_LEN] if made.must_run else None
    if made.row_lines is None:
        return None
    if len(lines) != len(made.row_lines):
        return f"{len(lines)} lines for {len(made.row_lines)} rows"
    in_order = "--order" not in flags and "--errors" not in flags
    for at, line in zip(made.row_lines, lines, strict=True):
        failed = _failed_line(line)
        if failed is not None and (failed != at if in_order else failed not in made.row_lines):
            return f"the row of line {at} failed as that of line {failed}"
    is_failed = any(_failed_line(line) is not None for line in lines)
    return None if status == is_failed else f"status {status}, and failed rows: {is_failed}"


def _failed_line(line: dict[str, Any]) -> int | None:
    """The line that a failed row names; None of an answered one."""
    if line.get("response") is None:
        return None if line.get("error") is None else int(line["error"]["line"])
    if line["response"]["status_code"] == 200:
        return None
    said = re.match(r"line (\d+): ", line["response"]["body"]["error"]["message"])
    return -1 if said is None else int(said[1])


def _lines_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return [json.loads(line) for line in pq.read_table(path).column("record").to_pylist()]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return [json.loads(line) for line in data.splitlines()]


if __name__ == "__main__":
    main()
