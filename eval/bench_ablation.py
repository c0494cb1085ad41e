"""Each part of the scheduler switched off alone: group order, admission, mixing (simulated), bulk messages (measured).

Simulated: A100-80GB, Llama-3.1-8B, chunks of 2048, KV of a prefix read by each row. Two workloads: "two kinds", groups
that decode much beside groups that prefill much, and "log-normal", 2000/200 x 16 whose outputs (median 100, sigma 1, at
most 4096) are not known. Measured: 20,000 requests of 16 prompt tokens and 1 new one on a one-layer model, a message a
request.

    python eval/bench_ablation.py --out eval/results/ablation.md
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import compare
import numpy as np

from batchllm.perf_model import CostModel, get_device, get_model
from batchllm.planner import GROUP_ORDERS
from batchllm.sim import SimWorkload, parse_workload, simulate
from batchllm.tokens import TokenTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--launches", type=int, default=2, help="of each side of what is measured")
    parser.add_argument("--skip-measured", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    cost_model = CostModel.with_defaults(get_device("A100-80GB"), get_model("Llama-3.1-8B"))
    two_kinds = _merged(
        parse_workload("shared:prefix=3000,private=600,sharing=4,requests=2400,output=20"),
        parse_workload("shared:prefix=300,private=40,sharing=16,requests=4800,output=400"),
    )
    log_normal = parse_workload("lognormal:prefix=2000,private=200,sharing=16,requests=6400,output=100,max_new=4096")
    bounded = dataclasses.replace(log_normal, known_len=log_normal.max_new_len)
    known = dataclasses.replace(log_normal, known_len=log_normal.output_len)
    results: list[compare.Result] = []

    def row(name: str, workload: SimWorkload, **options: Any) -> list[Any]:
        result = simulate(workload, cost_model=cost_model, **options)
        found = result.to_dict()
        results.append({"name": name, "workload": workload.name} | found)
        return [
            name,
            workload.name,
            f"{result.requests_per_s:.2f}",
            f"{result.trace.saturated_occupancy:.3f}",
            f"{result.trace.mean_decode_rows:.0f}",
            f"{result.num_retractions} ({result.retraction_share:.2%})",
            f"{result.saving:.3f}",
        ]

    rows = [
        row("nothing", two_kinds),
        row("order as the tree comes", two_kinds, group_order="lexicographic"),
        row("mixing off", two_kinds, is_mixed=False),
        row("lengths learned", log_normal),
        row("lengths learned, mixing off", log_normal, is_mixed=False),
        row("admission by the limit (bounded)", bounded),
        row("lengths known", known),
        row("at most 256 running", log_normal, max_running=256),
    ]
    orders = _orders(two_kinds, known, results)
    header = ["switched", "workload", "requests/s", "occupancy while work waits", "decode rows a step", "retracted"]
    text = compare.table([*header, "saving"], rows) + "\n\n" + orders
    if not args.skip_measured:
        text += "\n\n" + _bulk_messages(results, args.launches)
    compare.write(args.out, "Ablation", text, results)


def _orders(two_kinds: SimWorkload, known: SimWorkload, results: list[compare.Result]) -> str:
    """Requests/s of every group order on two devices, steps mixed or not, shared KV read once a step."""
    workloads = {
        "two kinds": two_kinds,
        "log-normal, known": known,
        "snippet": parse_workload("snippet:requests=3000,output=100"),
    }
    rows = []
    for device, chunk_tokens in (("A100-80GB", 2048), ("H200", 8192)):
        cost_model = CostModel.with_defaults(get_device(device), get_model("Llama-3.1-8B"))
        for name, workload in workloads.items():
            for is_mixed in (True, False):
                rates = []
                for order in GROUP_ORDERS:
                    result = simulate(
                        workload,
                        cost_model=cost_model,
                        group_order=order,
                        is_mixed=is_mixed,
                        chunk_tokens=chunk_tokens,
                        shares_reads=True,
                    )
                    rates.append(result.requests_per_s)
                    results.append({"name": f"order {order}", "workload": name, "device": device} | result.to_dict())
                best = max(rates)
                cells = [f"**{rate:.2f}**" if rate == best else f"{rate:.2f}" for rate in rates]
                rows.append([device, name, "mixed" if is_mixed else "not mixed", *cells])
    return compare.table(["device", "workload", "steps", *(f"order {order}" for order in GROUP_ORDERS)], rows)


def _merged(a: SimWorkload, b: SimWorkload) -> SimWorkload:
    """Both, shuffled; their prompts share nothing with each other's."""
    order = np.random.default_rng(0).permutation(a.num_requests + b.num_requests)
    rows = [a.table.row(i) for i in range(a.num_requests)]
    rows += [b.table.row(i) + 1_000_000 for i in range(b.num_requests)]
    columns = {
        name: np.concatenate([getattr(a, name), getattr(b, name)])[order]
        for name in ("output_len", "max_new_len", "known_len", "task")
    }
    table = TokenTable.from_lists([rows[i] for i in order])
    return SimWorkload(name="two kinds", table=table, **columns)


def _bulk_messages(results: list[compare.Result], launches: int) -> str:
    """One message for each request against messages of thousands."""
    flags = ["--model", "WIDTH_64", "--pool", "65536", "--repetitions", "2"]
    rates: dict[str, list[float]] = {}
    for _ in range(launches):
        for name, run_flags in (("bulk messages", []), ("a message a request", ["--max-run-requests", "1"])):
            found = compare.measure("ours", ["unshared(1, 20000, 16, 1)"], *flags, *run_flags)
            rates.setdefault(name, []).extend(r["requests_per_s"] for r in found)
            results += [r | {"name": name} for r in found]
    rows = [
        [name, f"{np.median(values):,.0f}", ", ".join(f"{v:,.0f}" for v in values)] for name, values in rates.items()
    ]
    return compare.table(["measured", "requests/s, median", "every repetition"], rows)


if __name__ == "__main__":
    main()
