"""Requests per second where compute is negligible: 20,000 requests of 16 prompt tokens and 1 new token.

A one-layer model of width 64. Launches of the two engines alternate; the bound is twice stock's ``Engine.generate``.

    python eval/bench_overhead.py --out eval/results/overhead.md
"""

from __future__ import annotations

import argparse

import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=20_000)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--pool", type=int, default=65_536)
    parser.add_argument("--out")
    args = parser.parse_args()
    flags = ["--model", "WIDTH_64", "--pool", str(args.pool), "--repetitions", "2"]
    workload = f"unshared(1, {args.num_requests}, 16, 1)"
    results: dict[str, list[compare.Result]] = {"stock": [], "ours": []}
    for _ in range(args.launches):
        for engine, found in results.items():
            found += compare.measure(engine, [workload], *flags)
    rates = {engine: compare.median(found, "requests_per_s") for engine, found in results.items()}
    ratios = [
        ours["requests_per_s"] / stock["requests_per_s"]
        for ours, stock in zip(results["ours"], results["stock"], strict=True)
    ]
    rows = [
        [engine, f"{rates[engine]:,.0f}", ", ".join(f"{r['requests_per_s']:,.0f}" for r in found)]
        for engine, found in results.items()
    ]
    text = compare.table(["engine", "requests/s, median", "every repetition"], rows)
    text += f"\n\nOurs / stock: medians {rates['ours'] / rates['stock']:.2f}, "
    text += f"pair by pair {min(ratios):.2f} to {max(ratios):.2f}."
    compare.write(args.out, "Overhead per request", text, results["stock"] + results["ours"])


if __name__ == "__main__":
    main()
