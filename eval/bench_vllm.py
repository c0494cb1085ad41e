"""End to end on a CPU: ours against vLLM's CPU engine, with its prompts sorted and as they come, and stock SGLang.

The 28M model, a pool of 8,192 tokens, chunks of 2,048, greedy. Sorting the prompts is a
strong rival: vLLM shares blocks among requests of one step, and whole groups come one after the other. The three
alternate, and stock SGLang runs once. The output tokens of each are compared with those of vLLM, sorted. Makes
`.venv-vllm` with `eval/setup_vllm` if it is not there. Every process (one engine, all workloads) ends in writing the
files anew, so that a crash loses only its own. Takes half an hour.

    python eval/bench_vllm.py --out eval/results/vllm.md
    python eval/bench_vllm.py --rounds 1 --workloads shared skewed
    python eval/bench_vllm.py --dtype bfloat16 --threads 2 --engines sorted ours
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and KV")
    parser.add_argument("--threads", type=int, default=1, help="that compute, of each engine")
    parser.add_argument("--engines", nargs="+", choices=_ENGINES, default=list(_ENGINES))
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.engines[0] != "sorted":
        parser.error("--engines: sorted must be the first, the others' output tokens are compared with its")
    subprocess.run([str(_ROOT / "eval" / "setup_vllm")], check=True)
    expressions = [_WORKLOADS[name] for name in args.workloads]
    model = cached_model_path(SHAPE_28M)
    results: list[compare.Result] = []
    references: dict[str, Outputs] = {}
    for round_ in range(args.rounds):
        is_last = round_ == args.rounds - 1
        for engine in (_ENGINES[name] for name in args.engines):
            if engine == _STOCK and not is_last:
                continue
            flags = ["--model", model, "--threads", str(args.threads)]
            flags += ["--server-args", json.dumps({"dtype": args.dtype})]
            done = _run(engine, expressions, flags, round_, references)
            results += done
            text = f"{args.dtype}, {args.threads} compute threads.\n\n{_text(results, args.workloads)}"
            compare.write(args.out, "vLLM, end to end on a CPU", text, results)
            if len(done) < len(expressions):
                raise RuntimeError(f"{_WORDS[engine]} ended after {len(done)} of {len(expressions)} workloads")


def _run(
    engine: tuple[str, str], expressions: list[str], flags: list[str], round_: int, references: dict[str, Outputs]
) -> list[compare.Result]:
    """Results of one process, each with how many output tokens differ from the reference: vLLM's of this round."""
    name, policy = engine
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outputs.jsonl")
        flags = [*flags, "--pool", "8192", "--chunk", "2048", "--policy", policy, "--outputs", str(path)]
        python = _VLLM_PYTHON if name == "vllm" else sys.executable
        results = compare.measure(name, expressions, *flags, python=python)
        all_outputs: list[Outputs] = [json.loads(line) for line in path.read_text().splitlines()]
    for result, outputs in zip(results, all_outputs, strict=True):
        if engine == _SORTED:
            references[result["workload"]] = outputs
        result["round"] = round_
        result["num_different_tokens"] = _num_different_tokens(outputs, references[result["workload"]])
        print(_WORDS[engine], result["workload"], result["seconds"], file=sys.stderr, flush=True)
    return results


def _num_different_tokens(outputs: Outputs, others: Outputs) -> int:
    pairs = list(zip(outputs, others, strict=True))
    return sum(a != b for one, other in pairs for a, b in zip(one, other, strict=True))


def _text(results: list[compare.Result], names: list[str]) -> str:
    """The tables of what has been measured so far."""
    rows, reuse_rows = [], []
    for name in names:
        runs = {engine: _runs(results, engine, _WORKLOADS[name]) for engine in _WORDS}
        seconds = [f"{compare.median(r, 'seconds'):.1f}" if r else "-" for r in runs.values()]
        rows.append([name, *seconds, _ratio(runs[_OURS], runs[_SORTED]), _ratio(runs[_OURS], runs[_GIVEN])])
        reuse_rows.append([name, _optimum(runs[_OURS]), *map(_reuse, runs.values()), _differences(runs[_OURS])])
    header = ["workload", *(f"{words} s" for words in _WORDS.values()), "ours : vLLM, sorted", "ours : vLLM"]
    text = compare.table(header, rows)
    header = ["workload", "best reuse", *_WORDS.values(), "tokens that differ, ours and vLLM, sorted"]
    text += "\n\nShare of the prompt tokens that were not computed:\n\n" + compare.table(header, reuse_rows)
    versions = sorted({f"{r['engine']} {r['version']}" for r in results})
    return (
        f"{text}\n\nMedian seconds; ratios of seconds are medians of the rounds' own, and below 1 ours is faster."
        f"\nRounds: {max(r['round'] for r in results) + 1}; stock once. Versions: {', '.join(versions)}."
    )


def _runs(results: list[compare.Result], engine: tuple[str, str], expression: str) -> list[compare.Result]:
    return [r for r in results if (r["engine"], r["policy"]) == engine and r["workload"] == expression]


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
