"""The check refuses a layout that contradicts itself or the table, and says which row and segment is at fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from batchllm.attention import AttentionLayout, PrefixPaths, check_layout, plan_layout
from batchllm.errors import LayoutError


def _three_groups() -> tuple[AttentionLayout, np.ndarray]:
    """Segments 0 of rows 10 to 13 on [0, 20), 1 of rows 10 and 11, 2 of rows 12 and 13; row 14 alone; 30 tokens."""
    paths = PrefixPaths()
    outer = paths.add(-1, 20)
    left, right = paths.add(outer, 26), paths.add(outer, 28)
    layout = plan_layout(
        table_rows=np.arange(10, 15, dtype=np.int32),
        qo_len=np.ones(5, np.int32),
        kv_len=np.full(5, 30, np.int32),
        leaf=np.array([left, left, right, right, -1], np.int32),
        paths=paths,
    )
    table = np.arange(15 * 40, dtype=np.int32).reshape(15, 40)
    table[10:14, :20] = table[10, :20]
    table[11, 20:26] = table[10, 20:26]
    table[13, 20:28] = table[12, 20:28]
    check_layout(layout, table, is_thorough=True)
    return layout, table


def _put(field: str, index: int | tuple[int, int], value: int) -> Callable[[AttentionLayout, np.ndarray], None]:
    def corrupt(layout: AttentionLayout, table: np.ndarray) -> None:
        (table if field == "table" else getattr(layout, field))[index] = value

    return corrupt


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_put("table", (13, 0), 7), "table row 13: slot 7 at position 0, but row 10 of segment 0 has slot 400"),
        (_put("table", (11, 19), 7), "table row 11: slot 7 at position 19, but row 10 of segment 0"),
        (_put("table", (11, 20), 7), "table row 11: slot 7 at position 20, but row 10 of segment 1"),
        (_put("table", (13, 27), 7), "table row 13: slot 7 at position 27, but row 12 of segment 2"),
        (_put("segment_table_row", 2, 10), "table row 12: .* but row 10 of segment 2"),
        (_put("segment_table_row", 1, 15), "table row 15: of segment 1 is none of the table's 15"),
        (_put("table_rows", 3, 15), "table row 15: is none of the table's 15"),
        (_put("qo_indptr", 0, 1), "qo_indptr starts at 1"),
        (_put("qo_indptr", 3, 1), "table row 12: qo_indptr decreases: -1 query tokens"),
        (_put("kv_len", 4, 41), "table row 14: 41 tokens in a table of 40 positions"),
        (_put("kv_len", 4, 0), "table row 14: 1 query tokens of 0 tokens"),
        (_put("kv_len", 2, 28), "table row 12: reads by itself from position 28 on, its first query token is at 27"),
        (_put("private_start", 0, 30), "table row 10: reads by itself from position 30 on"),
        (_put("private_start", 1, 25), "table row 11: its segments end at position 26, its private part starts at 25"),
        (_put("private_start", 4, 3), "table row 14: its segments end at position 0, its private part starts at 3"),
        (_put("segment_span", (2, 0), 21), "segment 2 starts at position 21, what is before it ends at 20"),
        (_put("segment_span", (1, 0), 19), "segment 1 starts at position 19, what is before it ends at 20"),
        (_put("segment_span", (0, 0), 1), "table row 1[0-3]: segment 0 starts at position 1"),
        (_put("segment_span", (2, 1), 20), r"segment 2 spans \[20, 20\)"),
        (_put("segment_span", (2, 1), 41), r"segment 2 spans \[20, 41\) of 40 positions"),
        (_put("segment_readers", (1, 1), 2), "table row 10: segment 1 has readers 1 to 2 of 5"),
        (_put("segment_readers", (2, 1), 6), "table row 12: segment 2 has readers 3 to 6 of 5"),
        (_put("order", 0, 1), "order does not hold each of the 5 sequences once"),
    ],
)
def test_the_check_names_the_row_and_the_segment(
    corrupt: Callable[[AttentionLayout, np.ndarray], None], message: str
) -> None:
    layout, table = _three_groups()
    corrupt(layout, table)
    with pytest.raises(LayoutError, match=message):
        check_layout(layout, table)


def test_the_check_refuses_arrays_of_other_lengths() -> None:
    layout, table = _three_groups()
    with pytest.raises(LayoutError, match=r"private_start of 5 sequences has the shape \(4,\)"):
        check_layout(dataclasses.replace(layout, private_start=layout.private_start[1:]), table)


@pytest.mark.parametrize("position", [1, 10, 18])
def test_only_the_thorough_check_compares_slots_in_the_middle_of_a_segment(position: int) -> None:
    layout, table = _three_groups()
    table[12, position] = 7
    check_layout(layout, table)
    with pytest.raises(LayoutError, match=f"table row 12: slot 7 at position {position}, but row 10 of segment 0"):
        check_layout(layout, table, is_thorough=True)
