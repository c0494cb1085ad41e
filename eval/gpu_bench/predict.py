"""What the simulator says of the bench's workloads, written down before any of them has run on a GPU.

    python -m eval.gpu_bench.predict --out eval/results/gpu_prediction.md

Efficiencies are the cost model's assumptions (`batchllm.perf_model`), the same for all. Stock is simulated first come
first served, in the given order and on sorted prompts, without mixed steps; no other way is simulated. Ten seconds.
"""

from __future__ import annotations

import argparse
from typing import Any

from batchllm.perf_model import CostModel, get_device
from batchllm.sim import parse_workload, simulate
from eval import compare
from eval.gpu_bench import setting

_DEVICES = ("H100", "H200")
_OURS = (("ours", "batchllm", True), ("ours, SGLang's attention", "batchllm", False))
_STOCK = (("stock", "sglang-fcfs", False), ("stock, sorted", "sglang-sorted", False))
_POOL = 350_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out")
    args = parser.parse_args()
    chosen = setting.gpu("8b", _POOL)
    rows, results, missed = [], [], []
    for device in _DEVICES:
        cost_model = CostModel.with_defaults(get_device(device), chosen.shape)
        for part, spec in chosen.workloads.items():
            found = {name: _simulate(cost_model, chosen, spec, *how) for name, *how in (*_OURS, *_STOCK)}
            best = min(float(found[name]["seconds"]) for name, *_ in _STOCK)
            ratio = best / found["ours"]["seconds"]
            if ratio < chosen.bounds[part]:
                missed.append(f"{part} on {device} ({ratio:.2f} of {chosen.bounds[part]:.2f})")
            for name, result in found.items():
                results.append({"device": device, "workload": spec, "name": name, **result})
                is_ours = name == "ours"
                rows.append(
                    [
                        device,
                        spec,
                        name,
                        f"{result['seconds']:.1f}",
                        f"{best / result['seconds']:.2f}",
                        f"{chosen.bounds[part]:.2f}" if is_ours else "",
                        f"{result['saving']:.3f}",
                        f"{result['bound_ratio']:.2f}",
                    ]
                )
    header = ["device", "workload", "scheduler", "simulated s", "best stock / it", "bound", "reuse", "limit / it"]
    text = f"{chosen.shape.name}, pool of {_POOL:,} tokens. Simulated, not measured.\n\n" + compare.table(header, rows)
    text += f"\n\nBelow the bound: {', '.join(missed) or 'none'}."
    compare.write(args.out, "The GPU bench, predicted", text, results)


def _simulate(
    cost_model: CostModel, chosen: setting.Setting, spec: str, scheduler: Any, shares_reads: bool
) -> dict[str, float]:
    result = simulate(
        parse_workload(spec),
        scheduler=scheduler,
        cost_model=cost_model,
        kv_capacity_tokens=_POOL,
        chunk_tokens=chosen.server_args["chunked_prefill_size"],
        shares_reads=shares_reads,
    )
    return {"seconds": result.elapsed_s, "saving": result.saving, "bound_ratio": result.bound_ratio}


if __name__ == "__main__":
    main()
