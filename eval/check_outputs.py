"""Greedy float32 outputs, token for token: ours against Hugging Face ``generate`` and against stock SGLang.

The bound: equal for at least 99 % of requests, and at every first difference the two best logits lie within 1e-3.

    python eval/check_outputs.py --out eval/results/outputs.md
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import compare
import torch
import workloads
from transformers import AutoModelForCausalLM

from batchllm.default_model import default_model_path

_WORKLOADS = ["one_level(0)", "two_level(0)", "irregular(0)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pool", type=int, default=8192)
    parser.add_argument("--out")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32)
    model.generation_config.eos_token_id = None  # the engines ignore it too
    results, rows = [], []
    for expression in _WORKLOADS:
        workload = eval(expression, vars(workloads))
        ours = _engine_outputs("ours", expression, args.pool)
        for name, others in (
            ("Hugging Face generate", _hugging_face_outputs(model, workload)),
            ("stock SGLang", _engine_outputs("stock", expression, args.pool)),
        ):
            gaps = _gaps_where_different(model, workload, ours, others)
            equal = 1 - len(gaps) / len(ours)
            unexplained = sum(gap >= 1e-3 for gap in gaps)
            rows.append([workload.name, name, len(ours), f"{equal:.4f}", len(gaps), unexplained])
            results.append({"workload": expression, "other": name, "num_requests": len(ours), "gaps": gaps})
            print(rows[-1], flush=True)
    header = ["workload", "ours against", "requests", "equal", "different", "of these, gap over 1e-3"]
    compare.write(args.out, "Outputs, token for token", compare.table(header, rows), results)


def _engine_outputs(engine: str, expression: str, pool: int) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "outputs.json")
        compare.measure(engine, [expression], "--pool", str(pool), "--outputs", str(path))
        outputs: list[list[int]] = json.loads(path.read_text())
        return outputs


@torch.no_grad()
def _hugging_face_outputs(model: Any, workload: workloads.Workload) -> list[list[int]]:
    outputs = []
    for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
        ids = torch.tensor([prompt])
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_len,
            do_sample=False,
        )
        outputs.append(done[0, len(prompt) :].tolist())
    return outputs


@torch.no_grad()
def _gaps_where_different(
    model: Any, workload: workloads.Workload, ours: list[list[int]], others: list[list[int]]
) -> list[float]:
    """For each differing request, how far the two best logits lie apart where the outputs part."""
    gaps = []
    for prompt, a, b in zip(workload.prompts, ours, others, strict=True):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            logits = model(torch.tensor([prompt + a[:at]])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            gaps.append(best - second)
    return gaps


if __name__ == "__main__":
    main()
