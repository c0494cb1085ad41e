"""What the simulator says of the bench's workloads, written down before any of them has run on a GPU.

    python -m eval.gpu_bench.predict --out eval/results/gpu_prediction.md

Efficiencies are the cost model's assumptions (`batchllm.perf_model`), the same for all. Stock is simulated first come
first served, in the given order and on sorted prompts, without mixed steps; no other way is simulated. Ten seconds.
"""

from __future__ import annotations

import argparse

from batchllm.perf_model import CostModel, get_device
from batchllm.sim import SchedulerName, SimResult, parse_workload, simulate
from eval import compare
from eval.gpu_bench.setting import BOUNDS, Setting, gpu

_DEVICES = ("H100", "H200")
_STOCK = ("stock", "stock, sorted")
_SCHEDULERS: dict[str, tuple[SchedulerName, bool]] = {
    "ours": ("batchllm", True),
    "ours, SGLang's attention": ("batchllm", False),
    "stock": ("sglang-fcfs", False),
    "stock, sorted": ("sglang-sorted", False),
}
_POOL = 350_000


def simulated(chosen: Setting, cost_model: CostModel, part: str, name: str) -> SimResult:
    """A workload of the bench.

    Args:
        chosen: Pool, chunk and workloads.
        cost_model: The clock.
        part: Which workload.
        name: ``ours``, ``ours, SGLang's attention``, ``stock`` or ``stock, sorted``.
    """
    scheduler, shares_reads = _SCHEDULERS[name]
    return simulate(
        parse_workload(chosen.workloads[part]),
        scheduler=scheduler,
        cost_model=cost_model,
        kv_capacity_tokens=chosen.server_args["max_total_tokens"],
        chunk_tokens=chosen.server_args["chunked_prefill_size"],
        shares_reads=shares_reads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out")
    args = parser.parse_args()
    chosen = gpu("8b", _POOL)
    rows, results, missed = [], [], []
    for device in _DEVICES:
        cost_model = CostModel.with_defaults(get_device(device), chosen.shape)
        for part, spec in chosen.workloads.items():
            found = {name: simulated(chosen, cost_model, part, name) for name in _SCHEDULERS}
            best = min(found[name].elapsed_s for name in _STOCK)
            ratio = best / found["ours"].elapsed_s
            if ratio < BOUNDS[part]:
                missed.append(f"{part} on {device} ({ratio:.2f} of {BOUNDS[part]:.2f})")
            for name, result in found.items():
                numbers = {"seconds": result.elapsed_s, "saving": result.saving, "bound_ratio": result.bound_ratio}
                results.append({"device": device, "workload": spec, "name": name, **numbers})
                rows.append(
                    [
                        device,
                        spec,
                        name,
                        f"{result.elapsed_s:.1f}",
                        f"{best / result.elapsed_s:.2f}",
                        f"{BOUNDS[part]:.2f}" if name == "ours" else "",
                        f"{result.saving:.3f}",
                        f"{result.bound_ratio:.2f}",
                    ]
                )
    header = ["device", "workload", "scheduler", "simulated s", "best stock / it", "bound", "reuse", "limit / it"]
    text = f"{chosen.shape.name}, pool of {_POOL:,} tokens. Simulated, not measured.\n\n" + compare.table(header, rows)
    text += f"\n\nBelow the bound: {', '.join(missed) or 'none'}."
    compare.write(args.out, "The GPU bench, predicted", text, results)


if __name__ == "__main__":
    main()
