"""Prompt tokens computed, ours and stock SGLang side by side, from a pool that holds everything down to two requests.

The bound: ours computes exactly the optimum for every workload and every pool. Each engine counts in the run what it
computes.

    python eval/bench_reuse.py --out eval/results/reuse.md
"""

from __future__ import annotations

import argparse

import compare
import workloads

_WORKLOADS = ["one_level(0)", "two_level(0)", "irregular(0)", "irregular(1)"]
_POOLS = (200_000, 8192)
_STOCK_POLICIES = ["fcfs", "lpm", "dfs-weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--workloads", nargs="*", default=_WORKLOADS)
    args = parser.parse_args()
    expressions: list[str] = args.workloads
    made = {e: eval(e, vars(workloads)) for e in expressions}
    results: list[compare.Result] = []
    for pool in _POOLS:
        results += compare.measure("ours", expressions, "--pool", str(pool))
    for expression, workload in made.items():
        results += compare.measure("ours", [expression], "--pool", str(2 * workload.longest_len))
    for policy in _STOCK_POLICIES:
        results += compare.measure("stock", expressions, "--pool", "8192", "--policy", policy)
    rows = []
    for expression, workload in made.items():
        of_it = [r for r in results if r["workload"] == expression]
        for ours in (r for r in of_it if r["engine"] == "ours"):
            row = [workload.name, f"{ours['num_prompt_tokens']:,}", f"{ours['pool']:,}"]
            row += [f"{ours['num_optimal_prompt_tokens']:,}", _cell(ours)]
            stock = {r["policy"]: _cell(r) for r in of_it if r["engine"] == "stock" and r["pool"] == ours["pool"]}
            rows.append(row + [stock.get(policy, "") for policy in _STOCK_POLICIES])
    header = [
        "workload",
        "prompt tokens",
        "pool",
        "optimum",
        "ours",
        *[f"stock {p}" for p in _STOCK_POLICIES],
    ]
    text = "Prompt tokens computed, and in brackets the share reused.\n\n" + compare.table(header, rows)
    missed = [r for r in results if r["engine"] == "ours" and not _is_optimal(r)]
    text += f"\n\nOurs is at the optimum in {len(rows) - len(missed)} of {len(rows)} runs."
    compare.write(args.out, "Reuse against the optimum", text, results)


def _is_optimal(result: compare.Result) -> bool:
    return bool(result["num_computed_prompt_tokens"] == result["num_optimal_prompt_tokens"])


def _cell(result: compare.Result) -> str:
    computed = result["num_computed_prompt_tokens"]
    return f"{computed:,} ({1 - computed / result['num_prompt_tokens']:.3f})"


if __name__ == "__main__":
    main()
