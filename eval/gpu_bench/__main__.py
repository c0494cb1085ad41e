"""``scripts/gpu_bench``: see there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from batchllm.errors import BatchLLMError, ConfigError
from eval.gpu_bench import parts, report, setting

_MEASURED = [part for name in setting.BOUNDS for part in (f"{name}-policies", name)]
_PARTS = ("correctness", "attention", *_MEASURED, "profile", "calibration")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_bench",
        description="On a machine with an NVIDIA GPU: is it right, and how fast, against stock SGLang on the card.",
    )
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="in this order (default: all)")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; what is there is kept (default: build/gpu_bench)"
    )
    parser.add_argument("--model", choices=["8b", "1b"], default="8b", help="shape whose speed is measured")
    parser.add_argument("--pool", type=int, default=350_000, help="KV tokens of each engine")
    parser.add_argument("--minutes", type=float, default=9.0, help="most that a part may take")
    parser.add_argument("--rounds", type=int, default=2, help="of ours and stock in turn")
    parser.add_argument("--dry-run", action="store_true", help="every part on a CPU, small: whether it runs")
    args = parser.parse_args()
    chosen = setting.dry() if args.dry_run else setting.gpu(args.model, args.pool)
    if not args.dry_run and not _has_gpu():
        print("scripts/gpu_bench: torch finds no CUDA device; --dry-run runs every part on a CPU", file=sys.stderr)
        return 2
    out = args.out or Path("build", "gpu_bench_dry" if args.dry_run else "gpu_bench")
    try:
        bench = parts.Bench(chosen, out.resolve(), args.rounds)
    except ConfigError as error:
        print(f"scripts/gpu_bench: {error}", file=sys.stderr)
        return 2
    for part in args.parts:
        print(f"== {part}", flush=True)
        try:
            parts.run(bench, part, 60 * args.minutes)
        except (BatchLLMError, parts.EngineFailedError) as error:
            bench.note(part, failed=str(error))
        if part == "correctness" and report.is_wrong(bench.results(part)):
            print("scripts/gpu_bench: answers are wrong, see above; nothing is measured", file=sys.stderr)
            break
    text = report.render(chosen, bench.card(), bench.results())
    (out / "report.md").write_text(text)
    print(text)
    has_failed = report.is_wrong(bench.results()) or any("failed" in r and "backend" not in r for r in bench.results())
    return 1 if has_failed else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
