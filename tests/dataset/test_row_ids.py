"""Duplicate ids: what a dict would find, from sixteen bytes a row."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import RowIds, duplicate_error
from batchllm.dataset.records import RowKind
from tests.sizes import sized

Id = str | int | None

few_ids: st.SearchStrategy[Id] = st.none() | st.integers(-3, 12) | st.sampled_from(["", "0", "1", "-1", "a", "b", "é"])
any_ids: st.SearchStrategy[Id] = st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(codec="utf-8"))


def duplicates_of(ids: list[Id]) -> list[tuple[int, int]]:
    """What a dict finds."""
    first_of: dict[str, int] = {}
    found = []
    for row, given_id in enumerate(ids):
        if given_id is not None and (first := first_of.setdefault(str(given_id), row)) != row:
            found.append((row, first))
    return found


def ids_of(given_ids: list[Id]) -> RowIds:
    row_ids = RowIds()
    for given_id in given_ids:
        row_ids.append(given_id)
    return row_ids


@settings(max_examples=sized(150, 500), deadline=None)
@given(st.lists(few_ids, max_size=60) | st.lists(any_ids, max_size=20))
def test_finds_what_a_dict_finds_in_the_order_of_the_rows(ids: list[Id]) -> None:
    row_ids = ids_of(ids)
    assert len(row_ids) == len(ids)
    assert row_ids.find_duplicates() == duplicates_of(ids)


def test_more_rows_may_follow_and_are_compared_with_all() -> None:
    row_ids = ids_of(["a", "b"])
    assert row_ids.find_duplicates() == []
    row_ids.append("a")
    assert row_ids.find_duplicates() == [(2, 0)]


def test_a_row_costs_little_memory_kept_and_looked_through() -> None:
    num_rows = 100_000
    tracemalloc.start()
    try:
        row_ids = ids_of([])
        for row in range(num_rows):
            row_ids.append(f"a-rather-long-identifier-of-row-{row % (num_rows - 10)}")
        kept, _ = tracemalloc.get_traced_memory()
        found = row_ids.find_duplicates()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 10
    assert kept <= 20 * num_rows
    assert peak <= 50 * num_rows


@pytest.mark.parametrize(("kind", "param"), [("plain", "id"), ("chat", "custom_id"), ("completions", "custom_id")])
def test_the_error_names_the_id_its_field_and_the_first_line(kind: RowKind, param: str) -> None:
    error = duplicate_error("a", 7, kind)
    assert (error.code, error.param) == ("duplicate_id", param)
    assert "'a'" in error.message and "line 7" in error.message and "position" in error.message
