"""A batch beside people, as the ways to do it that the field has: who waits how long, and when the batch is done.

The scenarios follow llm-d's benchmark of batch beside online traffic. Live requests come as a Poisson process whose
rate alternates between a burst and a lull. Each scenario is a server of its own:

* interactive: stock SGLang, no batch.
* requests: stock SGLang, all rows of the batch sent as plain requests at once.
* capped: the same with so many rows at a time as a batch gateway without feedback sends (``--cap``).
* gated: a row is sent while fewer than ``--gate`` requests run or wait in stock SGLang, by its own metrics.
* priority: as requests, with SGLang's ``--enable-priority-scheduling`` and live requests in front.
* default, auto: our server, the rows as a batch; without a bound, and with ``--max-tbt-ms auto``.

    python eval/bench_scenarios.py --out eval/results/scenarios.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

import compare
import server_process
from live_load import Load, Outcome, add_arguments, milliseconds, model_folder

SCENARIOS = ("interactive", "requests", "capped", "gated", "priority", "default", "auto")
_PERCENTILES = (50, 95, 99)


def main() -> None:
    args = _arguments()
    records: list[dict[str, Any]] = []
    for scenario in args.scenarios.split(","):
        record = asyncio.run(_run(scenario, args))
        print(json.dumps(record), flush=True)
        records.append(record)
    compare.write(args.out, "Ways to run a batch beside people", _table(records), records)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rows=1000)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--live-prompt-len", type=int, default=60)
    parser.add_argument("--burst-rate", type=float, default=3.0, help="live requests a second")
    parser.add_argument("--lull-rate", type=float, default=0.3)
    parser.add_argument("--phase-s", type=float, default=8.0)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--cap", type=int, default=64)
    parser.add_argument("--gate", type=int, default=16)
    return parser.parse_args()


async def _run(scenario: str, args: argparse.Namespace) -> dict[str, Any]:
    flags = ["--max-total-tokens", str(args.pool), "--random-seed", "0", "--enable-metrics"]
    is_ours = scenario in ("default", "auto")
    if scenario == "auto":
        flags += ["--max-tbt-ms", "auto"]
    elif scenario == "priority":
        flags += ["--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "1"]
    with server_process.running("ours" if is_ours else "stock", model_folder(args.model), *flags) as url:
        load = Load(url, args, random.Random(args.seed))
        await load.warm_up()
        batch = asyncio.create_task(_serve_rows(scenario, load, args))
        outcomes = {"burst": Outcome("burst"), "lull": Outcome("lull")}
        live = {"priority": 1} if scenario == "priority" else {}
        for _ in range(args.cycles):
            for phase, rate in (("burst", args.burst_rate), ("lull", args.lull_rate)):
                await load.stream_for(outcomes[phase], args.phase_s, rate, args.live_prompt_len, **live)
        await load.end_streams()
        batch_s = await batch
        return {"scenario": scenario, "batch_s": batch_s if scenario != "interactive" else None} | {
            f"{phase}_{name}_p{percent}_ms": milliseconds(times, percent) if times else None
            for phase, outcome in outcomes.items()
            for name, times in (("ttft", outcome.first), ("tbt", outcome.between))
            for percent in _PERCENTILES
        }


async def _serve_rows(scenario: str, load: Load, args: argparse.Namespace) -> float:
    """Run the batch; returns the seconds until its last row was answered."""
    bodies = load.row_bodies()
    began = time.perf_counter()
    if scenario in ("default", "auto"):
        await load.finish_batch(await load.start_batch(bodies))
    elif scenario == "gated":
        sent_at_once = asyncio.Semaphore(args.gate)
        await load.send_rows(bodies, sent_at_once, may_send=lambda: load.has_fewer_requests(args.gate))
    elif scenario != "interactive":
        await load.send_rows(bodies, asyncio.Semaphore(args.cap if scenario == "capped" else len(bodies)))
    return round(time.perf_counter() - began, 1)


def _table(records: list[dict[str, Any]]) -> str:
    header = ["scenario", "phase", *(f"TTFT p{p}" for p in _PERCENTILES), *(f"between p{p}" for p in _PERCENTILES)]
    rows = []
    for record in records:
        for phase in ("burst", "lull"):
            values = [record[f"{phase}_{name}_p{p}_ms"] for name in ("ttft", "tbt") for p in _PERCENTILES]
            cells = ["" if value is None else value for value in values]
            rows.append([record["scenario"], phase, *cells, record["batch_s"] or "" if phase == "burst" else ""])
    return "Times in ms, by the phase in which a request arrived.\n\n" + compare.table([*header, "batch done, s"], rows)


if __name__ == "__main__":
    main()
