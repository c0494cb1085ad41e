"""What a chat row costs until its tokens are there: read, checked, rendered, tokenized, stored. This checkout beside
another.

    git clone . /tmp/before && (cd /tmp/before && git checkout COMMIT && scripts/setup)
    python eval/bench_chats.py --before /tmp/before --rounds 2 --rows 6000 --documents 120 --out eval/results/chats.md

Three inputs: short chats; chats over documents in the system's message; the same with document and question in one
message. Rows come in random order. Token ids must be the same on both sides. The bounds: a short chat costs at most
1.15 of its time before; tokens a second over documents are at least 1.5 of those before. The engine's start is not
counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare

_ROOT = Path(__file__).resolve().parents[1]
_TEXT = "river sea wide runs over under north long short bridge stone water which where the a of and to in"
_WORDS = _TEXT.split()
_BOUNDS = {
    "short": "at most 1.15 of the time",
    "system": "at least 1.5 of the speed",
    "user": "at least 1.5 of the speed",
}
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, set up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--kinds", default=",".join(_BOUNDS))
    parser.add_argument("--out")
    parser.add_argument("--ingest", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ingest is not None:
        print(json.dumps(_ingest(args.ingest)))
        return
    sides = {"before": args.before.resolve(), "now": _ROOT}
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds.split(","):
            path = Path(folder, f"{kind}.jsonl")
            with path.open("w") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in _rows(kind, args.rows, args.documents))
            for number in range(args.rounds):
                for side, checkout in sides.items():
                    result = {"kind": kind, "side": side, "round": number, **_run(checkout, path)}
                    print(json.dumps(result), flush=True)
                    results.append(result)
    text = f"{args.rows:,} rows, {args.documents:,} documents.\n\n{_table(results)}"
    compare.write(args.out, "Chats to tokens", text, results)


def _rows(kind: str, num_rows: int, num_documents: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)

    def text(num_words: int) -> str:
        return " ".join(rng.choice(_WORDS) + ("." if rng.random() < 0.1 else "") for _ in range(num_words))

    documents = [text(900) for _ in range(num_documents)]
    for i in range(num_rows):
        question = text(8)
        if kind == "short":
            messages = [{"role": "user", "content": question}]
        elif kind == "system":
            system = f"Answer from this document.\n\n{rng.choice(documents)}"
            messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        else:
            messages = [{"role": "user", "content": f"{rng.choice(documents)}\n\nQuestion: {question}"}]
        body = {"model": "m", "messages": messages, "max_tokens": 8, "temperature": 0}
        yield {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}


def _run(checkout: Path, path: Path) -> Result:
    python = checkout / ".venv/bin/python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [python, "-W", "ignore", __file__, "--ingest", path],
        cwd=checkout,
        env=environment | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def _ingest(path: Path) -> Result:
    """In a process of its own, of either side: all rows of a file through an engine's tokenizer into a store."""
    import numpy as np

    from batchllm import BatchEngine
    from batchllm.dataset import read_rows
    from batchllm.offline.ingest import Ingest
    from batchllm.offline.job_rows import JobRows
    from batchllm.offline.row_spool import RowSpool
    from batchllm.offline.token_store import TokenStore
    from batchllm.request import SamplingParams

    def load(source: Any, job_rows: Any) -> int:
        spool = RowSpool(path.parent)
        ingest = Ingest(np.zeros(0, np.int64), _fail, spool)
        ingest.load(read_rows(source, defaults=SamplingParams()), lambda: job_rows)
        spool.close()
        return int(ingest.num_rows)

    with BatchEngine() as engine:
        load(_first(path), JobRows(engine.runtime.info, engine.runtime.tokenizer, TokenStore(None, 1 << 40)))
        store = TokenStore(None, 1 << 40)
        rows = JobRows(engine.runtime.info, engine.runtime.tokenizer, store)
        own = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        num_rows = load(path, rows)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        tokens = store.table()
        digest = hashlib.sha256(b"".join(tokens.row(i).tobytes() for i in range(len(tokens)))).hexdigest()[:12]
        return {
            "us_a_row": seconds / num_rows * 1e6,
            "driver_us_a_row": (after.ru_utime - own.ru_utime + after.ru_stime - own.ru_stime) / num_rows * 1e6,
            "tokens_a_second": store.num_tokens / seconds,
            "tokens_a_row": store.num_tokens / num_rows,
            "digest": digest,
        }


def _first(path: Path) -> Any:
    import io

    with path.open("rb") as stream:
        return io.BytesIO(b"".join(stream.readline() for _ in range(2)))


def _fail(bad: Any) -> None:
    raise RuntimeError(f"row {bad.index}: {bad.message}")


def _table(results: list[Result]) -> str:
    lines = []
    for kind in dict.fromkeys(result["kind"] for result in results):
        before, now = ([r for r in results if (r["kind"], r["side"]) == (kind, side)] for side in ("before", "now"))
        times = statistics.median(n["us_a_row"] / b["us_a_row"] for b, n in zip(before, now, strict=True))
        speeds = [f"{compare.median(side, 'tokens_a_second') / 1e6:.2f}" for side in (before, now)]
        costs = [f"{compare.median(side, 'us_a_row'):.0f}" for side in (before, now)]
        is_same = "yes" if len({r["digest"] for r in before + now}) == 1 else "NO"
        length = f"{now[0]['tokens_a_row']:.0f}"
        lines.append([kind, length, *costs, f"{times:.2f}", *speeds, f"{1 / times:.2f}", _BOUNDS[kind], is_same])
    header = ["chats", "tokens a row", "us a row before", "now", "ratio", "M tokens/s before", "now", "ratio", "bound"]
    return compare.table([*header, "same ids"], lines)


if __name__ == "__main__":
    main()
