"""How much faster are several engines than one? Simulated: our units of a plan, and what routers do as rows arrive.

Every engine is ours, on the same simulated device, with the runtime's own planner, partition and scheduler; only the
distribution of the rows differs. A case takes minutes at a million rows: those that ``--out`` already has are not run
again, and ``--stop-after-s`` stops within one.

    python eval/bench_replicas.py --out eval/results/replicas.md
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compare
from simulated_replicas import DISTRIBUTIONS, start_replicas, zipf

from batchllm.perf_model import CostModel, get_device, get_model
from batchllm.sim.workload import OutputDraw, SimWorkload

_NAMES = {
    "units": "ours: units",
    "rows": "round robin by row",
    "groups": "round robin by group",
    "cache-aware": "cache-aware, by arrival",
}


def main() -> None:
    args = _arguments()
    results = _read(args.out)
    stop_at = time.monotonic() + args.stop_after_s
    for num_rows, num_replicas, distribution in _cases(args):
        key = {"rows": num_rows, "replicas": num_replicas, "distribution": distribution}
        if any(key.items() <= result.items() for result in results):
            continue
        case = _resumed(args, key) or _Case(key, args, num_rows, num_replicas, distribution)
        if not case.go_on(stop_at):
            case.save(args)
            print(f"stopped within {key}; the same command goes on", flush=True)
            break
        results.append(case.result())
        print(json.dumps({name: results[-1][name] for name in (*key, "elapsed_s", "cpu_s")}), flush=True)
    compare.write(args.out, "Several engines, simulated", _text(results, args), results)


class _Case:
    """A case under way."""

    def __init__(
        self, key: dict[str, Any], args: argparse.Namespace, num_rows: int, num_replicas: int, distribution: Any
    ) -> None:
        self.key, self._cpu_s = key, 0.0
        began = time.process_time()
        cost_model = CostModel.with_defaults(get_device(args.device), get_model(args.model))
        workload = _workload(args, num_rows)
        self._run = start_replicas(workload, num_replicas, distribution=distribution, cost_model=cost_model)
        self._cpu_s = time.process_time() - began

    def go_on(self, stop_at: float) -> bool:
        """Until its end, or that time; whether it has ended."""
        began, is_under_way = time.process_time(), True
        while is_under_way and time.monotonic() < stop_at:
            is_under_way = self._run.advance()
        self._cpu_s += time.process_time() - began
        return not is_under_way

    def result(self) -> dict[str, Any]:
        result = self._run.result()
        more = {"elapsed_s": result.elapsed_s, "alone": result.alone_share, "cpu_s": round(self._cpu_s, 1)}
        return self.key | asdict(result) | more

    def save(self, args: argparse.Namespace) -> None:
        if args.out is not None:
            _state_path(args).write_bytes(pickle.dumps(self, protocol=5))


def _resumed(args: argparse.Namespace, key: dict[str, Any]) -> _Case | None:
    """The case that an earlier run has stopped within, if it is this one."""
    if args.out is None or not _state_path(args).exists():
        return None
    case: _Case = pickle.loads(_state_path(args).read_bytes())
    _state_path(args).unlink()
    return case if case.key == key else None


def _state_path(args: argparse.Namespace) -> Path:
    return Path(args.out).with_suffix(".state")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000000", help="numbers of rows, separated by commas")
    parser.add_argument("--replicas", default="1,2,4,16,64")
    parser.add_argument("--distributions", default=",".join(DISTRIBUTIONS))
    parser.add_argument("--device", default="H100")
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--prefix", type=int, default=200, help="tokens of each group's prefix")
    parser.add_argument("--private", type=int, default=50, help="tokens of each row behind it")
    parser.add_argument("--output", type=int, default=100, help="median tokens of an output")
    parser.add_argument("--max-new", type=int, default=1024)
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="the same command then goes on")
    parser.add_argument("--out")
    return parser.parse_args()


def _cases(args: argparse.Namespace) -> list[tuple[int, int, Any]]:
    cases = []
    for num_rows in map(int, args.rows.split(",")):
        for distribution in args.distributions.split(","):
            # One engine has all rows, whatever the distribution.
            counts = [n for n in map(int, args.replicas.split(",")) if n > 1 or distribution == "units"]
            cases += [(num_rows, n, distribution) for n in counts]
    return cases


def _workload(args: argparse.Namespace, num_rows: int) -> SimWorkload:
    output = OutputDraw(median_len=args.output, sigma=1.0, max_new_len=args.max_new, is_known=False)
    return zipf(
        prefix_len=args.prefix,
        private_len=args.private,
        exponent=1.6,
        largest_share=0.1,
        num_requests=num_rows,
        output=output,
    )


def _read(out: str | None) -> list[dict[str, Any]]:
    path = None if out is None else Path(out).with_suffix(".jsonl")
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _text(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    text = (
        f"{args.model} on {args.device}, simulated, not measured. Prefixes of {args.prefix} tokens over groups whose "
        f"sizes are Zipf (exponent 1.6, the largest a tenth of the rows), {args.private} tokens of each row, outputs "
        f"log-normal with a median of {args.output} and at most {args.max_new} tokens, not known before. Engines of "
        "the other distributions plan what they are given, too. Efficiency: time of one engine, over the time of the "
        "last of n and n. Alone: part of the time in which only the last one still runs. Computed: prompt tokens over "
        "the fewest that one engine can compute. Cuts: what the plan says that its cuts cost, over the same. CPU: "
        "seconds of the simulation."
    )
    rows = []
    for result in sorted(results, key=lambda r: (-r["rows"], r["replicas"], list(_NAMES).index(r["distribution"]))):
        one = [r for r in results if r["rows"] == result["rows"] and r["replicas"] == 1]
        efficiency = one[0]["elapsed_s"] / result["replicas"] / result["elapsed_s"] if one else None
        optimum = result["num_optimal_prompt_tokens"]
        rows.append(
            [
                f"{result['rows']:,}",
                result["replicas"],
                _NAMES[result["distribution"]],
                "" if efficiency is None else f"{efficiency:.3f}",
                f"{result['elapsed_s']:,.1f}",
                f"{result['alone']:.3f}",
                f"{result['num_computed_prompt_tokens'] / optimum:.3f}",
                f"{result['num_cut_tokens'] / optimum:.4f}",
                result["cpu_s"],
            ]
        )
    header = ["rows", "engines", "distribution", "efficiency", "seconds", "alone", "computed", "cuts", "CPU s"]
    return f"{text}\n\n{compare.table(header, rows)}"


if __name__ == "__main__":
    main()
