"""Admission where output lengths are unknown: log-normal outputs on a one-layer model, a pool of 8,192 tokens.

Real stops: every prompt is answered once to its limit; then each row gets a stop token that its answer comes to at
about the length drawn for it (sigma 1, median 32), and the batch is run with lengths learned, bounded, and known.
The bound: at most 2 % of requests retracted at a mean occupancy of 0.85 while work waits.

    python eval/bench_learned.py --out eval/results/learned.md
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import compare
import workloads

_LIMIT, _MEDIAN = 192, 32
_NEVER = 0  # the end of text, which these models never generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    from batchllm import BatchEngine
    from batchllm.default_model import WIDTH_64, cached_model_path

    results: list[compare.Result] = []
    with tempfile.TemporaryDirectory() as folder:
        trace_path = Path(folder, "trace.json")
        flags: dict[str, Any] = {"max_total_tokens": args.pool, "trace_path": trace_path, "skip_tokenizer_init": True}
        model = cached_model_path(WIDTH_64)
        with BatchEngine(model, **flags) as engine:
            batches = {seed: _batch(engine, seed, args.num_requests) for seed in range(args.seeds)}
            for seed, (prompts, sampling, lens) in batches.items():
                for mode, hints in (("learned", None), ("known", lens)):
                    completions = engine.batch_generate(
                        input_ids=prompts, sampling_params=sampling, expected_new_tokens=hints
                    )
                    num_as_drawn = sum(len(c.output_ids) == n for c, n in zip(completions, lens, strict=True))
                    assert num_as_drawn >= 0.99 * len(lens), f"{num_as_drawn} of {len(lens)} answers as long as drawn"
                    results.append(_result(engine, trace_path, mode, seed, lens))
        with BatchEngine(model, **flags, output_lengths="bounded") as engine:
            for seed, (prompts, sampling, lens) in batches.items():
                engine.batch_generate(input_ids=prompts, sampling_params=sampling)
                results.append(_result(engine, trace_path, "bounded", seed, lens))
    rows = [
        [
            r["mode"],
            r["seed"],
            f"{r['num_retractions']} ({r['retraction_share']:.2%})",
            f"{r['saturated_occupancy']:.3f}",
            f"{r['mean_occupancy']:.3f}",
            f"{r['run_s']:.1f}",
            f"{r['mean_prediction_error']:.0%}",
        ]
        for r in sorted(results, key=lambda r: (r["seed"], r["mode"]))
    ]
    header = ["lengths", "seed", "retracted", "occupancy while work waits", "over the whole run", "seconds"]
    text = compare.table([*header, "mean error of a prediction"], rows)
    text += f"\n\n{args.num_requests} requests, outputs of {_mean(results):.0f} tokens on average, at most {_LIMIT}."
    compare.write(args.out, "Admission with unknown output lengths", text, results)


def _mean(results: list[compare.Result]) -> float:
    return sum(r["mean_output_len"] for r in results) / len(results)


def _batch(engine: Any, seed: int, num_requests: int) -> tuple[list[list[int]], list[dict[str, Any]], list[int]]:
    """Prompts, sampling with a stop token each, and the lengths that come of it."""
    rng = random.Random(seed)
    prompts = workloads.grid(seed, 128, 24, 8, num_requests).prompts
    greedy = {"temperature": 0, "max_new_tokens": _LIMIT, "ignore_eos": True}
    answers = engine.batch_generate(input_ids=prompts, sampling_params=greedy)
    sampling, lens = [], []
    for answer in answers:
        ids = list(answer.output_ids)
        wanted = round(rng.lognormvariate(0, 1) * _MEDIAN)
        # The stop must not come earlier.
        place = next((i for i in range(min(wanted, _LIMIT) - 1, _LIMIT) if i >= 0 and ids[i] not in ids[:i]), None)
        # SGLang's ignore_eos ignores stop tokens too; these models never generate an end of text anyway.
        stop = _NEVER if place is None else ids[place]
        sampling.append(greedy | {"ignore_eos": False, "stop_token_ids": [stop]})
        lens.append(_LIMIT if place is None else place + 1)
    return prompts, sampling, lens


def _result(engine: Any, trace_path: Path, mode: str, seed: int, lens: list[int]) -> compare.Result:
    from batchllm.trace import StepTrace

    report, trace = engine.last_report, StepTrace.read(trace_path)
    return {
        "mode": mode,
        "seed": seed,
        "num_retractions": report.num_retractions,
        "retraction_share": report.num_retractions / report.num_requests,
        "saturated_occupancy": trace.saturated_occupancy,
        "mean_occupancy": trace.mean_occupancy,
        "run_s": report.run_s,
        "mean_prediction_error": report.mean_prediction_error,
        "num_predicted_tokens": report.num_predicted_tokens,
        "num_predicted_actual_tokens": report.num_predicted_actual_tokens,
        "mean_output_len": sum(lens) / len(lens),
    }


if __name__ == "__main__":
    main()
