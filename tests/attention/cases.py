"""Random steps for the tests of every attention backend: KV by slot, the request-to-token table, a planned layout.

Slots that no sequence may read hold `POISON`, and unused positions of the table hold slots of others: what reads
beyond its part is far off. Masked reads are harmless, for the values are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from batchllm.attention import AttentionLayout, PrefixPaths, plan_layout
from batchllm.attention.base import LayerShape

Mode = Literal["decode", "extend", "mixed"]
POISON = 1000.0


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A step.

    Attributes:
        q: [num_query_tokens, num_heads, head_dim].
        k_cache: [num_slots, num_kv_heads, head_dim]; KV of the step's own tokens is in it already.
        v_cache: As ``k_cache``.
        table: int32[rows, positions], on the device of the tensors.
        layout: Planned from the prefixes that the sequences share.
        scale: What query-key products are multiplied with.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor
    layout: AttentionLayout
    scale: float

    def shape(self, **scores: Any) -> LayerShape:
        """What a backend is made for; ``scores`` are its ``logit_cap`` and ``window``."""
        (_, num_heads, head_dim), num_kv_heads = self.q.shape, self.k_cache.shape[1]
        return LayerShape(num_heads, num_kv_heads, head_dim, self.q.dtype, self.scale, **scores)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Lengths, prefixes and slots of a step: [S] arrays, and the table."""

    table_rows: np.ndarray
    qo_len: np.ndarray
    kv_len: np.ndarray
    leaf: np.ndarray
    table: np.ndarray
    used_slots: np.ndarray
    num_slots: int


