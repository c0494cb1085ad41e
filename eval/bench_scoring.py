"""Few-shot multiple choice: how likely each choice is behind its question, by ours, stock SGLang and vLLM in turn.

    python eval/bench_scoring.py --out eval/results/scoring.md

12 blocks of examples of 1,500 tokens, 40 questions behind each with 4 choices each, the 28M model in float32. Ours is
asked for all of them from the first token of the choice on. Stock and vLLM (``eval/setup_vllm`` makes its environment)
are asked as lm-evaluation-harness's backends for them ask: every log probability from token 0 on, one token generated,
all in one call, which is the best for them. So they reuse nothing, each request costs them the same, and the rates of a
sample are theirs: in each round ``--sample`` other questions behind each block. Each round runs all three, one behind
the other, and which comes first takes turns.

The numbers of all three are compared with Hugging Face's model in float64 (``measure_scores.py``), for the first sample
behind ``--reference`` of the blocks. How close float32 comes to it depends on the model: this one has random weights,
and log probabilities down to -17. So ours is held to 1e-4 or to twice the distance of the other that is further away,
whichever is more.

Exit status 1 where ours computes more tokens than the optimum, or is further away.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import compare
from measure_scores import NUM_CONTINUATIONS

_SIDES = ("ours", "stock", "vllm")
_TOLERANCE = 1e-4
_MEASURE = Path(__file__).with_name("measure_scores.py")
_VLLM_PYTHON = Path(__file__).parents[1] / ".venv-vllm/bin/python"
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--questions", type=int, default=40, help="behind each block")
    parser.add_argument("--block-len", type=int, default=1500)
    parser.add_argument(
        "--sample", type=int, default=1, help="questions behind each block of a round of stock and vLLM"
    )
    parser.add_argument("--reference", type=int, default=3, help="blocks whose first sample is checked")
    parser.add_argument("--pool", type=int, default=16384)
    parser.add_argument("--model", help="a folder (default: the 28M model)")
    parser.add_argument("--sides", default=",".join(_SIDES), help="which to measure, ours among them")
    parser.add_argument("--vllm-python", default=str(_VLLM_PYTHON), help="interpreter that has vLLM")
    args = parser.parse_args()
    sides = args.sides.split(",")
    if "ours" not in sides or not set(sides) <= set(_SIDES):
        parser.error(f"--sides {args.sides}: must be some of {', '.join(_SIDES)}, ours among them")
    if "vllm" in sides and not Path(args.vllm_python).exists():
        parser.error(f"{args.vllm_python} is not there: run eval/setup_vllm, or leave vllm out of --sides")
    if args.rounds * args.sample > args.questions or not 1 <= args.reference <= args.blocks:
        parser.error("--sample times --rounds must be --questions at most, and --reference --blocks at most")
    if args.model is None:
        from batchllm.default_model import SHAPE_28M, cached_model_path

        args.model = cached_model_path(SHAPE_28M)
    everything = _numbers(args, args.blocks, range(args.questions))
    results: list[Result] = []
    for number in range(args.rounds):
        sample = _numbers(args, args.blocks, range(number * args.sample, (number + 1) * args.sample))
        for side in sides if number % 2 == 0 else sides[::-1]:
            chosen = everything if side == "ours" else sample
            results.append(_in_a_process(side, args, chosen) | {"round": number})
            print(_without_scores(results[-1]), flush=True)
    reference = _in_a_process("reference", args, _numbers(args, args.reference, range(args.sample)))
    text, is_good = _text(results, reference, sides)
    compare.write(args.out, "Scoring", text, [_without_scores(result) for result in results])
    sys.exit(0 if is_good else 1)


def _numbers(args: argparse.Namespace, num_blocks: int, questions: range) -> list[int]:
    """Numbers of the requests of these questions behind each of the first blocks."""
    of_questions = [block * args.questions + question for block in range(num_blocks) for question in questions]
    return [number * NUM_CONTINUATIONS + i for number in of_questions for i in range(NUM_CONTINUATIONS)]


def _in_a_process(side: str, args: argparse.Namespace, chosen: list[int]) -> Result:
    shape = map(str, (args.blocks, args.questions, args.block_len))
    flags = ["--model", args.model, "--pool", str(args.pool), "--shape", *shape]
    python = args.vllm_python if side == "vllm" else sys.executable
    with tempfile.TemporaryDirectory() as folder:  # SGLang leaves sockets and folders of its own there
        done = subprocess.run(
            [python, "-W", "ignore", str(_MEASURE), side, *flags],
            input=json.dumps(chosen),
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: Result = json.loads(line.removeprefix("RESULT "))
            return result
    raise RuntimeError(f"{side}: {done.stderr[-2000:]}")


def _without_scores(result: Result) -> Result:
    return {name: value for name, value in result.items() if name != "scores"}


def _text(results: list[Result], reference: Result, sides: list[str]) -> tuple[str, bool]:
    """What is to be said, and whether ours is at the optimum with the reference's numbers."""
    of = {side: sorted((r for r in results if r["side"] == side), key=lambda r: r["round"]) for side in sides}
    is_close, accuracy = _accuracy(of, reference)
    rows = []
    for side in sides:
        seconds = compare.median(of[side], "seconds")
        num = of[side][0]["num_requests"]
        computed = " or ".join(f"{num:,}" for num in sorted({r["num_computed"] for r in of[side]}))
        rows.append([side, f"{num:,}", f"{seconds:.1f}", f"{num / seconds:,.1f}", computed])
    is_optimal = all(r["num_computed"] == r["num_optimal"] for r in of["ours"])
    faster = "; ".join(f"{_ratio(of['ours'], of[side])} of {side}" for side in sides if side != "ours")
    header = ["engine", "requests a round", "seconds", "requests/s", "prompt tokens computed a round"]
    text = compare.table(header, rows) + (
        f"\n\nMedians of {len(of['ours'])} rounds. Ours is {'at' if is_optimal else 'NOT at'} the optimum of "
        f"{of['ours'][0]['num_optimal']:,} tokens, and has {faster or 'nothing beside it'}. Stock and vLLM are asked "
        "for a sample: from token 0 on they compute every request anew, whatever the others are.\n\n"
        f"{accuracy}"
    )
    return text, is_optimal and is_close


