"""End to end on a CPU: ours against the best of stock SGLang's schedule policies, on shuffled and on sorted input.

The 28M model, a pool of 8,192 tokens, one compute thread, float32, the paper's grid with lengths scaled by 1/8,
log-normal outputs, and a workload that shares nothing. Every stock policy runs on two of them, shuffled and sorted; the
two best run on all, and then ours and the best one of each workload alternate. "With patches" is the series of
`patches/` applied to SGLang, for both. Takes half an hour.

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
    "250/25 x 16": "grid(0, 250, 25, 16, 384)",
    "250/25 x 4": "grid(0, 250, 25, 4, 144)",
    "250/125 x 16": "grid(0, 250, 125, 16, 112)",
    "125/125 x 16": "grid(0, 125, 125, 16, 112)",
    "125/125 x 4": "grid(0, 125, 125, 4, 72)",
    "skewed outputs": "skewed(0, 24, 8)",
    "nothing shared": "unshared(0, 80, 128, 16)",
}
_UNSHARED = "nothing shared"
_SWEPT = ("250/25 x 16", "skewed outputs")
_POLICIES = ("fcfs", "lpm", "dfs-weight", "lof")
_APPLY_PATCHES = Path(__file__).parent.parent / "scripts" / "apply_patches"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of ours and the best stock policy in turn")
    parser.add_argument("--out")
    args = parser.parse_args()
    sweep: list[compare.Result] = []
    for policy in _POLICIES:
        sweep += _run("stock", [w for name in _SWEPT for w in _both_orders(name)], policy)
    candidates = _two_best(sweep)
    results = _run("ours", list(_WORKLOADS.values()), "")
    for policy, is_sorted in candidates:
        results += _run("stock", [_both_orders(name)[is_sorted] for name in _WORKLOADS], policy)
    best = {name: _best_stock(results, name) for name in _WORKLOADS}
    by_policy: dict[str, list[str]] = defaultdict(list)
    for workload, policy in best.values():
        by_policy[policy].append(workload)
    for is_patched in [False] * (args.rounds - 1) + [True]:
        if is_patched:
            _patch("apply")
        try:
            for policy, workloads in by_policy.items():
                results += _run("stock", workloads, policy, is_patched)
            results += _run("ours", list(_WORKLOADS.values()), "", is_patched)
        finally:
            if is_patched:
                _patch("revert")
    text = _table(results, best)
    text += "\n\n" + _sweep_table(sweep)
    compare.write(args.out, "Scheduling, end to end on a CPU", text, results + sweep)


def _patch(what: str) -> None:
    subprocess.run([sys.executable, str(_APPLY_PATCHES), what], check=True)


def _run(engine: str, workloads: list[str], policy: str, is_patched: bool = False) -> list[compare.Result]:
    flags = ["--model", "SHAPE_28M", "--threads", "1", *(["--policy", policy] if policy else [])]
    results = [r | {"is_patched": is_patched} for r in compare.measure(engine, workloads, *flags)]
    for r in results:
        print(engine, policy, "patched" if is_patched else "", r["workload"], r["seconds"], file=sys.stderr, flush=True)
    return results


def _both_orders(name: str) -> tuple[str, str]:
    """Expressions of a workload: shuffled, and sorted."""
    return _WORKLOADS[name], f"in_order({_WORKLOADS[name]})"


def _two_best(sweep: list[compare.Result]) -> list[tuple[str, bool]]:
    """The two policies, each with shuffled or sorted input, that need least time for the workloads swept."""
    seconds: dict[tuple[str, bool], float] = defaultdict(float)
    for r in sweep:
        seconds[r["policy"], r["workload"].startswith("in_order")] += r["seconds"]
    return sorted(seconds, key=lambda key: seconds[key])[:2]


def _best_stock(results: list[compare.Result], name: str) -> tuple[str, str]:
    """Workload as it was given, and policy, of stock's fastest run."""
    of_workload = [r for r in results if r["engine"] == "stock" and r["workload"] in _both_orders(name)]
    fastest = min(of_workload, key=lambda r: r["seconds"])
    return fastest["workload"], fastest["policy"]


def _table(results: list[compare.Result], best: dict[str, tuple[str, str]]) -> str:
    rows, ratios = [], defaultdict(list)
    for name, expression in _WORKLOADS.items():
        stock_workload, policy = best[name]
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
    return compare.table(header, rows) + "\n\n" + "\n".join(lines)


def _sweep_table(sweep: list[compare.Result]) -> str:
    """Seconds of every stock policy on the workloads swept."""
    rows = [
        [name, policy, *(f"{r['seconds']:.1f}" for w in _both_orders(name) for r in sweep if _is(r, w, policy))]
        for name in _SWEPT
        for policy in _POLICIES
    ]
    return compare.table(["workload", "stock policy", "shuffled s", "sorted s"], rows)


def _is(result: compare.Result, workload: str, policy: str) -> bool:
    return bool(result["workload"] == workload and result["policy"] == policy)


if __name__ == "__main__":
    main()
