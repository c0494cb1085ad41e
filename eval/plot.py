"""Draws the plots of docs/ from the results: ``python eval/plot.py``. Plain SVG, no library needed."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_OURS, _STOCK = "#1f6f5c", "#b8c4c0"
_ROW, _LEFT, _WIDTH = 26, 270, 800


def main() -> None:
    reuse = _read("reuse.jsonl")
    bars = []
    for workload in dict.fromkeys(r["workload"] for r in reuse):
        for result in reuse:
            if result["workload"] == workload and result["pool"] == 8192:
                is_ours = result["engine"] == "ours"
                name = "batchllm (= optimum)" if is_ours else f"stock {result['policy']}"
                share = 1 - result["num_computed_prompt_tokens"] / result["num_prompt_tokens"]
                bars.append((f"{workload}  {name}", share, f"{share:.3f}", is_ours))
    _draw("reuse.svg", "Share of prompt tokens reused, KV pool of 8192 tokens", bars, 1.0)
    overhead = _read("overhead.jsonl")
    bars = []
    for engine in ("ours", "stock"):
        rate = statistics.median(r["requests_per_s"] for r in overhead if r["engine"] == engine)
        bars.append(
            (
                "batchllm" if engine == "ours" else "stock Engine.generate",
                rate,
                f"{rate:,.0f}",
                engine == "ours",
            )
        )
    title = "Requests per second, 16 prompt tokens and 1 new token, one-layer model"
    _draw("overhead.svg", title, bars, max(value for _, value, _, _ in bars))
    _draw_gaps(_read("coserving.jsonl"))


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_ROOT / "eval/results" / name).read_text().splitlines()]


def _opening(height: int, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="22" font-size="15">{title}</text>',
    ]


def _draw(name: str, title: str, bars: list[tuple[str, float, str, bool]], full: float) -> None:
    height = 40 + _ROW * len(bars)
    parts = _opening(height, title)
    for i, (label, value, text, is_ours) in enumerate(bars):
        y, length = 36 + i * _ROW, (_WIDTH - _LEFT - 70) * value / full
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{label}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{length:.1f}" height="{_ROW - 8}" '
            f'fill="{_OURS if is_ours else _STOCK}"/>',
            f'<text x="{_LEFT + length + 6:.1f}" y="{y + 16}">{text}</text>',
        ]
    (_ROOT / "docs" / name).write_text("\n".join([*parts, "</svg>"]) + "\n")


def _draw_gaps(records: list[dict[str, Any]]) -> None:
    """What each person waited for each token, over time: the first round of each case, milliseconds in a log scale."""
    panels = [("idle", "idle server", _STOCK), ("default", "beside a batch, no bound", _STOCK)]
    panels += [("auto", "beside a batch, --max-tbt-ms auto", _OURS)]
    height, top, low, high = 130, 40, 4.0, 4000.0
    parts = _opening(top + height * len(panels), "Time between tokens of live requests, ms, over time")
    for i, (case, label, colour) in enumerate(panels):
        gaps = next(r["gaps"] for r in records if r["case"] == case)
        longest = max(at for at, _ in gaps)
        y_of = [top + height * i + 10, height - 30]
        for value in (10, 100, 1000):
            y = y_of[0] + y_of[1] * (1 - math.log(value / low) / math.log(high / low))
            parts.append(f'<line x1="60" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e8e7"/>')
            parts.append(f'<text x="54" y="{y + 4:.1f}" text-anchor="end" font-size="11">{value}</text>')
        for at, gap in gaps:
            y = y_of[0] + y_of[1] * (1 - math.log(min(max(gap, low), high) / low) / math.log(high / low))
            x = 60 + (_WIDTH - 80) * at / longest
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8" fill="{colour}"/>')
        parts.append(f'<text x="66" y="{y_of[0] + 2}" font-size="12">{label}</text>')
    (_ROOT / "docs" / "coserving.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