def _ratio(ours: list[Result], others: list[Result]) -> str:
    """How many times the requests a second, in the middle round and from the lowest to the highest."""
    rates = [[r["num_requests"] / r["seconds"] for r in some] for some in (ours, others)]
    ratios = sorted(own / other for own, other in zip(*rates, strict=True))
    return f"{ratios[len(ratios) // 2]:.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f}) the rate"


def _accuracy(of: dict[str, list[Result]], reference: Result) -> tuple[bool, str]:
    """Whether ours is as close to the reference as it is held to be, and a table of all."""
    exact: dict[str, list[float]] = reference["scores"]
    rows: list[list[str]] = []
    furthest: dict[str, float] = {}
    for side, results in of.items():
        scores = {number: values for result in results for number, values in result["scores"].items()}
        pairs = [(scores[number], values) for number, values in exact.items()]
        of_tokens = [abs(a - b) for own, other in pairs for a, b in zip(own, other, strict=True)]
        of_requests = [abs(sum(own) - sum(other)) for own, other in pairs]
        mean = sum(of_tokens) / len(of_tokens)
        close = sum(distance <= _TOLERANCE for distance in of_tokens) / len(of_tokens)
        rows.append([side, f"{max(of_tokens):.1e}", f"{mean:.1e}", f"{close:.1%}", f"{max(of_requests):.1e}"])
        furthest[side] = max(of_tokens)
    header = ["engine", "token, at most", "token, on average", f"tokens within {_TOLERANCE:g}", "request, at most"]
    num_tokens = sum(map(len, exact.values()))
    bound = max([_TOLERANCE, *(2 * distance for side, distance in furthest.items() if side != "ours")])
    return furthest["ours"] <= bound, (
        f"Distance of log probabilities from the model in float64, {len(exact):,} requests, {num_tokens:,} tokens:\n\n"
        + compare.table(header, rows)
    )


if __name__ == "__main__":
    main()
