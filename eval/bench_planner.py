"""How fast the planner is, what memory it takes, and whether its time is linear in the tokens.

    python -m eval.bench_planner [--scale 1.0] [--repeat 3] [--only SHAPE ...] [--out FILE]

Every workload is generated from a fixed seed. A prompt is a row of segments; a segment is the start
of the endless token run its id names, so two prompts share what their equal leading ids share.
Times are wall seconds of `plan_batch`, prompts in and validated plan out, after JIT warm-up, the
median of the repeats. Memory is the peak resident set during planning minus that before, over the
bytes of the token buffer (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt

from batchllm.planner import explain, plan_batch
from batchllm.tokens import TokenTable

Int64Array = npt.NDArray[np.int64]
Segments = tuple[Int64Array, Int64Array]
"""Ids and lengths in tokens of every prompt's segments, both int64[num_prompts, num_segments]."""

_VOCABULARY = 128_256
_ROWS_AT_ONCE_TOKENS = 4_000_000
# The bound this room is held to: a million prompts of 256 tokens.
_BOUND_SHAPE, _BOUND_SECONDS, _BOUND_MEMORY_RATIO = "documents", 4.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One workload planned.

    Attributes:
        shape: Name of the workload.
        num_prompts: Prompts planned.
        num_tokens: Tokens of all prompts.
        plan_seconds: Median wall seconds of ``plan_batch``.
        worst_seconds: Slowest repeat.
        tokens_per_second: ``num_tokens / plan_seconds``.
        extra_memory_ratio: Peak extra resident bytes over token buffer bytes.
        validate_seconds: Checking every shared token of the plan against the prompts.
        explain_seconds: Summary, with both one-level cuts.
        num_prefixes: Planned prefixes.
        num_levels: Levels of the planned tree.
        optimal_reuse: Share of the prompt tokens not computed.
    """

    shape: str
    num_prompts: int
    num_tokens: int
    plan_seconds: float
    worst_seconds: float
    tokens_per_second: float
    extra_memory_ratio: float
    validate_seconds: float
    explain_seconds: float
    num_prefixes: int
    num_levels: int
    optimal_reuse: float


def documents(scale: float) -> Segments:
    """64 tokens shared by all, 136 by 100 prompts each, 56 private, shuffled."""
    n = int(1_000_000 * scale)
    document = np.random.default_rng(1).permutation(n) // 100
    return _segments([np.zeros(n), document, np.arange(n)], [64, 136, 56])


def deep_tree(scale: float) -> Segments:
    """Five shared levels of fan-out 1 to 12 and skewed lengths, then a skewed private part."""
    n = int(300_000 * scale)
    random = np.random.default_rng(2)
    leaf = random.integers(0, max(1, n // 20), n)
    levels = [np.zeros(n), leaf // 1728, leaf // 144, leaf // 12, leaf, np.arange(n)]
    ids, _ = _segments(levels, [1] * 6)
    # Drawn per segment and not per prompt: prompts in one segment share its length.
    lengths = np.empty_like(ids)
    for level, mean in enumerate((300, 200, 100, 60, 40, 30)):
        draws = random.lognormal(np.log(mean), 1.0, int(ids[:, level].max()) + 1)
        lengths[:, level] = np.clip(draws, 1, 20 * mean)[ids[:, level]]
    return ids, lengths


def long_prefix(scale: float) -> Segments:
    """4000 tokens shared by all, 16 private."""
    n = int(100_000 * scale)
    return _segments([np.zeros(n), np.arange(n)], [4000, 16])


def identical(scale: float) -> Segments:
    """One prompt of 1000 tokens, over and over."""
    n = int(200_000 * scale)
    return _segments([np.zeros(n)], [1000])


def staircase(scale: float) -> Segments:
    """Each prompt is the next one without its last token, shuffled: the deepest tree there is."""
    n = int(16_000 * scale**0.5)
    return np.zeros((n, 1), np.int64), 1 + np.random.default_rng(5).permutation(n)[:, None]


def comb(scale: float) -> Segments:
    """A staircase whose every prompt ends in tokens of its own: a branch at every depth."""
    ids, lengths = staircase(scale)
    n = len(ids)
    tail = np.random.default_rng(6).integers(1, 40, (n, 1))
    return np.hstack([ids, np.arange(1, n + 1)[:, None]]), np.hstack([lengths, tail])


def zipf_groups(scale: float) -> Segments:
    """Groups of Zipf-distributed size with prefixes of skewed length, and 50 private tokens."""
    n = int(500_000 * scale)
    random = np.random.default_rng(7)
    group = np.minimum(random.zipf(1.3, n), 1_000_000)
    ids, lengths = _segments([group, np.arange(n)], [1, 50])
    lengths[:, 0] = np.clip(random.lognormal(5.0, 1.0, 1_000_001), 1, 4000)[group]
    return ids, lengths


def unshared(scale: float) -> Segments:
    """Nothing in common: 256 private tokens."""
    n = int(500_000 * scale)
    return _segments([np.arange(n)], [256])


def short(scale: float) -> Segments:
    """Prompts of 8 tokens, pairs share 6: the planner's arrays weigh most against the tokens."""
    n = int(2_000_000 * scale)
    pair = np.random.default_rng(9).permutation(n) // 2
    return _segments([pair, np.arange(n)], [6, 2])


SHAPES: dict[str, Callable[[float], Segments]] = {
    shape.__name__: shape
    for shape in (
        documents,
        deep_tree,
        long_prefix,
        identical,
        staircase,
        comb,
        zipf_groups,
        unshared,
        short,
    )
}


