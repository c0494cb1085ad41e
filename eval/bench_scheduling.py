"""End to end on a CPU: ours against every schedule policy of stock SGLang, shuffled and sorted.

The 28M model, a pool of 8,192 tokens, one compute thread, float32, the paper's grid with lengths scaled by 1/8,
log-normal outputs, and a workload that shares nothing. Every stock policy runs once on every workload, shuffled and
sorted; then ours and the best stock policy of each workload alternate. "With patches" is the series of `patches/`
applied to SGLang, for both. Takes half an hour.

    python eval/bench_scheduling.py --out eval/results/scheduling.md
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import compare

_WORKLOADS = {
    "250/25 x 16": "grid(0, 250, 25, 16, 192)",
    "250/25 x 4": "grid(0, 250, 25, 4, 112)",
    "250/125 x 16": "grid(0, 250, 125, 16, 80)",
    "125/125 x 16": "grid(0, 125, 125, 16, 80)",
    "125/125 x 4": "grid(0, 125, 125, 4, 64)",
    "skewed outputs": "skewed(0, 20, 8)",
    "nothing shared": "unshared(0, 80, 128, 16)",
}
_UNSHARED = "nothing shared"
_POLICIES = ("fcfs", "lpm", "dfs-weight", "lof")
_APPLY_PATCHES = Path(__file__).parent.parent / "scripts" / "apply_patches"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of ours and the best stock policy in turn")
    parser.add_argument("--out")
    args = parser.parse_args()
    results: list[compare.Result] = []
    for policy in _POLICIES:
        both_orders = [w for e in _WORKLOADS.values() for w in (e, f"in_order({e})")]
        results += _run("stock", both_orders, policy)
    best = {name: _best_stock(results, expression) for name, expression in _WORKLOADS.items()}
    by_policy: dict[str, list[str]] = defaultdict(list)
    for workload, policy, _ in best.values():
        by_policy[policy].append(workload)
    for is_patched in (False, True):
        if is_patched:
            _patch("apply")
        try:
            for _ in range(args.rounds):
                results += _run("ours", list(_WORKLOADS.values()), "", is_patched)
                for policy, workloads in by_policy.items():
                    results += _run("stock", workloads, policy, is_patched)
        finally:
            if is_patched:
                _patch("revert")
    text = _table(results, best)
    compare.write(args.out, "Scheduling, end to end on a CPU", text, results)


def _patch(what: str) -> None:
    subprocess.run([sys.executable, str(_APPLY_PATCHES), what], check=True)


def _run(engine: str, workloads: list[str], policy: str, is_patched: bool = False) -> list[compare.Result]:
    flags = ["--model", "SHAPE_28M", "--threads", "1", *(["--policy", policy] if policy else [])]
    return [r | {"is_patched": is_patched} for r in compare.measure(engine, workloads, *flags)]


def _best_stock(results: list[compare.Result], expression: str) -> tuple[str, str, float]:
    """Workload as it was given, policy and seconds of stock's fastest run."""
    of_workload = [r for r in results if r["workload"] in (expression, f"in_order({expression})")]
    fastest = min(of_workload, key=lambda r: r["seconds"])
    return fastest["workload"], fastest["policy"], fastest["seconds"]


def _table(results: list[compare.Result], best: dict[str, tuple[str, str, float]]) -> str:
    rows, ratios = [], defaultdict(list)
    for name, expression in _WORKLOADS.items():
        stock_workload, policy, _ = best[name]
        row = [name, f"{policy}{', sorted' if stock_workload != expression else ''}"]
        for is_patched in (False, True):
            ours = [r for r in results if r["engine"] == "ours" and r["workload"] == expression]
            ours = [r for r in ours if r["is_patched"] == is_patched]
            stock = [
                r
                for r in results
                if (r["engine"], r["workload"], r["policy"]) == ("stock", stock_workload, policy)
                and r["is_patched"] == is_patched
            ]
            ours_s = statistics.median(r["seconds"] for r in ours)
            stock_s = statistics.median(r["seconds"] for r in stock)
            ratios[is_patched, name == _UNSHARED].append(stock_s / ours_s)
            row += [f"{stock_s:.1f}", f"{ours_s:.1f}", f"{stock_s / ours_s:.2f}"]
            if not is_patched:
                ratios["series", name == _UNSHARED].append(0.0)
                reuse = [1 - r["num_computed_prompt_tokens"] / r["num_prompt_tokens"] for r in (stock[0], ours[0])]
                row += [f"{reuse[0]:.3f} / {reuse[1]:.3f}"]
                unpatched_stock_s = stock_s
            else:
                ratios["series", name == _UNSHARED][-1] = unpatched_stock_s / ours_s
                row += [f"{unpatched_stock_s / ours_s:.2f}"]
        rows.append(row)
    header = ["workload", "best stock policy", "stock s", "ours s", "ratio", "reuse stock / ours"]
    header += ["with patches: stock s", "ours s", "ratio", "ours with patches : stock without"]
    lines = []
    for key, words in ((False, "without patches"), (True, "both with patches"), ("series", "ours with, stock without")):
        shared = math.exp(statistics.mean(map(math.log, ratios[key, False])))
        lines.append(
            f"Geometric mean over what shares, {words}: {shared:.2f}; nothing shared {ratios[key, True][0]:.2f}."
        )
    policies = [
        [expression, policy, *(f"{s:.1f}" for s in _seconds(results, expression, policy))]
        for expression in _WORKLOADS.values()
        for policy in _POLICIES
    ]
    every = compare.table(["workload", "stock policy", "shuffled s", "sorted s"], policies)
    return compare.table(header, rows) + "\n\n" + "\n".join(lines) + "\n\n" + every


def _seconds(results: list[compare.Result], expression: str, policy: str) -> list[float]:
    """Stock's first run of a policy, shuffled and sorted."""
    return [
        next(
            r["seconds"]
            for r in results
            if (r["engine"], r["workload"], r["policy"]) == ("stock", w, policy) and not r["is_patched"]
        )
        for w in (expression, f"in_order({expression})")
    ]


if __name__ == "__main__":
    main()
