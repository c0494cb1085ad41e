"""Several real engines on this machine: what they compute, whether they answer what one does, and who ends last.

``batchllm run`` with 1, 2 and 4 replicas on groups whose sizes are Zipf. Engines share this machine's cores, so times
say nothing of speed; when each engine ends says how even the work was.

    python eval/bench_replicas_run.py --out eval/results/replicas_run.md
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import compare
import orjson

from batchllm.cli import main as batchllm
from batchllm.default_model import WIDTH_64, cached_model_path
from batchllm.distributed import runtime
from batchllm.distributed.cluster import Cluster, Resources
from batchllm.distributed.replica import Replica
from batchllm.errors import EngineDiedError
from batchllm.host.messages import Submit

_PREFIX_LEN, _PRIVATE_LEN = 400, 30


class _SharedCluster(Cluster):
    """A Ray on which engines share the cores, however many they are."""

    def resources(self, num_engines: int, gpus_per_engine: int) -> Resources:
        return Resources(num_cpus=0, num_gpus=0)


class _Clocked(Replica):
    """Notes when engines were first asked for something of each job, and when each last answered."""

    began_s: dict[int, float] = {}  # noqa: RUF012 - one for all replicas
    ended_s: dict[tuple[int, int], float] = {}  # noqa: RUF012 - the same
    num_answered: Counter[tuple[int, int]] = Counter()  # noqa: RUF012 - the same

    def send(self, message: Any) -> None:
        if isinstance(message, Submit):
            self.began_s.setdefault(message.job_id, time.monotonic())
        super().send(message)

    async def receive(self) -> list[Any]:
        outputs = await super().receive()
        for output in outputs:
            if not isinstance(output, EngineDiedError) and output[1].positions:
                self.ended_s[output[0], self.number] = time.monotonic()
                self.num_answered[output[0], self.number] += len(output[1].positions)
        return outputs


def main() -> None:
    args = _arguments()
    runtime.Replica = _Clocked  # type: ignore[misc]  # a class is put in a class's place, to be timed
    results: list[compare.Result] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "in.jsonl", args)
        expected: list[Any] | None = None
        for number, num_replicas in enumerate([1, *map(int, args.replicas.split(","))]):
            answers, result = _run(folder, number, num_replicas, args)
            expected = expected or answers
            result["num_different"] = sum(one != other for one, other in zip(answers, expected, strict=True))
            results.append(result)
            print(json.dumps(result), flush=True)
    compare.write(args.out, "Several real engines on one machine", _text(results, args), results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--replicas", default="2,4,2,4")
    parser.add_argument("--pool", type=int, default=16384)
    parser.add_argument("--out")
    return parser.parse_args()


def _write_rows(path: Path, args: argparse.Namespace) -> None:
    """Groups whose sizes are Zipf, the largest a third of the rows; outputs log-normal."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    group = 0
    while len(rows) < args.rows:
        prefix = [rng.randrange(10, 1999) for _ in range(_PREFIX_LEN)]
        size = max(1, round(args.rows / 3 / (group + 1)))
        for _ in range(min(size, args.rows - len(rows))):
            sampling = {
                "temperature": 0 if len(rows) % 2 else 0.8,
                "max_new_tokens": min(128, max(1, round(rng.lognormvariate(2.5, 0.8)))),
                "ignore_eos": True,
            }
            ids = prefix + [rng.randrange(10, 1999) for _ in range(_PRIVATE_LEN)]
            rows.append({"id": str(len(rows)), "input_ids": ids, "sampling_params": sampling})
        group += 1
    rng.shuffle(rows)
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))


def _run(folder: Path, number: int, num_replicas: int, args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    out, report = folder / f"out{number}.jsonl", folder / f"report{number}.json"
    for noted in (_Clocked.began_s, _Clocked.ended_s, _Clocked.num_answered):
        noted.clear()
    command = ["run", "-i", str(folder / "in.jsonl"), "-o", str(out), "--report", str(report)]
    command += ["-m", cached_model_path(WIDTH_64), "--max-total-tokens", str(args.pool), "--random-seed", "7"]
    if num_replicas > 1:
        command += ["--replicas", str(num_replicas)]
    import batchllm.cli.replicas as replicas

    replicas.Cluster = _SharedCluster  # type: ignore[misc]  # likewise, to share the cores
    if (status := batchllm(command)) != 0:
        raise RuntimeError(f"{command}: {status}")
    numbers = json.loads(report.read_text())
    result = {"replicas": num_replicas, "rows": args.rows} | {
        name: numbers[f"num_{name}_tokens"] for name in ("computed_prompt", "optimal_prompt", "cut")
    }
    result |= {"run_s": numbers["run_s"], "alone": None, "rows_of_engines": []}
    if num_replicas > 1:
        job_id = max(_Clocked.began_s)  # those before it have warmed the engines up
        ends = sorted(end for (job, _), end in _Clocked.ended_s.items() if job == job_id)
        result["alone"] = (ends[-1] - ends[-2]) / (ends[-1] - _Clocked.began_s[job_id])
        result["rows_of_engines"] = sorted(n for (job, _), n in _Clocked.num_answered.items() if job == job_id)
    answers = [(line["id"], line["output_ids"]) for line in map(orjson.loads, out.read_bytes().splitlines())]
    return answers, result


def _text(results: list[compare.Result], args: argparse.Namespace) -> str:
    text = (
        f"{args.rows} rows of a one-layer model, prefixes of {_PREFIX_LEN} tokens over groups whose sizes are Zipf, "
        f"the largest a third of the rows, {_PRIVATE_LEN} tokens of each row, outputs log-normal, half of the rows "
        f"drawn; a KV pool of {args.pool} tokens an engine. Engines share the cores. Cuts: what the plan says that its "
        "cuts cost. Alone: part of the time from the first request to the last answer in which only one engine had "
        "not ended. Different: rows whose tokens are not those of one engine."
    )
    one = results[0]["optimal_prompt"]
    rows = [
        [
            r["replicas"],
            f"{r['computed_prompt']:,}",
            f"{r['computed_prompt'] / one:.4f}",
            f"{r['cut'] / one:.4f}",
            "" if r["alone"] is None else f"{r['alone']:.3f}",
            " ".join(map(str, r["rows_of_engines"])),
            r["num_different"],
            f"{r['run_s']:.1f}",
        ]
        for r in results
    ]
    header = ["engines", "computed", "over the optimum", "cuts", "alone", "rows of each", "different", "seconds"]
    return f"{text}\n\n{compare.table(header, rows)}"


if __name__ == "__main__":
    main()
