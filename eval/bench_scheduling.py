"""End to end on a CPU: ours against the best of stock SGLang's schedule policies, on shuffled and on sorted input.

The 28M model, a pool of 8,192 tokens, one compute thread, float32, the paper's grid with lengths scaled by 1/8,
log-normal outputs, and a workload that shares nothing. Every stock policy runs on two of them, shuffled and sorted; the
two best run on all, and then ours and the best one of each workload alternate. Ours runs twice: as it is, and on
SGLang's own attention and operators (`--attention-backend torch_native`), which shows what scheduling alone wins. Takes
35 minutes, with the two candidates named 15.

    python eval/bench_scheduling.py --out eval/results/scheduling.md
    python eval/bench_scheduling.py --candidates dfs-weight lof --out eval/results/scheduling.md
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict

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
_STOCK_ATTENTION = '{"attention_backend": "torch_native"}'
_OURS, _OURS_ON_STOCK, _STOCK = "ours", "ours on SGLang's attention", "stock"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of ours and the best stock policy in turn")
    parser.add_argument("--candidates", nargs="+", choices=_POLICIES, help="stock policies, shuffled: sweep no others")
    parser.add_argument("--out")
    args = parser.parse_args()
    sweep: list[compare.Result] = []
    if args.candidates:
        candidates = [(policy, False) for policy in args.candidates]
    else:
        for policy in _POLICIES:
            sweep += _run(_STOCK, [w for name in _SWEPT for w in _both_orders(name)], policy)
        candidates = _two_best(sweep)
    results: list[compare.Result] = []
    for policy, is_sorted in candidates:
        results += _run(_STOCK, [_both_orders(name)[is_sorted] for name in _WORKLOADS], policy)
    best = {name: _best_stock(results, name) for name in _WORKLOADS}
    by_policy: dict[str, list[str]] = defaultdict(list)
    for workload, policy in best.values():
        by_policy[policy].append(workload)
    for round_ in range(args.rounds):
        if round_:
            for policy, workloads in by_policy.items():
                results += _run(_STOCK, workloads, policy)
        for name in (_OURS, _OURS_ON_STOCK):
            results += _run(name, list(_WORKLOADS.values()), "")
        text = _table(results, best)
        if sweep:
            text += "\n\n" + _sweep_table(sweep)
        compare.write(args.out, "Scheduling, end to end on a CPU", text, results + sweep)


def _run(name: str, workloads: list[str], policy: str) -> list[compare.Result]:
    flags = ["--model", "SHAPE_28M", "--threads", "1", *(["--policy", policy] if policy else [])]
    if name == _OURS_ON_STOCK:
        flags += ["--server-args", _STOCK_ATTENTION]
    engine = "stock" if name == _STOCK else "ours"
    results = [r | {"name": name} for r in compare.measure(engine, workloads, *flags)]
    for r in results:
        print(name, policy, r["workload"], r["seconds"], file=sys.stderr, flush=True)
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
    of_workload = [r for r in results if r["name"] == _STOCK and r["workload"] in _both_orders(name)]
    fastest = min(of_workload, key=lambda r: r["seconds"])
    return fastest["workload"], fastest["policy"]


def _table(results: list[compare.Result], best: dict[str, tuple[str, str]]) -> str:
    rows, ratios = [], defaultdict(list)
    for name, expression in _WORKLOADS.items():
        stock_workload, policy = best[name]
        stock = [r for r in results if (r["name"], r["workload"], r["policy"]) == (_STOCK, stock_workload, policy)]
        stock_s = compare.median(stock, "seconds")
        row = [name, f"{policy}{', sorted' if stock_workload != expression else ''}", f"{stock_s:.1f}"]
        reuse = [_reuse(stock[0])]
        for ours_name in (_OURS, _OURS_ON_STOCK):
            ours = [r for r in results if (r["name"], r["workload"]) == (ours_name, expression)]
            ours_s = compare.median(ours, "seconds")
            ratios[ours_name, name == _UNSHARED].append(stock_s / ours_s)
            row += [f"{ours_s:.1f}", f"{stock_s / ours_s:.2f}"]
            reuse.append(_reuse(ours[0]))
        rows.append([*row, " / ".join(f"{share:.3f}" for share in reuse[:2])])
    header = ["workload", "best stock policy", "stock s", "ours s", "ratio", f"{_OURS_ON_STOCK} s", "ratio"]
    lines = []
    for ours_name in (_OURS, _OURS_ON_STOCK):
        shared = math.exp(statistics.mean(map(math.log, ratios[ours_name, False])))
        nothing = ratios[ours_name, True][0]
        lines.append(f"Geometric mean over what shares, {ours_name}: {shared:.2f}; nothing shared {nothing:.2f}.")
    return compare.table([*header, "reuse stock / ours"], rows) + "\n\n" + "\n".join(lines)


def _reuse(result: compare.Result) -> float:
    return float(1 - result["num_computed_prompt_tokens"] / result["num_prompt_tokens"])


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
