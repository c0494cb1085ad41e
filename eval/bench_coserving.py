"""People who talk to a server while it runs a batch: how long they wait, and what the batch pays for it.

Each case is a server of its own. A batch of rows in groups that share a prefix runs, and meanwhile live requests are
streamed, one after the other at a fixed distance or as a Poisson process. Times are taken by the client: to the first
token, and between tokens. What the batch pays is its rate in rows/s, beside the rate of the same batch alone.

    python eval/bench_coserving.py --out eval/results/coserving.md

Cases: idle (no batch), alone (no live request), default (no bound), mixed (``--enable-mixed-chunk``), bounds by
``--max-tbt-ms`` (auto, or a number), stock (the batch's rows as plain requests to SGLang's own server).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time

import compare
import server_process
from live_load import Load, Outcome, add_arguments, model_folder

CASES = ("idle", "alone", "default", "mixed", "auto")
_HEADER = ("TTFT p50", "TTFT p99", "between p50", "p99", "max", "rows/s", "of alone", "net", "steps over the bound")


def main() -> None:
    args = _arguments()
    outcomes = []
    if args.of_capacity is not None:
        args.poisson, args.every_s = True, 1.0 / (args.of_capacity * asyncio.run(_capacity(args)))
        print(f"a live request every {args.every_s:.2f} s", flush=True)
    for round_ in range(args.rounds):
        for case in args.cases.split(","):
            outcome = asyncio.run(_run(case, args, seed=args.seed + round_))
            print(json.dumps({k: v for k, v in outcome.record().items() if k != "gaps"}), flush=True)
            outcomes.append(outcome)
    compare.write(args.out, "People beside a batch", _table(outcomes, args), [o.record() for o in outcomes])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rows=3000)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--streams", type=int, default=30)
    parser.add_argument("--live-prompt-len", type=int, nargs="+", default=[60])
    parser.add_argument("--settle-s", type=float, default=10.0, help="of the batch, before anything is measured")
    parser.add_argument("--every-s", type=float, default=1.0, help="seconds between live requests")
    parser.add_argument("--poisson", action="store_true", help="exponential distances with that mean")
    parser.add_argument("--of-capacity", type=float, help="that part of what an idle server can answer, as Poisson")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


async def _capacity(args: argparse.Namespace) -> float:
    """Live requests a second that our server answers when all of them come at once."""
    flags = ["--max-total-tokens", str(args.pool), "--random-seed", "0"]
    with server_process.running("ours", model_folder(args.model), *flags, threads=args.threads) as url:
        load, outcome = Load(url, args, random.Random(args.seed)), Outcome("")
        await load.warm_up()
        began = time.perf_counter()
        for _ in range(args.streams):
            load.start_stream(outcome, random.Random(args.seed).choice(args.live_prompt_len))
        await load.end_streams()
        return float(args.streams / (time.perf_counter() - began))


async def _run(case: str, args: argparse.Namespace, seed: int) -> Outcome:
    flags = ["--max-total-tokens", str(args.pool), "--random-seed", "0", "--enable-metrics"]
    if case == "mixed":
        flags.append("--enable-mixed-chunk")
    elif case not in ("idle", "alone", "default", "stock"):
        flags += ["--max-tbt-ms", case]
    outcome = Outcome(case)
    engine = "stock" if case == "stock" else "ours"
    with server_process.running(engine, model_folder(args.model), *flags, threads=args.threads) as url:
        load = Load(url, args, random.Random(seed))
        await load.warm_up()
        if case == "stock":
            await load.serve_rows_as_requests(outcome)
        elif case == "idle":
            await load.stream_all(outcome)
        else:
            await load.serve_batch(outcome, has_live=case != "alone")
        if engine == "ours":
            load.read_metrics(outcome)
    return outcome


def _table(outcomes: list[Outcome], args: argparse.Namespace) -> str:
    """Medians over the rounds."""
    rows = []
    alone = statistics.median([o.rows_per_s for o in outcomes if o.case == "alone" and o.rows_per_s] or [0.0])
    busy = [sum(gap for _, gap in o.gaps) / (args.streams * args.every_s) for o in outcomes if o.case == "idle"]
    busy = [share for share in busy if share < 1.0]  # streams beside each other: it is not known what they take
    for case in args.cases.split(","):
        records = [o.record() for o in outcomes if o.case == case]
        cells = []
        for name in ("ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "tbt_max_ms", "rows_per_s"):
            values = [record[name] for record in records if record.get(name) is not None]
            cells.append(f"{statistics.median(values):.1f}" if values else "")
        rates = [record["rows_per_s"] for record in records if record["rows_per_s"]]
        kept = statistics.median(rates) / alone if rates and alone else 0.0
        cells.append(f"{kept:.2f}" if kept else "")
        cells.append(f"{kept / (1.0 - statistics.median(busy)):.2f}" if kept and busy and case != "alone" else "")
        late = [r["num_late_steps"] / r["num_live_steps"] for r in records if r["num_live_steps"]]
        cells.append(f"{100 * statistics.median(late):.2f} %" if late else "")
        bounds = [r["bound_ms"] for r in records if r["bound_ms"]]
        name = f"{case} ({statistics.median(bounds):.0f} ms)" if bounds else case
        rows.append([name, *cells])
    text = "Times in ms; medians over the rounds. Of alone: rows/s beside those without live requests."
    if args.of_capacity is not None:
        text += f" A live request every {args.every_s:.2f} s on the average."
    if busy:
        text += (
            f" Net: of the time that live requests leave, which take {statistics.median(busy):.3f} of an idle server's."
        )
    return f"{text}\n\n" + compare.table(["case", *_HEADER], rows)


if __name__ == "__main__":
    main()
