"""A job larger than memory, cut in shards that are planned one after another, where least is shared.

Knows: token ids, namespaces, pages, how many tokens a shard may have. Must not know: files, memory, plans, engines.
Invariant: shards are consecutive ranges of one total order, that of namespace, tokens and row number; what cutting
there costs in reuse is counted, not estimated.

Rows are never sorted all at once. A sample of them is, and between two neighbours of the sorted sample that share ``l``
tokens the order is cut before the first row that starts with the second one's first ``l + 1`` tokens. Of all places
between the two, that is one where neighbours share least, and they share exactly ``l`` tokens there, whatever rows lie
in between. One pass then finds the range of every row, and ranges still too wide are sampled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import WorkloadError
from batchllm.planner.prefix_tree import _read_only, build_prefix_tree
from batchllm.tokens import Int32Array, Int64Array, TokenTable, check_integers, common_len

_SAMPLES_PER_SHARD = 64
_WIDE_SHARE = 8
"""A range of more than this part of a shard is cut further: the last quarter of a shard then offers several cuts."""


class TokenBlock(NamedTuple):
    """Consecutive rows of a job."""

    first_row: int
    tokens: Int32Array
    """Token ids, one row after another."""
    offsets: Int64Array
    """Where each row starts in ``tokens``, and the end: int64[number of rows + 1]."""


class TokenSource(Protocol):
    """The rows of a job, wherever they are."""

    @property
    def lengths(self) -> npt.NDArray[np.integer]:
        """Tokens of every row, int[num_rows]."""

    def table(self, rows: Int64Array) -> TokenTable:
        """The tokens of these rows, in the order given."""

    def blocks(self) -> Iterator[TokenBlock]:
        """All rows in order, from the start at every call."""


@dataclass(frozen=True, slots=True)
class TableSource:
    """A table in memory as a `TokenSource`."""

    whole: TokenTable

    @property
    def lengths(self) -> Int64Array:
        return self.whole.lengths

    def table(self, rows: Int64Array) -> TokenTable:
        return TokenTable.from_lists([self.whole.row(row) for row in rows.tolist()])

    def blocks(self) -> Iterator[TokenBlock]:
        yield TokenBlock(0, self.whole.tokens, self.whole.offsets)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shards:
    """Which rows are planned together.

    Attributes:
        row_shard: Shard of each row, from 0, int32[num_rows]. No row of a shard sorts behind one of the next, by
            namespace and tokens.
        num_shards: Shards, none of them empty; 0 where there are no rows.
        num_lost_tokens: Prompt tokens computed more than once because their prefix is shared between shards: the
            optimum of the shards together, less that of the whole job.
    """

    row_shard: Int32Array
    num_shards: int
    num_lost_tokens: int


class _Cuts(NamedTuple):
    """Places in the order of the rows where it may be cut, ascending, for the kernels.

    A row lies behind a cut if it sorts behind the cut's namespace and tokens, or starts with them; where
    ``min_row`` is not negative the cut is among equal rows, and one that equals its tokens must have that number at
    least.
    """

    tokens: Int32Array
    starts: Int64Array
    lens: Int64Array
    namespaces: Int64Array
    min_row: Int64Array


def split_by_prefix(
    source: TokenSource,
    *,
    max_shard_tokens: int,
    page_size: int = 1,
    namespaces: Int64Array | None = None,
    num_samples: Int64Array | None = None,
) -> Shards:
    """Cut a job in shards of neighbours in prefix order.

    A shard ends in its last quarter, where that loses least reuse. Memory: some forty bytes a row, and a sample of
    rows with half a shard's tokens, or a few rows where these are longer. Time: usually one pass over the rows, and
    one more whenever a range came out too wide.

    Args:
        source: The rows; none may be empty.
        max_shard_tokens: Most tokens in a shard, each row counted as often as it is sampled; a row that has more
            is a shard of its own.
        page_size: Tokens of a KV page; only whole pages are shared.
        namespaces: int[num_rows]; rows of different namespaces share nothing. None: one for all.
        num_samples: Times that each row runs, at least 1, int[num_rows]. None: once each.

    Raises:
        WorkloadError: A row is empty (the message names it), a limit is below 1, or an array does not fit the rows.
    """
    lengths = source.lengths
    row_namespace = np.zeros(len(lengths), np.int64) if namespaces is None else namespaces
    _check(lengths, row_namespace, num_samples, max_shard_tokens, page_size)
    row_tokens = lengths.astype(np.int64) * (1 if num_samples is None else num_samples)
    row_range = np.zeros(len(lengths), np.int32)
    lost_before = np.zeros(min(1, len(lengths)), np.int64)
    random = np.random.default_rng(0)
    while True:
        range_tokens = np.bincount(row_range, row_tokens, len(lost_before)).astype(np.int64)
        range_rows = np.bincount(row_range, minlength=len(lost_before))
        is_wide = (range_tokens > max_shard_tokens // _WIDE_SHARE) & (range_rows > 1)
        if range_tokens.sum() <= max_shard_tokens or not is_wide.any():
            break
        num_wanted = np.where(is_wide, _SAMPLES_PER_SHARD * range_tokens / max_shard_tokens, 0)
        sample = _choose_sample(row_range, row_tokens, lengths, num_wanted, max_shard_tokens // 2, random)
        lost_before = _cut_ranges(source, sample, row_range, row_namespace, lost_before, page_size)
    first_ranges = _choose_first_ranges(range_tokens, lost_before, max_shard_tokens)
    range_shard = np.zeros(len(lost_before), np.int32)
    range_shard[first_ranges[1:]] = 1
    return Shards(
        row_shard=np.cumsum(range_shard, dtype=np.int32)[row_range],
        num_shards=len(first_ranges),
        num_lost_tokens=int(lost_before[first_ranges].sum()),
    )


def _check(
    lengths: npt.NDArray[np.integer],
    namespaces: Int64Array,
    num_samples: Int64Array | None,
    max_shard_tokens: int,
    page_size: int,
) -> None:
    for name, number in (("max_shard_tokens", max_shard_tokens), ("page_size", page_size)):
        if number < 1:
            raise WorkloadError(f"{name} must be at least 1, not {number}")
    for name, array in (("namespaces", namespaces), ("num_samples", num_samples)):
        if array is not None:
            check_integers(name, array, len(lengths))
    if num_samples is not None and (num_samples < 1).any():
        raise WorkloadError(f"row {np.flatnonzero(num_samples < 1)[0]} is to run less than once")
    if (lengths == 0).any():
        raise WorkloadError(f"row {np.flatnonzero(lengths == 0)[0]} is an empty prompt: it has no token to compute")


def _choose_sample(
    row_range: Int32Array,
    row_tokens: Int64Array,
    lengths: npt.NDArray[np.integer],
    num_wanted: npt.NDArray[np.float64],
    max_sample_tokens: int,
    random: np.random.Generator,
) -> Int64Array:
    """Rows, ascending, that stand for their ranges; two at least of each that is sampled, so that it will be cut.

    Half of a range's sample falls on its tokens and half on its rows: neither long rows among many short ones are
    missed, nor short ones beside a long one.

    Args:
        num_wanted: About how many rows of each range; 0 leaves it as it is. Fewer if they have too many tokens.
    """
    rows = np.flatnonzero(num_wanted[row_range])
    rows = rows[np.argsort(row_range[rows], kind="stable")]
    range_of = row_range[rows]
    firsts = np.flatnonzero(np.append(True, range_of[1:] != range_of[:-1]))
    lasts = np.append(firsts[1:], len(rows)) - 1
    range_tokens = np.bincount(range_of, row_tokens[rows], len(num_wanted))
    range_rows = np.bincount(range_of, minlength=len(num_wanted))
    chance = (row_tokens[rows] / range_tokens[range_of] + 1 / range_rows[range_of]) / 2 * num_wanted[range_of]
    num_tokens = float((np.minimum(chance, 1) * lengths[rows]).sum())
    chance *= min(1.0, max_sample_tokens / num_tokens)
    reached = np.cumsum(chance)
    # One place in each stretch, not at equal distances: input that repeats itself is no bad case.
    num_stretches = int(reached[-1])
    places = np.arange(num_stretches) + random.random(num_stretches)
    chosen = np.searchsorted(reached, places)
    return np.unique(rows[np.concatenate([firsts, lasts, chosen])])


def _cut_ranges(
    source: TokenSource,
    sample: Int64Array,
    row_range: Int32Array,
    row_namespace: Int64Array,
    lost_before: Int64Array,
    page_size: int,
) -> Int64Array:
    """Cut ranges between the rows sampled from them, and renumber ``row_range`` in place.

    Args:
        lost_before: Tokens lost if a shard begins with a range, int64[ranges so far].

    Returns:
        The same of the new ranges.
    """
    table = source.table(sample)
    tree = build_prefix_tree(table, row_namespace[sample])
    rows = sample[tree.order]
    lens = table.lengths[tree.order]
    # A cut is between neighbours; those of different ranges are parted already.
    second = 1 + np.flatnonzero(row_range[rows[1:]] == row_range[rows[:-1]])
    cut_range = row_range[rows[second]]
    common, second_len = tree.lcp[second].astype(np.int64), lens[second]
    cuts = _Cuts(
        tokens=_read_only(table.tokens),
        starts=table.offsets[tree.order[second]],
        lens=np.minimum(common + 1, second_len),
        namespaces=row_namespace[rows[second]].astype(np.int64),
        min_row=np.where(common == second_len, rows[second], -1),
    )
    reusable = np.minimum(common, second_len - 1)
    first_cut = np.searchsorted(cut_range, np.arange(len(lost_before) + 1))
    new_lost = np.empty(len(lost_before) + len(second), np.int64)
    new_lost[np.arange(len(lost_before)) + first_cut[:-1]] = lost_before
    new_lost[cut_range + np.arange(len(second)) + 1] = reusable - reusable % page_size
    namespaces = _read_only(row_namespace.astype(np.int64, copy=False))
    for block in source.blocks():
        _renumber(
            _read_only(block.tokens), _read_only(block.offsets), block.first_row, namespaces, row_range, first_cut, cuts
        )
    return new_lost


@njit(nogil=True)
def _renumber(
    tokens: Int32Array,
    offsets: Int64Array,
    first_row: int,
    namespaces: Int64Array,
    row_range: Int32Array,
    first_cut: Int64Array,
    cuts: _Cuts,
) -> None:
    """Number of its new range for every row of a block: its range so far, and the cuts before the row.

    Args:
        first_cut: First cut of each range so far, and behind them the number of cuts, int64[ranges so far + 1].
    """
    for i in range(len(offsets) - 1):
        row = first_row + i
        low, high = first_cut[row_range[row]], first_cut[row_range[row] + 1]
        # Where a row shares so much with the cuts on both sides, it does with any in between.
        low_common, high_common = 0, 0
        while low < high:
            middle = (low + high) // 2
            common = min(low_common, high_common)
            is_behind, common = _is_behind(
                tokens, offsets[i], offsets[i + 1], row, namespaces[row], cuts, middle, common
            )
            if is_behind:
                low, low_common = middle + 1, common
            else:
                high, high_common = middle, common
        row_range[row] += low


@njit(nogil=True)
def _is_behind(
    tokens: Int32Array, start: int, end: int, row: int, namespace: int, cuts: _Cuts, cut: int, common: int
) -> tuple[bool, int]:
    """Whether a row lies behind a cut, and the tokens that the two share, of which ``common`` are known."""
    if namespace != cuts.namespaces[cut]:
        return namespace > cuts.namespaces[cut], 0
    row_len, cut_len, cut_start = end - start, cuts.lens[cut], cuts.starts[cut]
    limit = min(row_len, cut_len) - common
    common += common_len(tokens, start + common, cuts.tokens, cut_start + common, limit)
    if common < cut_len:
        return common < row_len and tokens[start + common] > cuts.tokens[cut_start + common], common
    return row_len > cut_len or row >= cuts.min_row[cut], common


def _choose_first_ranges(range_tokens: Int64Array, lost_before: Int64Array, max_shard_tokens: int) -> Int64Array:
    """First range of every shard: as many ranges as fit, less up to a quarter of a shard where that loses less."""
    ends = np.cumsum(range_tokens)
    firsts: list[int] = []
    first, before = 0, 0
    while first < len(ends):
        firsts.append(first)
        full = int(np.searchsorted(ends, before + max_shard_tokens, side="right"))
        latest = max(first + 1, full)
        if latest == len(ends):
            break
        three_quarters = int(np.searchsorted(ends, before + max_shard_tokens - max_shard_tokens // 4))
        earliest = min(three_quarters + 1, latest)
        # The last of those that lose least: fewer shards.
        first = latest - int(np.argmin(lost_before[earliest : latest + 1][::-1]))
        before = int(ends[first - 1])
    return np.array(firsts, np.int64)
