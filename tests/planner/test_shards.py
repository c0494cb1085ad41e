"""Shards are ranges of the prefix order that fit, and lose exactly the reuse they say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.offline.token_store import TokenStore
from batchllm.planner import plan_batch
from batchllm.planner.shards import Shards, TableSource, TokenBlock, split_by_prefix
from batchllm.tokens import Int64Array, TokenTable
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(50, 100))

Workload = list[tuple[list[int], int, int]]
"""Of each row its tokens, its namespace and how often it runs."""

_RUNS = [[0], [1], [0, 1, 2], [0, 1, 3], [4] * 4, [4] * 16]

prompt = st.lists(st.sampled_from(_RUNS), min_size=1, max_size=6).map(lambda runs: [t for run in runs for t in run])
workloads = st.lists(st.tuples(prompt, st.integers(-1, 1), st.integers(1, 3)), max_size=40)
page_sizes = st.sampled_from([1, 4, 16])
limits = st.sampled_from([1, 7, 40, 150, 600, 10_000])


class CountingSource(TableSource):
    """Counts how often all rows are read."""

    num_passes = 0

    def blocks(self) -> Iterator[TokenBlock]:
        CountingSource.num_passes += 1
        yield from super().blocks()


def _optimum(table: TokenTable, namespaces: Int64Array, num_samples: Int64Array, rows: Int64Array, page: int) -> int:
    runs = np.repeat(rows, num_samples[rows])
    plan = plan_batch(TableSource(table).table(runs), page_size=page, namespaces=namespaces[runs])
    return plan.optimal_prefill_tokens


def _check(
    shards: Shards, table: TokenTable, namespaces: Int64Array, num_samples: Int64Array, limit: int, page_size: int
) -> None:
    """Every promise of the module, against the planner."""
    members = [np.flatnonzero(shards.row_shard == shard) for shard in range(shards.num_shards)]
    assert sum(map(len, members)) == len(table)
    assert all(len(rows) for rows in members)
    for rows in members:
        assert len(rows) == 1 or (table.lengths * num_samples)[rows].sum() <= limit
    keys = [[(int(namespaces[row]), table.row(row).tolist()) for row in rows] for rows in members]
    for before, after in pairwise(keys):
        assert max(before) <= min(after)
    whole = _optimum(table, namespaces, num_samples, np.arange(len(table)), page_size)
    parts = sum(_optimum(table, namespaces, num_samples, rows, page_size) for rows in members)
    assert whole + shards.num_lost_tokens == parts


def _arrays(workload: Workload) -> tuple[TokenTable, Int64Array, Int64Array]:
    return (
        TokenTable.from_lists([tokens for tokens, _, _ in workload]),
        np.array([namespace for _, namespace, _ in workload], np.int64),
        np.array([num for _, _, num in workload], np.int64),
    )


@untimed
@given(workloads, limits, page_sizes)
def test_shards_fit_keep_the_order_and_lose_what_they_say(workload: Workload, limit: int, page_size: int) -> None:
    table, namespaces, num_samples = _arrays(workload)
    shards = split_by_prefix(
        TableSource(table),
        max_shard_tokens=limit,
        page_size=page_size,
        namespaces=namespaces,
        num_samples=num_samples,
    )
    _check(shards, table, namespaces, num_samples, limit, page_size)


def _trees(random: np.random.Generator, num_rows: int) -> TokenTable:
    """Rows of up to three levels that share runs of very different lengths; some are the same."""
    runs = [np.full(length, token, np.int32) for token, length in enumerate([1, 2, 30, 300, 2000])]
    heads = [np.concatenate([runs[r] for r in random.integers(0, 5, 4)]) for _ in range(12)]
    return TokenTable.from_lists(
        [
            np.concatenate([heads[h], random.integers(0, 3, tail, dtype=np.int32)])
            for h, tail in zip(random.integers(0, 12, num_rows), random.integers(0, 9, num_rows), strict=True)
        ]
    )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_shards", [2, 9, 60])
def test_large_trees_are_cut_exactly(num_shards: int, page_size: int) -> None:
    random = np.random.default_rng(num_shards)
    table = _trees(random, 2000)
    namespaces, num_samples = random.integers(0, 2, 2000), random.integers(1, 4, 2000)
    limit = int((table.lengths * num_samples).sum()) // num_shards
    shards = split_by_prefix(
        TableSource(table),
        max_shard_tokens=limit,
        page_size=page_size,
        namespaces=namespaces,
        num_samples=num_samples,
    )
    assert num_shards <= shards.num_shards <= 1 + num_shards * 4 / 3
    _check(shards, table, namespaces, num_samples, limit, page_size)


@pytest.mark.parametrize("max_memory_bytes", [1 << 30, 1 << 20])
def test_a_store_is_cut_as_a_table_is(max_memory_bytes: int) -> None:
    """In memory or in its file, which is read in several blocks."""
    table = _trees(np.random.default_rng(5), 4000)
    store = TokenStore(None, max_memory_bytes)
    store.extend(table.tokens, table.lengths)
    assert store.is_spilled == (max_memory_bytes < table.tokens.nbytes)
    assert len(list(store.blocks())) > (1 if store.is_spilled else 0)
    limit = table.num_tokens // 7
    of_table = split_by_prefix(TableSource(table), max_shard_tokens=limit)
    of_store = split_by_prefix(store, max_shard_tokens=limit)
    assert of_store.row_shard.tolist() == of_table.row_shard.tolist()
    assert of_store.num_lost_tokens == of_table.num_lost_tokens
    store.close()


@pytest.mark.parametrize("num_shards", [5, 8, 11, 13])
def test_groups_that_fit_are_not_torn_apart(num_shards: int) -> None:
    """A hundred documents of 50 questions each, some more than fit: a shard ends with a document, not full."""
    random = np.random.default_rng(0)
    documents = [np.append(np.int32(i), random.integers(0, 1000, 199, dtype=np.int32)) for i in range(100)]
    rows = [np.concatenate([documents[i % 100], random.integers(0, 1000, 5, dtype=np.int32)]) for i in range(5000)]
    table = TokenTable.from_lists(rows)
    shards = split_by_prefix(TableSource(table), max_shard_tokens=table.num_tokens // num_shards)
    assert shards.num_lost_tokens == 0
    assert all(len(set(shards.row_shard[document::100].tolist())) == 1 for document in range(100))


def test_a_group_that_does_not_fit_costs_its_prefix_once_a_shard() -> None:
    """All rows share 1000 tokens and differ in the next: a cut costs those, in whole pages."""
    table = TokenTable.from_lists([[7] * 1000 + [i] for i in range(500)])
    shards = split_by_prefix(TableSource(table), max_shard_tokens=100_000, page_size=16)
    assert shards.num_shards > 5
    assert shards.num_lost_tokens == (shards.num_shards - 1) * 992


def test_equal_rows_that_do_not_fit_together_are_parted_by_their_number() -> None:
    table = TokenTable.from_lists([[1] * 10] * 1000)
    shards = split_by_prefix(TableSource(table), max_shard_tokens=1000)
    assert (np.diff(shards.row_shard) >= 0).all()
    assert shards.num_lost_tokens == (shards.num_shards - 1) * 9


def test_a_row_larger_than_a_shard_is_alone_in_one() -> None:
    table = TokenTable.from_lists([[5] * 10] * 20 + [[5] * 1000] + [[6] * 10] * 20)
    shards = split_by_prefix(TableSource(table), max_shard_tokens=100)
    assert np.count_nonzero(shards.row_shard == shards.row_shard[20]) == 1
    assert np.bincount(np.delete(shards.row_shard, 20)).max() <= 10


def test_few_passes_are_enough() -> None:
    """One where rows are alike, and some more where nearly all tokens are in one of many rows."""
    random = np.random.default_rng(0)
    alike = TokenTable.from_lists(list(random.integers(0, 9, (50_000, 8), dtype=np.int32)))
    CountingSource.num_passes = 0
    split_by_prefix(CountingSource(alike), max_shard_tokens=alike.num_tokens // 8)
    assert CountingSource.num_passes == 1
    heavy = TokenTable.from_lists([*random.integers(0, 9, (50_000, 8), dtype=np.int32), np.full(10**7, 4, np.int32)])
    CountingSource.num_passes = 0
    split_by_prefix(CountingSource(heavy), max_shard_tokens=500_000)
    assert CountingSource.num_passes <= 5


def test_a_job_that_fits_is_one_shard_and_is_not_read() -> None:
    table = TokenTable.from_lists([[1, 2], [3], [1, 2]])
    CountingSource.num_passes = 0
    shards = split_by_prefix(CountingSource(table), max_shard_tokens=5)
    assert (shards.row_shard.tolist(), shards.num_shards, shards.num_lost_tokens) == ([0, 0, 0], 1, 0)
    assert CountingSource.num_passes == 0


def test_no_rows_are_no_shards() -> None:
    shards = split_by_prefix(TableSource(TokenTable.from_lists([])), max_shard_tokens=5)
    assert (len(shards.row_shard), shards.num_shards, shards.num_lost_tokens) == (0, 0, 0)


def test_the_same_rows_are_cut_in_the_same_way() -> None:
    table = _trees(np.random.default_rng(1), 500)
    first, second = (split_by_prefix(TableSource(table), max_shard_tokens=table.num_tokens // 5) for _ in range(2))
    assert first.row_shard.tolist() == second.row_shard.tolist()


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    source = TableSource(TokenTable.from_lists([[1], [], [2]]))
    with pytest.raises(WorkloadError, match="row 1 is an empty prompt"):
        split_by_prefix(source, max_shard_tokens=1)
    source = TableSource(TokenTable.from_lists([[1], [2]]))
    with pytest.raises(WorkloadError, match="max_shard_tokens must be at least 1, not 0"):
        split_by_prefix(source, max_shard_tokens=0)
    with pytest.raises(WorkloadError, match="page_size must be at least 1, not 0"):
        split_by_prefix(source, max_shard_tokens=1, page_size=0)
    with pytest.raises(WorkloadError, match="namespaces must be 2 integers"):
        split_by_prefix(source, max_shard_tokens=1, namespaces=np.zeros(3, np.int64))
    with pytest.raises(WorkloadError, match="row 1 is to run less than once"):
        split_by_prefix(source, max_shard_tokens=1, num_samples=np.array([1, 0]))
