"""End to end on a CPU: ours against vLLM's CPU engine, with its prompts sorted and as they come, and stock SGLang.

The 28M model, a pool of 8,192 tokens, chunks of 2,048, greedy. Sorting the prompts is a
strong rival: vLLM shares blocks among requests of one step, and whole groups come one after the other. The three
alternate, and stock SGLang runs once. The output tokens of each are compared with those of vLLM, sorted. Makes
`.venv-vllm` with `eval/setup_vllm` if it is not there. Every process (one engine, all workloads) ends in writing the
files anew, so that a crash loses only its own. All five workloads with one data type and one number of threads take
half an hour.

    python eval/bench_vllm.py --out eval/results/vllm.md
    python eval/bench_vllm.py --rounds 1 --workloads shared skewed
    python eval/bench_vllm.py --dtype float32 bfloat16 --threads 1 2 --engines sorted ours
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import compare

from batchllm.default_model import SHAPE_28M, cached_model_path

_WORKLOADS = {
    "shared": "shuffled(groups(0))",
    "grouped": "groups(0)",
    "multilevel": "two_level(0, 3, 8, 6, 16, 48)",
    "unshared": "uneven(0)",
    "skewed": "skewed(0, 24, 8, 384, 2.08, 1.2)",
}
_SORTED, _GIVEN, _OURS, _STOCK = ("vllm", "sorted"), ("vllm", "given"), ("ours", "fcfs"), ("stock", "dfs-weight")
_ENGINES = {"sorted": _SORTED, "given": _GIVEN, "ours": _OURS, "stock": _STOCK}
_WORDS = {_SORTED: "vLLM, sorted", _GIVEN: "vLLM", _OURS: "ours", _STOCK: "stock SGLang, dfs-weight"}
_ROOT = Path(__file__).parent.parent
_VLLM_PYTHON = str(_ROOT / ".venv-vllm" / "bin" / "python")
Outputs = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of vLLM and ours in turn")
    parser.add_argument("--workloads", nargs="+", choices=_WORKLOADS, default=list(_WORKLOADS))
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes[:1], help="of weights and KV")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="that compute, of each engine")
    parser.add_argument("--engines", nargs="+", choices=_ENGINES, default=list(_ENGINES))
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.engines[0] != "sorted":
        parser.error("--engines: sorted must be the first, the others' output tokens are compared with its")
    subprocess.run([str(_ROOT / "eval" / "setup_vllm")], check=True)
    results: list[compare.Result] = []
    for round_ in range(args.rounds):
        names = [name for name in args.engines if name != "stock" or round_ == args.rounds - 1]
        for dtype, threads in itertools.product(args.dtype, args.threads):
            references: dict[str, Outputs] = {}
            for name in names:
                results += _run(_ENGINES[name], args.workloads, dtype, threads, round_, references)
                text = "\n\n".join(_cell(results, args.workloads, *cell) for cell in _cells(results))
                compare.write(args.out, "vLLM, end to end on a CPU", f"{text}\n\n{_footer(results)}", results)


def _run(
    engine: tuple[str, str], names: list[str], dtype: str, threads: int, round_: int, references: dict[str, Outputs]
) -> list[compare.Result]:
    """Results of one process, each with how many output tokens differ from the reference: vLLM's of this round."""
    name, policy = engine
    expressions = [_WORKLOADS[name] for name in names]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outputs.jsonl")
        flags = ["--model", cached_model_path(SHAPE_28M), "--threads", str(threads)]
        flags += ["--server-args", json.dumps({"dtype": dtype})]
        flags += ["--pool", "8192", "--chunk", "2048", "--policy", policy, "--outputs", str(path)]
        python = _VLLM_PYTHON if name == "vllm" else sys.executable
        results = compare.measure(name, expressions, *flags, python=python)
        all_outputs: list[Outputs] = [json.loads(line) for line in path.read_text().splitlines()]
    for result, outputs in zip(results, all_outputs, strict=True):
        if engine == _SORTED:
            references[result["workload"]] = outputs
        result |= {"round": round_, "dtype": dtype, "threads": threads}
        result["num_different_tokens"] = _num_different_tokens(outputs, references[result["workload"]])
        print(_WORDS[engine], dtype, threads, result["workload"], result["seconds"], file=sys.stderr, flush=True)
    if len(results) < len(expressions):
        raise RuntimeError(f"{_WORDS[engine]} ended after {len(results)} of {len(expressions)} workloads")
    return results


