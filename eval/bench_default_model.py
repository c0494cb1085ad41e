"""Whether the default model's answers depend on every prompt token, and on nothing else.

    python -m eval.bench_default_model [--shape default] [--trials 100] [--prompts 200] [--out FILE]

Sensitivity: one token of a random prompt is replaced by another; in what share of the trials does
the greedy continuation (16 tokens) change? A prefix shared by mistake is seen that often.
Agreement: the same prompts through two exact attention implementations in float32, token for token;
where they part, how far apart the two best logits were. Weights that are too chaotic would part.
Variety: different tokens in an answer, answers that end in one repeated token, that ended early.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from batchllm.default_model import DEFAULT, SHAPE_28M, WIDTH_64, RandomModelShape, cached_model_path

_LENGTHS = (16, 128, 512, 1024)
_POSITIONS = ("first", "middle", "last")
_CONTINUATION, _ANSWER = 16, 32
_FIRST_PLAIN_ID = 3  # below are the special tokens
_TOKENS_AT_ONCE = 8_192
# The bounds this model is held to.
_BOUND_SENSITIVITY, _BOUND_AGREEMENT, _BOUND_GAP = 0.95, 0.99, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the sensitivity table.

    Attributes:
        length: Prompt tokens.
        position: Which of them was replaced.
        trials: Prompts tried.
        changed: Share of them whose greedy continuation changed.
    """

    length: int
    position: str
    trials: int
    changed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Two implementations on the same prompts, and what the answers look like.

    Attributes:
        prompts: Prompts answered by both.
        equal: Share answered with the same tokens.
        gaps_where_parted: Gap of the two best logits where answers first differ, one per prompt.
        median_gap: Median gap of the two best logits over all steps.
        share_of_gaps_below_bound: Steps where that gap is below 1e-3.
        distinct_tokens: Mean share of different tokens in an answer.
        collapsed: Share of answers whose second half is one repeated token.
        ended_early: Share of answers ended by the model itself.
    """

    prompts: int
    equal: float
    gaps_where_parted: list[float]
    median_gap: float
    share_of_gaps_below_bound: float
    distinct_tokens: float
    collapsed: float
    ended_early: float


def load_model(path: str, attention: str = "sdpa") -> Any:
    """The model in float32 with one of transformers' attention implementations."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=torch.float32).eval()


def measure_sensitivity(
    model: Any, *, lengths: Sequence[int] = _LENGTHS, trials: int = 100, seed: int = 0
) -> list[Cell]:
    """Share of prompts whose continuation changes with one token, by length and position."""
    random = np.random.Generator(np.random.PCG64(seed))
    return [cell for length in lengths for cell in _cells(model, length, trials, random)]


