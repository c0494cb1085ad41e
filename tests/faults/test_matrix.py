"""The matrix of faults has no hole, and says where each cell is held."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.matrix import ABSENT, CELLS, HOLDERS, holders_of, table

ROOT = Path(__file__).parents[2]


def test_every_cell_is_held_or_makes_no_sense_and_never_both() -> None:
    assert len(CELLS) == 96
    assert {cell for cell in CELLS if holders_of(cell)} | set(ABSENT) == set(CELLS)
    assert not [cell for cell in ABSENT if holders_of(cell)]


@pytest.mark.parametrize("test", HOLDERS)
def test_a_test_that_holds_cells_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()


def test_the_table_says_what_is_held() -> None:
    assert (ROOT / "docs" / "faults.md").read_text() == table()