def _num_different_tokens(outputs: Outputs, others: Outputs) -> int:
    pairs = list(zip(outputs, others, strict=True))
    return sum(a != b for one, other in pairs for a, b in zip(one, other, strict=True))


def _cells(results: list[compare.Result]) -> list[tuple[str, int]]:
    """Data types and numbers of threads, as they were measured."""
    return list(dict.fromkeys((result["dtype"], result["threads"]) for result in results))


def _cell(results: list[compare.Result], names: list[str], dtype: str, threads: int) -> str:
    """The tables of what has been measured so far with a data type and a number of threads."""
    rows, reuse_rows = [], []
    of_cell = [result for result in results if (result["dtype"], result["threads"]) == (dtype, threads)]
    engines = {engine: words for engine, words in _WORDS.items() if any(_is_of(r, engine) for r in of_cell)}
    for name in names:
        runs = {engine: _runs(of_cell, engine, _WORKLOADS[name]) for engine in _WORDS}
        seconds = [f"{compare.median(runs[engine], 'seconds'):.1f}" for engine in engines]
        rows.append([name, *seconds, _ratio(runs[_OURS], runs[_SORTED]), _ratio(runs[_OURS], runs[_GIVEN])])
        shares = [_reuse(runs[engine]) for engine in engines]
        reuse_rows.append([name, _optimum(runs[_OURS]), *shares, _differences(runs[_OURS])])
    header = ["workload", *(f"{words} s" for words in engines.values()), "ours : vLLM, sorted", "ours : vLLM"]
    text = f"## {dtype}, threads: {threads}\n\n{compare.table(header, rows)}"
    header = ["workload", "best reuse", *engines.values(), "tokens that differ, ours and vLLM, sorted"]
    return f"{text}\n\nShare of the prompt tokens that were not computed:\n\n{compare.table(header, reuse_rows)}"


def _footer(results: list[compare.Result]) -> str:
    versions = sorted({f"{r['engine']} {r['version']}" for r in results})
    stock = "; stock once" if any(_is_of(r, _STOCK) for r in results) else ""
    return (
        "Median seconds; ratios of seconds are medians of the rounds' own, and below 1 ours is faster."
        f"\nRounds: {max(r['round'] for r in results) + 1}{stock}. Versions: {', '.join(versions)}."
    )


def _runs(results: list[compare.Result], engine: tuple[str, str], expression: str) -> list[compare.Result]:
    return [r for r in results if _is_of(r, engine) and r["workload"] == expression]


def _is_of(result: compare.Result, engine: tuple[str, str]) -> bool:
    return (result["engine"], result["policy"]) == engine


def _ratio(ours: list[compare.Result], others: list[compare.Result]) -> str:
    """Median over the rounds both have."""
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, others, strict=False)]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def _optimum(ours: list[compare.Result]) -> str:
    """With every shared prefix computed once."""
    return f"{1 - ours[0]['num_optimal_prompt_tokens'] / ours[0]['num_prompt_tokens']:.3f}" if ours else "-"


def _reuse(runs: list[compare.Result]) -> str:
    if not runs:
        return "-"
    return f"{statistics.median(1 - r['num_computed_prompt_tokens'] / r['num_prompt_tokens'] for r in runs):.3f}"


def _differences(ours: list[compare.Result]) -> str:
    """Of all rounds."""
    return f"{sum(r['num_different_tokens'] for r in ours)} of {sum(r['num_output_tokens'] for r in ours)}"


if __name__ == "__main__":
    main()