def _cells(model: Any, length: int, trials: int, random: np.random.Generator) -> list[Cell]:
    ids = _FIRST_PLAIN_ID, model.config.vocab_size
    changed = np.zeros(len(_POSITIONS))
    at_once = max(1, _TOKENS_AT_ONCE // length)
    for start in range(0, trials, at_once):
        prompts = torch.from_numpy(random.integers(*ids, (min(at_once, trials - start), length)))
        sequences = _continue(model, prompts, _CONTINUATION)
        for i, place in enumerate((0, length // 2, length - 1)):
            other = torch.from_numpy(random.integers(ids[0], ids[1] - 1, len(prompts)))
            replaced = sequences.clone()
            # Drawn from one id fewer and stepped over the old one: never the same token.
            replaced[:, place] = other + (other >= sequences[:, place])
            # Same greedy continuation exactly when each of its tokens is again the best.
            with torch.inference_mode():
                logits = model(replaced[:, :-1], logits_to_keep=_CONTINUATION).logits
            same = (logits.argmax(-1) == sequences[:, length:]).all(-1)
            changed[i] += float((~same).sum())
    shares = (changed / trials).tolist()
    return [
        Cell(length=length, position=position, trials=trials, changed=share)
        for position, share in zip(_POSITIONS, shares, strict=True)
    ]


def _continue(model: Any, prompts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    continued: torch.Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
    )
    return continued


def measure_answers(path: str, *, prompts: int = 200, seed: int = 1) -> Answers:
    """Answers 16 to 600 random tokens with eager and with fused attention, and compares."""
    random = np.random.Generator(np.random.PCG64(seed))
    eager, fused = load_model(path, "eager"), load_model(path, "sdpa")
    parted: list[float] = []
    gaps: list[float] = []
    answers: list[list[int]] = []
    for _ in range(prompts):
        length = int(random.integers(16, 601))
        ids = random.integers(_FIRST_PLAIN_ID, eager.config.vocab_size, (1, length))
        one, one_gaps = _answer(eager, torch.from_numpy(ids))
        two, _ = _answer(fused, torch.from_numpy(ids))
        if one != two:
            steps = zip(one, two, one_gaps, strict=False)
            parted.append(next((gap for a, b, gap in steps if a != b), float("inf")))
        gaps += one_gaps
        answers.append(one)
    halves = [answer[len(answer) // 2 :] for answer in answers]
    return Answers(
        prompts=prompts,
        equal=1 - len(parted) / prompts,
        gaps_where_parted=parted,
        median_gap=float(np.median(gaps)),
        share_of_gaps_below_bound=float(np.mean(np.array(gaps) < _BOUND_GAP)),
        distinct_tokens=float(np.mean([len(set(answer)) / len(answer) for answer in answers])),
        collapsed=float(np.mean([len(set(half)) == 1 for half in halves])),
        ended_early=float(np.mean([len(answer) < _ANSWER for answer in answers])),
    )


def _answer(model: Any, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
    """Greedy tokens of one prompt, and the gap of the two best logits at each."""
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_ANSWER,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(generated.logits).topk(2).values
    tokens = generated.sequences[0, prompt.shape[1] :]
    return tokens.tolist(), (best[:, 0] - best[:, 1]).tolist()


def _print_cells(cells: Sequence[Cell]) -> None:
    print(f"{'length':>6}" + "".join(f"{position:>9}" for position in _POSITIONS))
    for start in range(0, len(cells), len(_POSITIONS)):
        row = cells[start : start + len(_POSITIONS)]
        print(f"{row[0].length:>6}" + "".join(f"{cell.changed:>9.1%}" for cell in row), flush=True)


def _print_answers(answers: Answers) -> None:
    for name, value in asdict(answers).items():
        print(f"{name:<26} {value:.4g}" if isinstance(value, float) else f"{name:<26} {value}")


def _is_within_bounds(cells: Sequence[Cell], answers: Answers) -> bool:
    return (
        all(cell.changed >= _BOUND_SENSITIVITY for cell in cells)
        and answers.equal >= _BOUND_AGREEMENT
        and all(gap < _BOUND_GAP for gap in answers.gaps_where_parted)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; exit status 1 if a bound is missed."""
    shapes: dict[str, RandomModelShape] = {s.name: s for s in (DEFAULT, SHAPE_28M, WIDTH_64)}
    parser = argparse.ArgumentParser(description="What the default model's answers depend on.")
    parser.add_argument("--shape", choices=shapes, default=DEFAULT.name)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--trials", type=int, default=100, help="per length and position")
    parser.add_argument("--prompts", type=int, default=200, help="answered by both implementations")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args(argv)
    shape = shapes[args.shape]
    begin = time.perf_counter()
    path = cached_model_path(shape, args.seed)
    print(f"{path}: {shape.num_parameters / 1e6:.1f}M parameters", flush=True)
    cells = measure_sensitivity(load_model(path), trials=args.trials)
    _print_cells(cells)
    answers = measure_answers(path, prompts=args.prompts)
    _print_answers(answers)
    is_within = _is_within_bounds(cells, answers)
    print(f"within bounds: {'yes' if is_within else 'NO'}")
    if args.out:
        report = {
            "shape": asdict(shape),
            "seed": args.seed,
            "seconds": round(time.perf_counter() - begin, 1),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "sensitivity": [asdict(cell) for cell in cells],
            "answers": asdict(answers),
            "within_bounds": is_within,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if is_within else 1


if __name__ == "__main__":
    raise SystemExit(main())