def _segments(ids: Sequence[npt.NDArray[np.generic]], lengths: list[int]) -> Segments:
    columns = np.stack([column.astype(np.int64) for column in ids], axis=1)
    return columns, np.broadcast_to(np.array(lengths, np.int64), columns.shape).copy()


def tokenized(segments: Segments) -> TokenTable:
    """Write every prompt's tokens: a hash of segment level, segment id and place in the segment."""
    ids, lengths = segments
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(axis=1))])
    tokens = np.empty(offsets[-1], np.int32)
    rows_at_once = max(1, int(_ROWS_AT_ONCE_TOKENS * len(ids) / max(1, offsets[-1])))
    levels = np.arange(ids.shape[1], dtype=np.uint64)
    for lo in range(0, len(ids), rows_at_once):
        hi = min(lo + rows_at_once, len(ids))
        run = (ids[lo:hi].astype(np.uint64) * np.uint64(8) + levels).ravel()
        length = lengths[lo:hi].ravel()
        ends = np.cumsum(length)
        place = np.arange(ends[-1]) - np.repeat(ends - length, length)
        mixed = np.repeat(run * np.uint64(0x9E3779B97F4A7C15), length) + place.astype(np.uint64)
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        tokens[offsets[lo] : offsets[hi]] = mixed % np.uint64(_VOCABULARY)
    return TokenTable(tokens=tokens, offsets=offsets)


def _memory_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def measure(shape: str, scale: float, repeat: int) -> Measurement:
    """Plan one workload ``repeat`` times.

    Args:
        shape: A name in `SHAPES`.
        scale: Multiplies the tokens of the workload.
        repeat: Times to plan.
    """
    table = tokenized(SHAPES[shape](scale))
    seconds, extra = [], 0
    for _ in range(repeat):
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory_bytes("VmRSS")
        start = time.perf_counter()
        plan = plan_batch(table)
        seconds.append(time.perf_counter() - start)
        extra = max(extra, _memory_bytes("VmHWM") - before)
    start = time.perf_counter()
    plan.validate(table)
    validated = time.perf_counter()
    summary = explain(plan, table)
    explained = time.perf_counter()
    median = float(np.median(seconds))
    return Measurement(
        shape=shape,
        num_prompts=len(table),
        num_tokens=table.num_tokens,
        plan_seconds=median,
        worst_seconds=max(seconds),
        tokens_per_second=table.num_tokens / median,
        extra_memory_ratio=extra / table.tokens.nbytes,
        validate_seconds=validated - start,
        explain_seconds=explained - validated,
        num_prefixes=summary.num_prefixes,
        num_levels=len(summary.prefixes_per_level),
        optimal_reuse=summary.optimal_reuse,
    )


def _warm_up() -> None:
    """Compile every kernel: enough prompts for threads, and a few shared levels."""
    for shape in ("documents", "short"):
        table = tokenized(SHAPES[shape](0.05))
        plan = plan_batch(table)
        plan.validate(table)
        explain(plan, table)


def _print_table(measurements: list[Measurement]) -> None:
    print(
        f"{'shape':<12} {'prompts':>10} {'tokens':>12} {'plan s':>7} {'worst':>7} {'Mtok/s':>7} "
        f"{'mem x':>6} {'valid. s':>8} {'expl. s':>7} {'prefixes':>9} {'levels':>7} {'reuse':>6}"
    )
    for m in measurements:
        print(
            f"{m.shape:<12} {m.num_prompts:>10,} {m.num_tokens:>12,} {m.plan_seconds:>7.3f} "
            f"{m.worst_seconds:>7.3f} {m.tokens_per_second / 1e6:>7.0f} "
            f"{m.extra_memory_ratio:>6.2f} {m.validate_seconds:>8.3f} {m.explain_seconds:>7.3f} "
            f"{m.num_prefixes:>9,} {m.num_levels:>7,} {m.optimal_reuse:>6.1%}"
        )


def _print_linearity(by_scale: dict[float, list[Measurement]]) -> None:
    """Seconds per billion tokens of each shape as its tokens double: flat is linear."""
    scales = sorted(by_scale)
    print("\nseconds per 1e9 tokens, as the tokens double")
    print(f"{'shape':<12}" + "".join(f"{f'x{scale:g}':>10}" for scale in scales))
    for row in zip(*(by_scale[scale] for scale in scales), strict=True):
        print(f"{row[0].shape:<12}" + "".join(f"{1e9 / m.tokens_per_second:>10.2f}" for m in row))


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the planner.")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every workload's tokens")
    parser.add_argument("--repeat", type=int, default=3, help="times to plan each workload")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="write the measurements as JSON to this file")
    args = parser.parse_args()
    _warm_up()
    by_scale = {
        scale: [measure(shape, scale, args.repeat) for shape in args.only]
        for scale in (args.scale / 4, args.scale / 2, args.scale)
    }
    _print_table(by_scale[args.scale])
    _print_linearity(by_scale)
    for m in by_scale[args.scale]:
        if m.shape == _BOUND_SHAPE and args.scale == 1.0:
            held = m.plan_seconds <= _BOUND_SECONDS and m.extra_memory_ratio <= _BOUND_MEMORY_RATIO
            bound = f"{_BOUND_SECONDS:g} s and {_BOUND_MEMORY_RATIO:g} x its tokens"
            print(f"\nbound: {_BOUND_SHAPE} in {bound}: {'held' if held else 'MISSED'}")
    if args.out:
        machine = {
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
        }
        results = [asdict(m) for scale in sorted(by_scale) for m in by_scale[scale]]
        args.out.write_text(json.dumps({"machine": machine, "measurements": results}, indent=2))


if __name__ == "__main__":
    main()
