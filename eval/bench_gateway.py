"""What a live request pays for several engines: an engine asked directly, and two behind ``--replicas 2``.

Everything runs on this machine: the client, the server in front and the engine share its cores. Requests come one after
the other, so that differences are what the way costs and not what waits.

    python eval/bench_gateway.py --out eval/results/gateway.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

import compare
import httpx
import numpy as np
import server_process
from live_load import Load, Outcome, add_arguments, model_folder

_CASES = {"direct": [], "replicas": ["--replicas", "2"]}
_FIELDS = {
    "models_ms": "GET /v1/models",
    "answer_p50_ms": "one token, p50",
    "answer_p99_ms": "one token, p99",
    "ttft_p50_ms": "first token of a stream, p50",
    "ttft_p99_ms": "first token of a stream, p99",
    "tbt_p50_ms": "between tokens, p50",
    "tbt_p99_ms": "between tokens, p99",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser, rows=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--streams", type=int, default=60)
    parser.add_argument("--prompt-len", type=int, default=60)
    args = parser.parse_args()
    results: list[compare.Result] = []
    for number in range(args.rounds):
        for case, flags in _CASES.items():
            with server_process.running(
                "ours", model_folder(args.model), "--max-total-tokens", str(args.pool), *flags
            ) as url:
                results.append({"case": case, "round": number} | asyncio.run(_measured(url, args)))
            print(json.dumps(results[-1]), flush=True)
    compare.write(args.out, "Live requests through the server of several engines", _text(results, args), results)


async def _measured(url: str, args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(args.seed)
    load, outcome = Load(url, args, draw), Outcome("")
    await load.warm_up()
    async with httpx.AsyncClient(base_url=url, timeout=None) as http:
        models = [await _seconds(http, "GET", "/v1/models") for _ in range(args.requests)]
        answers = []
        for _ in range(args.requests):
            prompt = [draw.randrange(10, 4000) for _ in range(args.prompt_len)]
            body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
            answers.append(await _seconds(http, "POST", "/v1/completions", json=body))
    for _ in range(args.streams):
        load.start_stream(outcome, args.prompt_len)
        await load.end_streams()
    times = {"answer": answers, "ttft": outcome.first, "tbt": outcome.between}
    percentiles = {
        f"{name}_p{percent}_ms": 1e3 * float(np.percentile(seconds, percent))
        for name, seconds in times.items()
        for percent in (50, 99)
    }
    return {"models_ms": 1e3 * float(np.median(models))} | percentiles


async def _seconds(http: httpx.AsyncClient, method: str, path: str, **options: Any) -> float:
    began = time.perf_counter()
    (await http.request(method, path, **options)).raise_for_status()
    return time.perf_counter() - began


def _text(results: list[compare.Result], args: argparse.Namespace) -> str:
    direct, replicas = ([r for r in results if r["case"] == case] for case in _CASES)
    rows = []
    for field, words in _FIELDS.items():
        one, other = compare.median(direct, field), compare.median(replicas, field)
        more = np.median([b[field] - a[field] for a, b in zip(direct, replicas, strict=True)])
        rows.append([words, f"{one:.2f}", f"{other:.2f}", f"{more:+.2f}"])
    header = ["ms", "one engine", "`--replicas 2`", "more"]
    how = (
        f"{args.rounds} rounds in turn; medians, and medians of the rounds' own differences. In each round "
        f"{args.requests} requests of a kind and {args.streams} streams of {args.stream_len} tokens, one after the "
        f"other, prompts of {args.prompt_len} tokens."
    )
    return f"{compare.table(header, rows)}\n\n{how}"


if __name__ == "__main__":
    main()
