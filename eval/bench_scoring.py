"""Few-shot multiple choice: how likely each choice is behind its question, ours and stock SGLang in turn.

    python eval/bench_scoring.py --out eval/results/scoring.md

12 blocks of examples of 1,500 tokens, 40 questions behind each with 4 choices each, the 28M model in float32. Stock is
asked as lm-evaluation-harness's backend for SGLang asks: prompts sorted by length, every log probability from token 0
on, one token generated; once in one call, which is the best for it. Ours is asked from the first token of the choice
on. Each round runs both, one behind the other, and which comes first takes turns. The bounds: computed tokens equal the
optimum, at least five times the rate, the same log probability of each token within 1e-4; exit status 1 where the first
or the last is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import compare

Request = tuple[list[int], list[int]]
"""Token ids of a context, and of its continuation."""
_SIDES = ("ours", "stock")
_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--questions", type=int, default=40, help="behind each block")
    parser.add_argument("--block-len", type=int, default=1500)
    parser.add_argument("--pool", type=int, default=16384)
    parser.add_argument("--model", help="a folder (default: the 28M model)")
    parser.add_argument("--side", choices=_SIDES, help="measure this one in this process")
    args = parser.parse_args()
    if args.side is not None:
        print("RESULT " + json.dumps(_measure(args)), flush=True)
        return
    results = []
    for number in range(args.rounds):
        for side in _SIDES if number % 2 == 0 else _SIDES[::-1]:
            results.append(_in_a_process(side) | {"round": number})
            print({name: value for name, value in results[-1].items() if name != "scores"}, flush=True)
    text, is_good = _text(results)
    compare.write(args.out, "Scoring", text, [r | {"scores": len(r["scores"])} for r in results])
    sys.exit(0 if is_good else 1)


def _in_a_process(side: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:  # SGLang leaves sockets and folders of its own there
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--side", side],
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise RuntimeError(f"{side}: {done.stderr[-2000:]}")


def _requests(num_blocks: int, num_questions: int, block_len: int) -> list[Request]:
    """Four continuations of each context, in the order of a task: question by question, block by block."""
    rng = random.Random(1)

    def tokens(length: int) -> list[int]:
        return [rng.randint(10, 1500) for _ in range(length)]

    requests = []
    for _ in range(num_blocks):
        block = tokens(block_len)
        for _ in range(num_questions):
            context = block + tokens(rng.randint(20, 60))
            requests += [(context, tokens(rng.randint(1, 12))) for _ in range(4)]
    return requests


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from batchllm.default_model import SHAPE_28M, cached_model_path

    requests = _requests(args.blocks, args.questions, args.block_len)
    warm_up = _requests(1, 2, 64)
    server_args = {
        "max_total_tokens": args.pool,
        "chunked_prefill_size": 2048,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "random_seed": 0,
        "log_level": "error",
    }
    model = args.model or cached_model_path(SHAPE_28M)
    return {"ours": _ours, "stock": _stock}[args.side](model, server_args, warm_up, requests)


def _ours(model: str, server_args: dict[str, Any], warm_up: list[Request], requests: list[Request]) -> dict[str, Any]:
    from batchllm import BatchEngine

    with BatchEngine(model, **server_args) as engine:

        def run(some: list[Request]) -> list[list[float]]:
            completions = engine.batch_generate(
                input_ids=[context + following for context, following in some],
                score_from=[len(context) for context, _ in some],
                sampling_params={"prompt_logprobs": 1, "max_new_tokens": 0},
            )
            return [list(completion.prompt_score.logprobs) for completion in completions]  # None would end the run

        run(warm_up)
        began = time.perf_counter()
        scores = run(requests)
        seconds = time.perf_counter() - began
        report = engine.last_report
        assert report is not None
        return {
            "side": "ours",
            "seconds": seconds,
            "num_computed": report.num_computed_prompt_tokens,
            "num_optimal": report.num_optimal_prompt_tokens,
            "scores": scores,
        }


def _stock(model: str, server_args: dict[str, Any], warm_up: list[Request], requests: list[Request]) -> dict[str, Any]:
    import stock

    engine, stop = stock.start(model_path=model, device="cpu", **server_args)

    def run(some: list[Request]) -> tuple[list[list[float]], int]:
        prompts = [context + following for context, following in some]
        order = sorted(range(len(some)), key=lambda i: (-len(prompts[i]), prompts[i]))
        outputs = engine.generate(
            input_ids=[prompts[i] for i in order],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            top_logprobs_num=2,
            logprob_start_len=0,
        )
        scores: list[list[float]] = [[] for _ in some]
        num_computed = 0
        for i, output in zip(order, outputs, strict=True):
            meta = output["meta_info"]
            scores[i] = [entry[0] for entry in meta["input_token_logprobs"][len(some[i][0]) :]]
            num_computed += meta["prompt_tokens"] - meta["cached_tokens"]
        return scores, num_computed

    try:
        run(warm_up)
        began = time.perf_counter()
        scores, num_computed = run(requests)
        seconds = time.perf_counter() - began
    finally:
        stop()
    return {"side": "stock", "seconds": seconds, "num_computed": num_computed, "scores": scores}


def _text(results: list[dict[str, Any]]) -> tuple[str, bool]:
    """What is to be said, and whether ours is at the optimum with stock's numbers."""
    of = {side: [r for r in results if r["side"] == side] for side in _SIDES}
    seconds = {side: compare.median(of[side], "seconds") for side in _SIDES}
    rows = [
        [
            side,
            f"{seconds[side]:.1f}",
            f"{len(of[side][0]['scores']) / seconds[side]:,.1f}",
            " or ".join(f"{num:,}" for num in sorted({r["num_computed"] for r in of[side]})),
        ]
        for side in _SIDES
    ]
    pairs = [
        (a, b)
        for own, other in zip(of["ours"], of["stock"], strict=True)
        for a, b in zip(own["scores"], other["scores"], strict=True)
    ]
    of_tokens = [abs(a - b) for own, other in pairs for a, b in zip(own, other, strict=True)]
    of_requests = [abs(sum(own) - sum(other)) for own, other in pairs]
    is_optimal = all(r["num_computed"] == r["num_optimal"] for r in of["ours"])
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(of["ours"], of["stock"], strict=True))
    place = "at" if is_optimal else "NOT at"
    middle = ratios[len(ratios) // 2]
    num_close = sum(difference <= _TOLERANCE for difference in of_requests)
    text = compare.table(["engine", "seconds", "requests/s", "prompt tokens computed"], rows) + (
        f"\n\nMedians of {len(ratios)} rounds. Ours is {middle:.1f} times as fast ({ratios[0]:.1f} to "
        f"{ratios[-1]:.1f} round by round) and {place} the optimum of {of['ours'][0]['num_optimal']:,} tokens. Log "
        f"probabilities of {len(of_tokens):,} tokens differ by {max(of_tokens):.1e} at most; of their sums over a "
        f"request {num_close:,} of {len(pairs):,} by {_TOLERANCE:g} or less, all by {max(of_requests):.1e} or less."
    )
    return text, is_optimal and max(of_tokens) <= _TOLERANCE


if __name__ == "__main__":
    main()
