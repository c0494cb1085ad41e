"""Rows come back as they went in, bad tables are refused by name, hashes mean content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.tokens import TokenTable, lcp, page_floor

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None)

rows_of_tokens = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=40), max_size=12)


@untimed
@given(rows_of_tokens)
def test_rows_come_back_as_they_went_in(rows: list[list[int]]) -> None:
    table = TokenTable.from_lists(rows)
    assert [table.row(i).tolist() for i in range(len(table))] == rows
    assert table.lengths.tolist() == [len(row) for row in rows]
    assert table.num_tokens == sum(len(row) for row in rows)
    arrays = TokenTable.from_lists([np.array(row, dtype=np.int32) for row in rows])
    assert arrays.content_hash() == table.content_hash()
    assert table.nbytes == 4 * table.num_tokens + 8 * (len(rows) + 1)


def test_a_row_is_a_view() -> None:
    table = TokenTable.from_lists([[1, 2], [3]])
    assert np.shares_memory(table.row(1), table.tokens)


@pytest.mark.parametrize("i", [-1, 2])
def test_a_row_that_does_not_exist_is_an_index_error(i: int) -> None:
    with pytest.raises(IndexError, match=f"row {i} of a table of 2"):
        TokenTable.from_lists([[1], [2]]).row(i)


@untimed
@given(st.lists(st.integers(0, 1), max_size=50), st.lists(st.integers(0, 1), max_size=50))
def test_lcp_is_the_number_of_leading_tokens_two_rows_share(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if expected is None:
        expected = min(len(a), len(b))
    assert lcp(np.array(a, np.int32), np.array(b, np.int32)) == expected


def test_lcp_finds_every_place_of_a_difference_in_long_rows() -> None:
    row = np.arange(100, dtype=np.int32)
    for place in range(100):
        other = row.copy()
        other[place] = 1000
        assert lcp(row, other) == place
    assert lcp(row, row[:77]) == 77


@untimed
@given(st.integers(0, 1000), st.integers(1, 64))
def test_page_floor_is_the_most_whole_pages(num_tokens: int, page_size: int) -> None:
    floored = page_floor(num_tokens, page_size)
    assert floored % page_size == 0
    assert 0 <= num_tokens - floored < page_size


@pytest.mark.parametrize(
    ("tokens", "offsets", "message"),
    [
        (np.zeros(2, np.int64), np.array([0, 2]), "TokenTable.tokens must be a contiguous int32"),
        (np.zeros((1, 2), np.int32), np.array([0, 2]), "TokenTable.tokens must be"),
        (np.zeros(4, np.int32)[::2], np.array([0, 2]), "TokenTable.tokens must be a contiguous"),
        (np.zeros(2, np.int32), np.array([0, 2], np.int32), "TokenTable.offsets must be"),
        (np.zeros(2, np.int32), np.array([], np.int64), "run from 0 to the 2 tokens"),
        (np.zeros(2, np.int32), np.array([1, 2]), "run from 0 to the 2 tokens"),
        (np.zeros(2, np.int32), np.array([0, 3]), "run from 0 to the 2 tokens"),
        (np.zeros(3, np.int32), np.array([0, 2, 1, 3]), "offsets decrease after row 1"),
        (
            np.array([1, 2, -7], np.int32),
            np.array([0, 2, 2, 3]),
            "row 2 has a negative token id, -7",
        ),
    ],
)
def test_arrays_that_are_no_table_are_refused(tokens: np.ndarray, offsets: np.ndarray, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        TokenTable(tokens=tokens, offsets=offsets)


def test_a_token_id_that_does_not_fit_names_its_row() -> None:
    with pytest.raises(WorkloadError, match="row 1 has a token id outside"):
        TokenTable.from_lists([[1], [2, 2**31]])


def test_the_content_hash_is_the_same_in_every_release() -> None:
    """A hash written in a journal last year still names the same prompts."""
    assert TokenTable.from_lists([[1, 2, 3], [], [4]]).content_hash() == "84d8aebb49616252cd39f1e7c15377f4"


def test_the_content_hash_depends_on_tokens_and_on_where_rows_end() -> None:
    hashes = {
        TokenTable.from_lists(rows).content_hash()
        for rows in ([], [[]], [[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]])
    }
    assert len(hashes) == 6
