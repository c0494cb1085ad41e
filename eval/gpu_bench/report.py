"""A short table of all that a folder of results holds; what is missing is left out, what failed is said."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from eval.gpu_bench.setting import BOUNDS, Setting

Result = dict[str, Any]


def render(setting: Setting, card: dict[str, Any], results: list[Result]) -> str:
    """As Markdown."""
    by_part: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_part[result["part"]].append(result)
    kind = "DRY RUN on a CPU: nothing here says how fast anything is" if setting.is_dry else card["name"]
    lines = [
        f"# GPU bench: {kind}",
        "",
        f"{setting.shape.name}, pool of {setting.server_args['max_total_tokens']:,} tokens. In this run bf16 products "
        f"reach {card['matmul_flops'] / 1e12:,.0f} TFLOP/s, a copy {card['copy_bytes_per_s'] / 1e9:,.0f} GB/s.",
    ]
    lines += _correctness(by_part["correctness"]) + _speed(setting, by_part) + _profile(by_part["profile"])
    lines += _calibration(by_part["calibration"])
    said = [
        f"* {r['part']}: {r.get('out_of_time') or r.get('failed') or r.get('left_out')}"
        for r in results
        if r.keys() & {"out_of_time", "failed", "left_out"}
    ]
    return "\n".join(lines + (["", "## Not run, or not to the end", "", *said] if said else [])) + "\n"


def is_wrong(results: list[Result]) -> bool:
    """Whether anything that was checked is not right."""
    return any(result.get("is_right") is False for result in results)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])]


def _correctness(results: list[Result]) -> list[str]:
    rows = []
    for r in results:
        if "is_right" not in r:
            continue
        verdict = "right" if r["is_right"] else "WRONG"
        if "num_different" in r:
            what = f"{r['num_different']} of {r['num_requests']} differ, {r['num_unexplained']} without a near tie"
            rows.append([r["engine"], f"float32 tokens, pages of {r['page_size']}", what, verdict])
        elif "drift" in r:
            what = f"{r['logprob_difference']:.4f}; two backends of stock {r['drift']:.4f}"
            rows.append([r["engine"], "bfloat16 log probabilities, mean difference", what, verdict])
        else:
            rows.append([r["engine"], "prompt tokens computed", "not the optimum", verdict])
    return ["", "## Correctness", *_table(["engine", "compared", "found", ""], rows)] if rows else []


def _speed(setting: Setting, by_part: dict[str, list[Result]]) -> list[str]:
    rows = []
    for part, spec in setting.workloads.items():
        runs = [r for r in by_part[part] if "seconds" in r]
        runs = [r for r in runs if r["best_stock"] == runs[-1]["best_stock"]]
        stock = [float(r["seconds"]) for r in runs if r["engine"] == "stock"]
        limit = next((r for r in reversed(by_part[part]) if "limit_s" in r), None)
        for name in ["stock", *setting.ours]:
            of_name = [r for r in runs if r["engine"] == name]
            if not of_name:
                continue
            seconds = statistics.median(float(r["seconds"]) for r in of_name)
            ratio = f"{statistics.median(stock) / seconds:.2f}" if stock else ""
            bound = f"{BOUNDS[part]:.2f}" if name == "ours" else ""
            reuse = 1 - of_name[-1]["num_computed_prompt_tokens"] / of_name[-1]["num_prompt_tokens"]
            best = of_name[-1]["best_stock"]
            how = f"{best['backend']} {best['policy']}" if name == "stock" else ""
            how += (", sorted" * best["is_sorted"] + ", mixed" * best["is_mixed"]) if name == "stock" else ""
            rows.append(
                [
                    spec,
                    f"{name} {how}".strip(),
                    " ".join(f"{r['seconds']:.1f}" for r in of_name),
                    ratio,
                    bound,
                    f"{reuse:.3f}",
                    f"{limit['limit_s'] / seconds:.2f}" if limit else "",
                    f"{limit['predicted_s'][name]:.1f}" if limit else "",
                ]
            )
    header = ["workload", "engine", "seconds", "stock / it", "bound", "reuse", "limit / it", "simulated before, s"]
    return ["", "## Speed", *_table(header, rows)] if rows else []


def _profile(results: list[Result]) -> list[str]:
    rows = []
    for r in results:
        if "span_s" not in r:
            continue
        if not r["by_kind"]:
            rows.append([r["engine"], "no kernel was seen", "", ""])
            continue
        total = sum(r["by_kind"].values())
        kinds = ", ".join(f"{kind} {s / total:.0%}" for kind, s in sorted(r["by_kind"].items(), key=lambda p: -p[1]))
        rows.append([r["engine"], f"{r['span_s']:.2f}", f"{r['idle_share']:.1%}", kinds])
    header = ["engine", "profiled, s", "no kernel ran (bound 5 %)", "kernel time"]
    return ["", "## Where the time goes", *_table(header, rows)] if rows else []


def _calibration(results: list[Result]) -> list[str]:
    rows = [
        [
            f"{r['num_steps']:,}",
            f"{r['median_error']:.1%}",
            f"{r['p90_error']:.1%}",
            f"{r['total_error']:+.1%}",
            ", ".join(r["assumed"]) or "none",
        ]
        for r in results
        if "median_error" in r
    ]
    header = ["steps", "error of a step, median (bound 10 %)", "p90", "of all seconds", "coefficients not told"]
    return ["", "## Calibration of the simulator", *_table(header, rows)] if rows else []
