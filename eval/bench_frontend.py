"""Frontend programs on a CPU: `run_batch` of 1,000 argument sets over 20 documents, against stock SGLang's.

Each program: an answer, two critics in a fork, a choice of three. Stock is SGLang's own server and endpoint, with every
schedule policy once; then the best of them and ours in turn: in this process, and through our server. A pool of 8,192
tokens, float32, one compute thread. Greedy, so that answers can be compared.

    python eval/bench_frontend.py --out eval/results/frontend.md
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import compare
import server_process
import sglang as sgl

from batchllm import BatchEngine, default_model
from batchllm.lang import BatchBackend, Endpoint

_POLICIES = ("fcfs", "lpm", "dfs-weight", "lof")
_FLAGS = {"max_total_tokens": 8192, "chunked_prefill_size": 2048, "random_seed": 0}
_SIDES = ("ours, in process", "ours, server")
_STOCK = "stock"
_WORDS = "time year people way day man thing woman life child world school state family student group country problem"


@sgl.function
def review(s: Any, document: str, question: str) -> None:
    s += f"{document}\nQuestion: {question}\nAnswer:"
    s += sgl.gen("answer", max_tokens=12, ignore_eos=True)
    critics = s.fork(2)
    critics += lambda number: f"\nCritic {number}:" + sgl.gen("view", max_tokens=8, ignore_eos=True)
    critics.join()
    s += f"\nThey say:{s['view'][0]};{s['view'][1]}.\nSo it is" + sgl.select(
        "verdict", [" right", " wrong", " neither"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--shape", default="DEFAULT", help="of batchllm.default_model, e.g. SHAPE_28M")
    parser.add_argument("--policies", nargs="+", choices=_POLICIES, default=list(_POLICIES), help="of stock")
    parser.add_argument("--sides", nargs="+", choices=_SIDES, default=list(_SIDES), help="of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    model = str(default_model.cached_model_path(getattr(default_model, args.shape)))
    arguments = make_arguments(args.programs, args.documents)
    results = [_measure(_STOCK, model, policy, arguments) for policy in args.policies]
    best = min(results, key=lambda result: result["seconds"])
    for round_ in range(args.rounds):
        results += [_measure(side, model, "", arguments) for side in args.sides]
        if round_ < args.rounds - 1:
            results.append(_measure(_STOCK, model, best["policy"], arguments))
    text = f"{args.programs} programs over {args.documents} documents, {args.shape}.\n\n" + _table(results, best)
    kept = [{name: value for name, value in result.items() if name != "texts"} for result in results]
    compare.write(args.out, "Frontend programs, on a CPU", text, kept)


def make_arguments(num_programs: int, num_documents: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions to documents of about two hundred tokens, shuffled."""
    rng = random.Random(seed)
    words = _WORDS.split()
    documents = [" ".join(rng.choices(words, k=150)) for _ in range(num_documents)]
    arguments = [
        {"document": documents[number % num_documents], "question": " ".join(rng.choices(words, k=8)) + "?"}
        for number in range(num_programs)
    ]
    rng.shuffle(arguments)
    return arguments


@contextmanager
def _backend(side: str, model: str, policy: str) -> Iterator[Any]:
    flags = [str(part) for name, value in _FLAGS.items() for part in (f"--{name.replace('_', '-')}", value)]
    if side == "ours, in process":
        with BatchEngine(model, dtype="float32", **_FLAGS) as engine:
            yield BatchBackend(engine)
    elif side == "ours, server":
        with server_process.running("ours", model, *flags) as url:
            endpoint = Endpoint(url)
            yield endpoint
            endpoint.shutdown()
    else:
        with server_process.running("stock", model, *flags, "--schedule-policy", policy) as url:
            yield sgl.RuntimeEndpoint(url)


def _measure(side: str, model: str, policy: str, arguments: list[dict[str, Any]]) -> compare.Result:
    with _backend(side, model, policy) as backend:
        review.run_batch(make_arguments(8, 2, seed=1), backend=backend, temperature=0)  # warm-up, on other documents
        started = time.perf_counter()
        states = review.run_batch(arguments, backend=backend, temperature=0)
        seconds = time.perf_counter() - started
    assert all(state.error() is None for state in states)
    result = {"side": side, "policy": policy, "num_programs": len(arguments), "seconds": round(seconds, 3)}
    if hasattr(backend, "waves"):
        result |= {"num_requests": backend.waves.num_sent, "num_waves": backend.waves.num_waves}
    print(result, file=sys.stderr, flush=True)
    return result | {"texts": [state.text() for state in states]}


def _table(results: list[compare.Result], best: compare.Result) -> str:
    chosen = [result for result in results if (result["side"], result["policy"]) == (_STOCK, best["policy"])]
    stock_s = compare.median(chosen, "seconds")
    rows = [
        [f"{_STOCK}, {result['policy']}", f"{result['seconds']:.1f}", "", "", ""]
        for result in results[: len({r["policy"] for r in results if r["side"] == _STOCK})]
    ]
    rows.append([f"{_STOCK}, {best['policy']}, median of {len(chosen)}", f"{stock_s:.1f}", "1.00", "", ""])
    for side in _SIDES:
        ours = [result for result in results if result["side"] == side]
        if ours:
            ours_s = compare.median(ours, "seconds")
            num_same = sum(a == b for a, b in zip(ours[0]["texts"], best["texts"], strict=True))
            row = [f"{side}, median of {len(ours)}", f"{ours_s:.1f}", f"{stock_s / ours_s:.2f}"]
            rows.append([*row, f"{num_same} of {len(best['texts'])}", ours[0]["num_waves"]])
    return compare.table(["", "seconds", "times as fast", "same text", "waves"], rows)


if __name__ == "__main__":
    main()