def make_case(
    seed: int,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    mode: Mode = "decode",
    page_size: int = 1,
    num_levels: int = 1,
    num_sequences: int = 9,
    num_roots: int = 1,
    fanout: int = 2,
    max_level_len: int = 48,
    max_private_len: int = 40,
    max_extend_len: int = 24,
    share_alone: float = 0.0,
    share_not_cached: float = 0.0,
    min_segment_len: int = 1,
    device: str = "cpu",
) -> Case:
    """Draw a step.

    Args:
        seed: Same seed, same step.
        num_heads: Query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: Heads of the caches.
        head_dim: Of queries, keys and values.
        dtype: Of queries and caches.
        mode: One query token a sequence, several, or half of the sequences each.
        page_size: Prefixes are whole pages; slots of a page are neighbours.
        num_levels: Prefixes, one inside the other, that a sequence shares.
        num_sequences: Sequences in the step.
        num_roots: Outermost prefixes.
        fanout: Prefixes that extend a prefix; with more leaves than sequences many have one reader.
        max_level_len: Tokens of a prefix beyond those of its parent, at most (one page at least).
        max_private_len: Cached tokens of a sequence behind its prefixes, at most; 0: the step's tokens follow at once.
        max_extend_len: Query tokens of a sequence that does not decode, at most.
        share_alone: Share of the sequences that have no prefix.
        share_not_cached: Share of the sequences that are to compute some of their prefixes in this step; they have
            more than ``max_extend_len`` query tokens.
        min_segment_len: As of `plan_layout`.
        device: Of the tensors.
    """
    random = np.random.default_rng(seed)
    paths, leaves = _draw_paths(random, num_levels, num_roots, fanout, max_level_len, page_size)
    leaf = (
        random.choice(np.array(leaves, np.int32), num_sequences) if num_levels else np.full(num_sequences, -1, np.int32)
    )
    leaf[random.random(num_sequences) < share_alone] = -1
    qo_len = random.integers(1, max_extend_len + 1, num_sequences)
    if mode == "decode":
        qo_len[:] = 1
    elif mode == "mixed":
        qo_len[random.permutation(num_sequences)[: num_sequences // 2]] = 1
    prefix_len = np.where(leaf >= 0, np.array([path[-1][1] for path in paths.values()] + [0])[leaf], 0)
    kv_len = prefix_len + random.integers(0, max_private_len + 1, num_sequences) + qo_len
    is_computing = (random.random(num_sequences) < share_not_cached) & (prefix_len > 0)
    num_missing = random.integers(1, np.maximum(prefix_len, 1) + 1)
    qo_len = np.where(is_computing, kv_len - prefix_len + num_missing, qo_len)
    batch = _draw_slots(random, leaf, qo_len, kv_len, paths, page_size)
    layout = _plan(batch, paths, min_segment_len)
    return _fill(seed, batch, layout, num_heads, num_kv_heads, head_dim, dtype, device)


def _draw_paths(
    random: np.random.Generator, num_levels: int, num_roots: int, fanout: int, max_level_len: int, page_size: int
) -> tuple[dict[int, list[tuple[int, int]]], list[int]]:
    """Every prefix with its path, (id, end) outermost first, and those of the innermost level."""
    paths: dict[int, list[tuple[int, int]]] = {}
    level: list[int] = [-1]
    for depth in range(num_levels):
        inner = []
        for parent in level:
            for _ in range(fanout if depth else num_roots):
                above = paths.get(parent, [])
                num_pages = int(random.integers(1, max(2, max_level_len // page_size + 1)))
                prefix = len(paths)
                paths[prefix] = [*above, (prefix, (above[-1][1] if above else 0) + num_pages * page_size)]
                inner.append(prefix)
        level = inner
    return paths, level


def _draw_slots(
    random: np.random.Generator,
    leaf: np.ndarray,
    qo_len: np.ndarray,
    kv_len: np.ndarray,
    paths: dict[int, list[tuple[int, int]]],
    page_size: int,
) -> _Batch:
    """Pages in random order, page 0 free; sequences of a prefix have its slots, and each its own behind."""
    num_sequences, num_rows = len(leaf), len(leaf) + 3
    num_pages = 1 + sum(path[-1][1] for path in paths.values()) // page_size + int(np.sum(kv_len // page_size + 1)) + 5
    free = iter((random.permutation(num_pages - 1) + 1).tolist())

    def take(num_tokens: int) -> np.ndarray:
        pages = np.array([next(free) for _ in range(-(-num_tokens // page_size))], np.int64)
        return (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)[:num_tokens]

    slots_of = {}
    for prefix, path in paths.items():
        start, end = (path[-2][1] if len(path) > 1 else 0), path[-1][1]
        slots_of[prefix] = take(end - start)
    table_rows = random.permutation(num_rows)[:num_sequences].astype(np.int32)
    table = random.integers(0, num_pages * page_size, (num_rows, int(kv_len.max()) + 3)).astype(np.int32)
    used = []
    for s, row in enumerate(table_rows):
        slots = [slots_of[prefix] for prefix, _ in paths.get(int(leaf[s]), [])]
        slots.append(take(int(kv_len[s]) - sum(map(len, slots))))
        table[row, : kv_len[s]] = np.concatenate(slots)
        used.append(table[row, : kv_len[s]])
    return _Batch(
        table_rows=table_rows,
        qo_len=qo_len.astype(np.int32),
        kv_len=kv_len.astype(np.int32),
        leaf=leaf,
        table=table,
        used_slots=np.unique(np.concatenate(used)),
        num_slots=num_pages * page_size,
    )


def _plan(batch: _Batch, paths: dict[int, list[tuple[int, int]]], min_segment_len: int) -> AttentionLayout:
    planned = PrefixPaths()
    for prefix, path in paths.items():
        assert planned.add(path[-2][0] if len(path) > 1 else -1, path[-1][1]) == prefix
    return plan_layout(
        table_rows=batch.table_rows,
        qo_len=batch.qo_len,
        kv_len=batch.kv_len,
        leaf=batch.leaf,
        paths=planned,
        min_segment_len=min_segment_len,
    )


def _fill(
    seed: int,
    batch: _Batch,
    layout: AttentionLayout,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
) -> Case:
    random = torch.Generator().manual_seed(seed)
    used = torch.from_numpy(batch.used_slots)
    caches = []
    for _ in range(2):
        cache = torch.full((batch.num_slots, num_kv_heads, head_dim), POISON)
        cache[used.long()] = torch.randn(len(used), num_kv_heads, head_dim, generator=random)
        caches.append(cache.to(device, dtype))
    q = torch.randn(int(layout.qo_indptr[-1]), num_heads, head_dim, generator=random)
    return Case(
        q=q.to(device, dtype),
        k_cache=caches[0],
        v_cache=caches[1],
        table=torch.from_numpy(batch.table).to(device),
        layout=layout,
        scale=head_dim**-0.5,
    )


CASES: dict[str, dict[str, Any]] = {
    "decode, no prefix": {"num_levels": 0},
    "decode, one group": {"num_sequences": 7},
    "decode, many readers of one prefix": {"num_sequences": 70, "max_level_len": 150},
    "decode, three nested levels": {"num_levels": 3, "num_sequences": 20},
    "decode, many groups of two levels": {"num_levels": 2, "num_roots": 6, "num_sequences": 33},
    "decode, pages of 16": {"num_levels": 2, "page_size": 16, "num_sequences": 12},
    "decode, prefixes of one token": {"num_levels": 3, "max_level_len": 1, "num_sequences": 12},
    "decode, the prompt is the prefix": {"num_levels": 2, "max_private_len": 0},
    "decode, the prompt is the prefix, pages of 16": {"num_levels": 2, "max_private_len": 0, "page_size": 16},
    "decode, groups of one": {"num_levels": 2, "num_roots": 30, "num_sequences": 6},
    "decode, half without prefix": {"num_levels": 2, "share_alone": 0.5, "num_sequences": 14},
    "decode, one sequence": {"num_levels": 2, "num_sequences": 1},
    "decode, short segments merged": {"num_levels": 3, "min_segment_len": 20, "num_sequences": 20},
    "decode, long": {"num_levels": 2, "num_sequences": 5, "max_level_len": 900, "max_private_len": 700},
    "extend, no prefix": {"mode": "extend", "num_levels": 0},
    "extend, one group": {"mode": "extend"},
    "extend, three nested levels": {"mode": "extend", "num_levels": 3, "num_sequences": 16},
    "extend, pages of 16": {"mode": "extend", "num_levels": 2, "page_size": 16},
    "extend, right behind the prefix": {"mode": "extend", "num_levels": 2, "max_private_len": 0},
    "extend, some prefixes not in the cache yet": {"mode": "extend", "num_levels": 3, "share_not_cached": 0.4},
    "extend, long chunks": {"mode": "extend", "num_sequences": 4, "max_extend_len": 300, "max_level_len": 200},
    "mixed, one group": {"mode": "mixed", "num_sequences": 12},
    "mixed, three nested levels": {"mode": "mixed", "num_levels": 3, "num_sequences": 24, "num_roots": 2},
    "mixed, all at once": {
        "mode": "mixed",
        "num_levels": 3,
        "num_sequences": 31,
        "page_size": 16,
        "share_alone": 0.2,
        "share_not_cached": 0.2,
        "min_segment_len": 17,
    },
}
"""Arguments of `make_case` by name; heads, head_dim and dtype are the test's choice."""
