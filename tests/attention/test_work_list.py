"""The tiles of a step are the step: nothing is read twice, nothing is left out, every partial result has its slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchllm.attention.pieces import sum_of_enclosing
from batchllm.attention.work_list import TileShape, build_work_list
from tests.attention.cases import CASES, make_case

_SHAPES = [
    TileShape(rows_wide=8, rows_narrow=4, block_n=16, min_split=16, min_split_wide=32, target_tiles=50),
    TileShape(rows_wide=16, rows_narrow=1, block_n=16, min_split=16, min_split_wide=16, target_tiles=1000),
    TileShape(rows_wide=64, rows_narrow=16, block_n=64, min_split=1 << 20, min_split_wide=1 << 20, target_tiles=1),
]


def _case(seed: int, **options: Any) -> Any:
    return make_case(seed, num_heads=1, num_kv_heads=1, head_dim=1, **options)


@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_reads_each_of_its_positions_once(name: str, shape: TileShape, seed: int) -> None:
    """Through slots of its own row of the table, or of one that has the same; and in slots that no other tile has."""
    case = _case(seed, **CASES[name])
    layout, table = case.layout, case.table.numpy()
    work = build_work_list(layout, shape, num_kv_heads=2)
    num_tokens = int(layout.qo_indptr[-1])
    sequence = np.repeat(np.arange(len(layout.kv_len)), np.diff(layout.qo_indptr))
    position = np.arange(num_tokens) - layout.qo_indptr[sequence + 1] + layout.kv_len[sequence]
    assert (np.sort(work.q_rows) == np.arange(num_tokens)).all()
    assert (work.q_pos == position[work.q_rows]).all()
    reads = np.zeros((num_tokens, table.shape[1]), int)
    written = np.zeros(work.num_slots, int)
    for first_row, num_rows, table_row, start, end, offset, *_ in work.tiles.tolist():
        assert start < end
        for row in range(first_row, first_row + num_rows):
            token, last = work.q_rows[row], min(end, work.q_pos[row] + 1)
            reads[token, start:last] += 1
            own_row = layout.table_rows[sequence[token]]
            assert (table[own_row, start:last] == table[table_row, start:last]).all()
            slot = work.slot_indptr[row] + offset
            assert slot < work.slot_indptr[row + 1]
            written[slot] += 1
    assert (reads == (np.arange(table.shape[1])[None, :] <= position[:, None])).all()
    assert (written == 1).all()


@pytest.mark.parametrize("name", CASES)
def test_a_segment_is_read_once_for_as_many_readers_as_a_tile_has_room_for(name: str) -> None:
    """With room for all, every segment's KV is in tiles exactly once, and all private KV too."""
    case = _case(1, **{**CASES[name], "mode": "decode", "share_not_cached": 0.0})
    layout = case.layout
    work = build_work_list(layout, TileShape(1000, 16, 16, 32, 32, 100), num_kv_heads=1)
    wanted = int(np.diff(layout.segment_span, axis=1).sum() + (layout.kv_len - layout.private_start).sum())
    assert int((work.tiles[:, 4] - work.tiles[:, 3]).sum()) == wanted


def test_wide_tiles_come_first_and_long_ones_before_short() -> None:
    work = build_work_list(_case(1, **CASES["mixed, all at once"]).layout, _SHAPES[0], 1)
    assert 0 < work.num_wide < len(work.tiles)
    is_wide = work.tiles[:, 1] > _SHAPES[0].rows_narrow
    assert is_wide[: work.num_wide].all() and not is_wide[work.num_wide :].any()
    for part in (work.tiles[: work.num_wide], work.tiles[work.num_wide :]):
        assert (np.diff(part[:, 4] - part[:, 3]) <= 0).all()


@pytest.mark.parametrize("group", [1, 4, 8, 16, 64])
def test_whoever_reads_the_same_kv_reads_it_side_by_side(group: int) -> None:
    """64 readers of 16,000 tokens, with as many query heads for each KV head: a row block holds 64 rows of heads, so
    several read each range. They are neighbours, between which no other range comes: memory is read once for all."""
    case = _case(1, num_levels=1, num_sequences=64, max_level_len=16_000, max_private_len=40)
    num_narrow = max(1, 16 // group)
    shape = TileShape(max(1, 64 // group), num_narrow, block_n=32, min_split=256, min_split_wide=256, target_tiles=264)
    tiles = build_work_list(case.layout, shape, num_kv_heads=8).tiles
    ranges = [tuple(each) for each in tiles[:, 2:5].tolist()]
    (shared_len,) = np.diff(case.layout.segment_span, axis=1)[0]
    assert len(ranges) > len(set(ranges)) or group == 1
    assert len(set(ranges)) == sum(a != b for a, b in zip(ranges, [(), *ranges], strict=False))
    assert sum(end - start for _, start, end in set(ranges) if end <= shared_len) == shared_len


def test_ranges_are_cut_until_there_is_something_for_all() -> None:
    """One long prefix, few readers: as many tiles as were asked for, of nearly the same length."""
    case = _case(3, num_levels=1, num_sequences=8, max_level_len=20_000, max_private_len=0)
    shape = TileShape(rows_wide=16, rows_narrow=4, block_n=16, min_split=16, min_split_wide=64, target_tiles=200)
    work = build_work_list(case.layout, shape, num_kv_heads=4)
    assert 0.8 * 200 <= 4 * work.num_wide <= 1.2 * 200
    lengths = work.tiles[: work.num_wide, 4] - work.tiles[: work.num_wide, 3]
    assert lengths[:-1].min() == lengths.max()


def test_less_room_for_partial_results_means_fewer_splits() -> None:
    layout = _case(4, **CASES["decode, long"]).layout
    wanted = build_work_list(layout, _SHAPES[1], 1).num_slots
    least = len(layout.kv_len) + int(np.diff(layout.segment_readers, axis=1).sum())
    for room in (wanted - 1, least):
        assert build_work_list(layout, _SHAPES[1], 1, max_slots=room).num_slots <= room
    with pytest.raises(ValueError, match=f"there is room for {least - 1}"):
        build_work_list(layout, _SHAPES[1], 1, max_slots=least - 1)


@pytest.mark.parametrize("seed", range(10))
def test_sums_over_what_encloses(seed: int) -> None:
    layout = _case(seed, num_levels=3, num_roots=3, num_sequences=30, share_alone=0.2).layout
    values = np.random.default_rng(seed).integers(0, 9, len(layout.segment_readers))
    first, last = layout.segment_readers.T
    start = layout.segment_span[:, 0]
    of_segments, of_sequences = sum_of_enclosing(layout, values)
    for g in range(len(values)):
        encloses = (first <= first[g]) & (last >= last[g]) & (start < start[g])
        assert of_segments[g] == values[encloses].sum()
    for s in range(len(layout.order)):
        assert of_sequences[s] == values[(first <= s) & (s < last)].sum()
