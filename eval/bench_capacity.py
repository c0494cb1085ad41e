"""How many requests a second a server can take before the wait between tokens passes a bound: Sarathi-Serve's capacity.

The experiment of arXiv 2403.02310, section 5.1, scaled to this context. Requests come as a Poisson process; their
lengths are drawn log-normally, with the medians and ninetieth percentiles that its table 2 gives of two data sets,
divided by ``--scale``. A server sustains a rate if the P99 of all times between tokens is within the bound, and the
median time to the first token, which contains the delay before a request is scheduled, within two seconds. Capacity is
the highest such rate, by bisection. Bounds: 5 times (strict) and 25 times (relaxed) the time between tokens of 32
streams of 4,096 tokens over ``--scale``, on stock SGLang without any prefill.

* ours: ``--max-tbt-ms`` of that bound. stock: SGLang's defaults. mixed: ``--enable-mixed-chunk``. vllm: vLLM's CPU
  engine (``eval/setup_vllm``), its defaults.

    python eval/bench_capacity.py --out eval/results/capacity.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import compare
import server_process
from live_load import Load, Outcome, milliseconds, model_folder

TRACES = {"chat": ((1730, 5696), (415, 834)), "summaries": ((7059, 12985), (208, 371))}
"""Median and ninetieth percentile of the prompt's tokens, and of the answer's."""
SLOS = {"strict": 5.0, "relaxed": 25.0}
SYSTEMS = ("ours", "stock", "mixed", "vllm")
_NORMAL_P90 = 1.2816
_MAX_TTFT_S = 2.0


def main() -> None:
    args = _arguments()
    with _server("stock", args) as url:
        step_ms = asyncio.run(_decode_step_ms(url, args))
    print(f"decode step of 32 rows: {step_ms:.1f} ms", flush=True)
    results: list[dict[str, Any]] = []
    for system in args.systems.split(","):
        seen: dict[tuple[str, float], dict[str, Any]] = {}
        for slo, factor in SLOS.items():
            bound_ms = factor * step_ms
            if system == "ours":  # another bound, another server
                seen.clear()
            flags = ("--max-tbt-ms", f"{bound_ms:.2f}") if system == "ours" else ()
            with _server(system, args, *flags) as url:
                for trace in args.traces.split(","):
                    result = asyncio.run(Search(url, trace, bound_ms, args, seen).run())
                    results.append({"system": system, "slo": slo, "bound_ms": round(bound_ms, 1)} | result)
                    print(json.dumps(results[-1]), flush=True)
    compare.write(args.out, "Capacity under a bound on the time between tokens", _text(results, step_ms, args), results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--traces", default=",".join(TRACES))
    parser.add_argument("--scale", type=float, default=4.0, help="lengths are divided by it")
    parser.add_argument("--trial-s", type=float, default=20.0, help="of each rate that is tried")
    parser.add_argument("--first-rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--bisections", type=int, default=3)
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="DEFAULT", help="a folder, or a shape of batchllm.default_model")
    parser.add_argument("--out")
    return parser.parse_args()


@contextmanager
def _server(system: str, args: argparse.Namespace, *flags: str) -> Iterator[str]:
    engine = system if system in ("ours", "vllm") else "stock"
    flags = (*flags, *(("--enable-mixed-chunk",) if system == "mixed" else ()))
    if engine != "vllm":
        flags = ("--random-seed", "0", *flags)
    with server_process.running(engine, model_folder(args.model), "--max-total-tokens", str(args.pool), *flags) as url:
        yield url


async def _decode_step_ms(url: str, args: argparse.Namespace) -> float:
    """The median time between tokens of 32 streams, most of which come when all prompts are computed."""
    load, outcome = Load(url, argparse.Namespace(stream_len=200), random.Random(args.seed)), Outcome("")
    await load.warm_up()
    for _ in range(32):
        load.start_stream(outcome, int(4096 / args.scale))
    await load.end_streams()
    return 1e3 * statistics.median(outcome.between)


@dataclass
class Search:
    """The highest rate that a server sustains."""

    url: str
    trace: str
    bound_ms: float
    args: argparse.Namespace
    seen: dict[tuple[str, float], dict[str, Any]]
    """What trials gave, by trace and rate."""

    async def run(self) -> dict[str, Any]:
        """Double or halve the rate until it is enclosed, then bisect."""
        trials = []
        low, high = 0.0, math.inf
        rate = self.args.first_rate
        while low == 0.0 or high == math.inf:
            trials.append(await self._try(rate))
            if trials[-1]["is_sustained"]:
                low, rate = rate, 2 * rate
            else:
                high, rate = rate, rate / 2
            if high < self.args.first_rate / 64:
                break
        for _ in range(self.args.bisections if low else 0):
            rate = math.sqrt(low * high)
            trials.append(await self._try(rate))
            low, high = (rate, high) if trials[-1]["is_sustained"] else (low, rate)
        return {"trace": self.trace, "requests_per_s": round(low, 3), "trials": trials}

    async def _try(self, rate: float) -> dict[str, Any]:
        key = (self.trace, round(rate, 4))
        if key not in self.seen:
            self.seen[key] = await self._measure(rate)
        trial = self.seen[key]
        is_sustained = trial["tbt_p99_ms"] <= self.bound_ms and trial["ttft_p50_ms"] <= 1e3 * _MAX_TTFT_S
        return trial | {"is_sustained": is_sustained}

    async def _measure(self, rate: float) -> dict[str, Any]:
        draw = random.Random(f"{self.args.seed} {self.trace} {rate:.4f}")
        load, outcome = Load(self.url, argparse.Namespace(stream_len=16), draw), Outcome("")
        await load.warm_up()
        prompt, answer = TRACES[self.trace]
        began, at = time.perf_counter(), draw.expovariate(rate)
        while at < self.args.trial_s:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            load.start_stream(outcome, self._length(draw, prompt), max_tokens=self._length(draw, answer))
            at += draw.expovariate(rate)
        await load.end_streams()
        is_empty = not outcome.between
        return {
            "rate": round(rate, 3),
            "num_requests": len(outcome.first),
            "tbt_p99_ms": 0.0 if is_empty else milliseconds(outcome.between, 99),
            "ttft_p50_ms": 0.0 if is_empty else milliseconds(outcome.first, 50),
        }

    def _length(self, draw: random.Random, percentiles: tuple[int, int]) -> int:
        median, p90 = percentiles
        value = draw.lognormvariate(math.log(median), math.log(p90 / median) / _NORMAL_P90)
        return max(2, int(min(value, 2 * p90) / self.args.scale))


def _text(results: list[dict[str, Any]], step_ms: float, args: argparse.Namespace) -> str:
    rows = []
    for trace in args.traces.split(","):
        for slo in SLOS:
            of_system = {r["system"]: r["requests_per_s"] for r in results if (r["trace"], r["slo"]) == (trace, slo)}
            rows.append([trace, slo, *(of_system[system] for system in args.systems.split(","))])
    text = f"Requests a second. A decode step of 32 rows takes {step_ms:.1f} ms on stock SGLang: the bounds are "
    text += " and ".join(f"{factor * step_ms:.0f} ms ({slo})" for slo, factor in SLOS.items())
    factor = 2**0.5**args.bisections
    text += f". Rates that were tried differ by a factor of {factor:.2f}: a system at the next one is level"
    return f"{text}.\n\n" + compare.table(["trace", "bound", *args.systems.split(",")], rows)


if __name__ == "__main__":
    main()
