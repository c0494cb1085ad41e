"""Workloads of token ids, deterministic in their seed. Ids are drawn from [10, 2000): every benchmark model
has them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_LOW, _HIGH = 10, 1999


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, and how many tokens each generates."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def longest_len(self) -> int:
        """KV slots of the longest prompt with its output."""
        return max(len(p) + o for p, o in zip(self.prompts, self.output_lens, strict=True))


def one_level(
    seed: int, num_groups: int = 32, group_size: int = 12, prefix_len: int = 384, private_len: int = 32
) -> Workload:
    """Groups that share one prefix each, shuffled."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_groups):
        prefix = _tokens(rng, prefix_len)
        prompts += [prefix + _tokens(rng, private_len) for _ in range(group_size)]
    return _shuffled(rng, "one level", prompts, 16, 16)


def two_level(
    seed: int,
    num_systems: int = 3,
    num_documents: int = 8,
    num_questions: int = 12,
    min_output_len: int = 8,
    max_output_len: int = 24,
) -> Workload:
    """A system prompt, documents under it, questions to each, shuffled."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_systems):
        system = _tokens(rng, 192)
        for _ in range(num_documents):
            document = system + _tokens(rng, rng.randint(128, 320))
            prompts += [document + _tokens(rng, rng.randint(16, 48)) for _ in range(num_questions)]
    return _shuffled(rng, "two levels", prompts, min_output_len, max_output_len)


def irregular(seed: int, num_prompts: int = 240, num_levels: int = 5) -> Workload:
    """Random trees of five levels: uneven branches, prompts that end inside others, exact duplicates.
    Shuffled.
    """
    rng = random.Random(seed)
    prompts: list[list[int]] = []

    def grow(prefix: list[int], level: int) -> None:
        if level == 0 or len(prompts) >= num_prompts:
            return
        for _ in range(rng.randint(1, 4)):
            node = prefix + _tokens(rng, rng.randint(1, 90))
            prompts.extend(node + _tokens(rng, rng.randint(0, 40)) for _ in range(rng.randint(0, 3)))
            grow(node, level - 1)

    while len(prompts) < num_prompts:
        grow(_tokens(rng, rng.randint(0, 60)), num_levels)
    prompts += rng.sample(prompts, num_prompts // 20)
    return _shuffled(rng, "five irregular levels", prompts, 1, 30)


def unshared(seed: int, num_prompts: int, prompt_len: int, output_len: int) -> Workload:
    """Prompts with nothing in common."""
    rng = random.Random(seed)
    prompts = [_tokens(rng, prompt_len) for _ in range(num_prompts)]
    return Workload("nothing shared", prompts, [output_len] * num_prompts)


def uneven(seed: int, num_prompts: int = 96) -> Workload:
    """Prompts of 128 to 512 tokens with nothing in common, 16 to 48 output tokens."""
    rng = random.Random(seed)
    prompts = [_tokens(rng, rng.randint(128, 512)) for _ in range(num_prompts)]
    return Workload("nothing shared", prompts, [rng.randint(16, 48) for _ in prompts])


def groups(seed: int, num_groups: int = 24, group_size: int = 8, prefix_len: int = 384) -> Workload:
    """One group after the other, each with a prefix of its own; 16 to 48 private and 16 to 48 output tokens."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_groups):
        prefix = _tokens(rng, prefix_len)
        prompts += [prefix + _tokens(rng, rng.randint(16, 48)) for _ in range(group_size)]
    return Workload("one level, grouped", prompts, [rng.randint(16, 48) for _ in prompts])


def grid(seed: int, prefix_len: int, private_len: int, group_size: int, num_requests: int) -> Workload:
    """A cell of the paper's grid, scaled by 1/8: equal groups, 12 output tokens, shuffled."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_requests // group_size):
        prefix = _tokens(rng, prefix_len)
        prompts += [prefix + _tokens(rng, private_len) for _ in range(group_size)]
    return _shuffled(rng, f"{prefix_len}/{private_len} x {group_size}", prompts, 12, 12)


def skewed(
    seed: int,
    num_groups: int = 40,
    group_size: int = 8,
    prefix_len: int = 250,
    log_median: float = 2.77,
    sigma: float = 1.0,
) -> Workload:
    """Equal groups, log-normal outputs (median 16 unless told, at most 256), shuffled."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_groups):
        prefix = _tokens(rng, prefix_len)
        prompts += [prefix + _tokens(rng, rng.randint(16, 48)) for _ in range(group_size)]
    rng.shuffle(prompts)
    output_lens = [min(256, max(1, round(rng.lognormvariate(log_median, sigma)))) for _ in prompts]
    return Workload("skewed outputs", prompts, output_lens)


def in_order(workload: Workload) -> Workload:
    """The same, sorted by prompt."""
    pairs = sorted(zip(workload.prompts, workload.output_lens, strict=True))
    return Workload(f"{workload.name}, sorted", [p for p, _ in pairs], [o for _, o in pairs])


def shuffled(workload: Workload, seed: int = 0) -> Workload:
    """The same in random order; each prompt keeps its output length."""
    pairs = list(zip(workload.prompts, workload.output_lens, strict=True))
    random.Random(seed).shuffle(pairs)
    return Workload(f"{workload.name}, shuffled", [p for p, _ in pairs], [o for _, o in pairs])


def _tokens(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(_LOW, _HIGH) for _ in range(num_tokens)]


def _shuffled(rng: random.Random, name: str, prompts: list[list[int]], low: int, high: int) -> Workload:
    rng.shuffle(prompts)
    return Workload(name, prompts, [rng.randint(low, high) for _ in prompts])
