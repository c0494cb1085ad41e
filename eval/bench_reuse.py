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
_STOCK_POLICIES = ["fcfs", "lpm", "dfs-weight"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--workloads", nargs="*", default=_WORKLOADS)
    args = parser.parse_args()
    results, rows = [], []
    for expression in args.workloads:
        workload = eval(expression, vars(workloads))
        twice = 2 * workload.longest_len
        for pool in (200_000, 8192, twice):
            (ours,) = compare.measure("ours", expression, "--pool", str(pool), "--chunk", "2048")
            results.append(ours)
            row = [
                workload.name,
                f"{ours['num_prompt_tokens']:,}",
                f"{pool:,}",
                f"{ours['num_optimal_prompt_tokens']:,}",
            ]
            row.append(_cell(ours))
            for policy in _STOCK_POLICIES if pool == 8192 else []:
                (stock,) = compare.measure("stock", expression, "--pool", str(pool), "--policy", policy)
                results.append(stock)
                row.append(_cell(stock))
            rows.append(row + [""] * (5 + len(_STOCK_POLICIES) - len(row)))
            print(rows[-1], flush=True)
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
