"""The server on a CPU: plain requests from many threads against stock SGLang's, and a batch against `batchllm run`.

Plain requests: 2,000 over shuffled shared prefixes from 64 threads, the embedded model, a pool of 8,192 tokens,
float32, one compute thread. Every stock policy runs once, then the best of them and ours in turn. Answers are compared.

Batch: 2,000 rows over shared prefixes through the batch API, from the creation of the batch until it is completed, and
`batchllm run` on the same rows, without the start of its engine; in turn.
Prompt tokens computed are the server's count.

    python eval/bench_server.py --parts plain --out eval/results/server_plain.md
    python eval/bench_server.py --parts batch --out eval/results/server_batch.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import compare
import server_process
import workloads
from openai import OpenAI

_POLICIES = ("fcfs", "lpm", "dfs-weight", "lof")
_POOL = ("--max-total-tokens", "8192", "--chunked-prefill-size", "2048", "--random-seed", "0")
_LOAD = Path(__file__).with_name("http_load.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("plain", "batch"), default=["plain", "batch"])
    parser.add_argument("--plain", default="one_level(0, 100, 20)", help="workload of the plain requests")
    parser.add_argument("--batch", default="one_level(1, 100, 20)", help="workload of the batch")
    parser.add_argument("--policies", nargs="+", default=list(_POLICIES), help="stock policies to choose from")
    parser.add_argument("--threads", type=int, default=64, help="of the client")
    parser.add_argument("--shape", default="DEFAULT", help="of batchllm.default_model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    from batchllm import default_model

    model = str(default_model.cached_model_path(getattr(default_model, args.shape)))
    results: list[compare.Result] = []
    texts = []
    if "plain" in args.parts:
        results += _plain(model, args)
        texts.append(_plain_table(results))
    if "batch" in args.parts:
        batch = _batch(model, args)
        results += batch
        texts.append(_batch_table(batch))
    compare.write(args.out, "The server, on a CPU", "\n\n".join(texts), results)


# Plain requests


def _plain(model: str, args: argparse.Namespace) -> list[compare.Result]:
    results = [_load("stock", model, policy, args) for policy in args.policies]
    best = min(results, key=lambda r: r["seconds"])["policy"]
    for round_ in range(args.rounds):
        results.append(_load("ours", model, "", args))
        if round_:
            results.append(_load("stock", model, best, args))
    outputs = [r.pop("output_ids") for r in results]
    for r, ids in zip(results, outputs, strict=True):
        pairs = [(a, b) for row, first in zip(ids, outputs[0], strict=True) for a, b in zip(row, first, strict=True)]
        r["num_differing_tokens"] = sum(a != b for a, b in pairs)
    return results


def _load(engine: str, model: str, policy: str, args: argparse.Namespace) -> compare.Result:
    flags = ["--schedule-policy", policy] if policy else []
    with server_process.running(engine, model, *_POOL, *flags) as url:
        _send(url, "unshared(99, 64, 32, 2)", args.threads)  # warm-up
        result = _send(url, args.plain, args.threads)
    print(engine, policy, result["seconds"], result["num_computed_prompt_tokens"], file=sys.stderr, flush=True)
    return result | {"part": "plain", "engine": engine, "policy": policy}


def _send(url: str, workload: str, num_threads: int) -> compare.Result:
    command = [sys.executable, str(_LOAD), url, workload, "--threads", str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: compare.Result = json.loads(done.stdout)
    return result


def _plain_table(results: list[compare.Result]) -> str:
    plain = [r for r in results if r["part"] == "plain"]
    stock = {p: [r for r in plain if r["policy"] == p] for p in dict.fromkeys(r["policy"] for r in plain) if p}
    best = min(stock, key=lambda policy: compare.median(stock[policy], "seconds"))
    named = [*((f"stock, {policy}", runs) for policy, runs in stock.items())]
    named.append(("ours", [r for r in plain if r["engine"] == "ours"]))
    rows = [
        [
            name,
            " ".join(f"{r['seconds']:.1f}" for r in runs),
            f"{1 - runs[0]['num_computed_prompt_tokens'] / runs[0]['num_prompt_tokens']:.3f}",
            max(r["num_differing_tokens"] for r in runs),
        ]
        for name, runs in named
    ]
    ratio = compare.median(stock[best], "seconds") / compare.median(named[-1][1], "seconds")
    first = plain[0]
    return (
        f"Plain requests: `{first['workload']}`, {first['num_requests']} from {first['num_threads']} threads.\n\n"
        + compare.table(["server", "seconds", "reuse", "tokens that differ from the first run's"], rows)
        + f"\n\nStock's best policy here is {best}; it takes {ratio:.2f} times as long as ours."
    )


# A batch


def _batch(model: str, args: argparse.Namespace) -> list[compare.Result]:
    workload: workloads.Workload = eval(args.batch, vars(workloads))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        with rows.open("w") as file:
            for i, (prompt, output_len) in enumerate(zip(workload.prompts, workload.output_lens, strict=True)):
                body = {"model": "m", "prompt": prompt, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
                row = {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(row) + "\n")
        for round_ in range(args.rounds):
            results.append(_run_command(model, rows, Path(folder, f"out-{round_}.jsonl")) | {"workload": args.batch})
            results.append(_run_batch(model, rows, Path(folder, f"api-{round_}.jsonl")) | {"workload": args.batch})
            for r in results[-2:]:
                print(r["part"], r["seconds"], r["num_computed_prompt_tokens"], file=sys.stderr, flush=True)
        first, second = (_answers(Path(folder, f"{name}-0.jsonl")) for name in ("out", "api"))
        for r in results:
            r["num_differing_rows"] = sum(first[row_id] != second[row_id] for row_id in first)
    return results


def _run_command(model: str, rows: Path, output: Path) -> compare.Result:
    report = output.with_suffix(".report.json")
    flags = ["-i", rows, "-o", output, "-m", model, "--report", report, "--dtype", "float32", *_POOL]
    command = [sys.executable, "-W", "ignore", "-m", "batchllm", "run", *map(str, flags)]
    subprocess.run(command, check=True, capture_output=True, env=_environment())
    told = json.loads(report.read_text())
    # What the command does for its rows beside starting the engine.
    seconds = told["read_s"] + told["tokenize_s"] + told["plan_s"] + told["run_s"]
    return {"part": "run", "seconds": seconds} | {
        name: told[name] for name in ("num_prompt_tokens", "num_computed_prompt_tokens", "num_optimal_prompt_tokens")
    }


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"OMP_NUM_THREADS": "1"}


def _run_batch(model: str, rows: Path, output: Path) -> compare.Result:
    with server_process.running("ours", model, *_POOL, "--enable-metrics") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        with rows.open("rb") as file:
            uploaded = client.files.create(file=file, purpose="batch")
        before = _computed(url)
        started = time.perf_counter()
        batch = client.batches.create(input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h")
        while batch.status in ("validating", "in_progress", "finalizing"):
            time.sleep(0.05)
            batch = client.batches.retrieve(batch.id)
        seconds = time.perf_counter() - started
        assert batch.status == "completed" and batch.output_file_id is not None, batch
        output.write_bytes(client.files.content(batch.output_file_id).content)
        return {
            "part": "batch API",
            "seconds": seconds,
            "num_prompt_tokens": batch.usage.input_tokens if batch.usage is not None else 0,
            "num_computed_prompt_tokens": _computed(url) - before,
        }


def _computed(url: str) -> int:
    """Prompt tokens of planned requests computed so far, as the scheduler counts them."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if line.startswith("batchllm_scheduler_prompt_tokens_total") and "computed" in line and "planned" in line:
                return int(float(line.rsplit(" ", 1)[1]))
    return 0


def _answers(path: Path) -> dict[str, str]:
    records = map(json.loads, path.read_text().splitlines())
    return {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in records}


def _batch_table(results: list[compare.Result]) -> str:
    run, api = ([r for r in results if r["part"] == part] for part in ("run", "batch API"))
    rows = [
        [name, " ".join(f"{r['seconds']:.1f}" for r in runs), runs[0]["num_computed_prompt_tokens"]]
        for name, runs in (("`batchllm run`", run), ("batch API", api))
    ]
    ratio = compare.median(api, "seconds") / compare.median(run, "seconds")
    return (
        f"A batch of `{run[0]['workload']}`, {run[0]['num_prompt_tokens']} prompt tokens, of which at least "
        f"{run[0]['num_optimal_prompt_tokens']} must be computed.\n\n"
        + compare.table(["", "seconds", "prompt tokens computed"], rows)
        + f"\n\nThe API takes {ratio:.2f} times as long; {api[0]['num_differing_rows']} rows were answered differently."
    )


if __name__ == "__main__":
    main()
