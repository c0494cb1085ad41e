"""Which rows of a job repeat the id of an earlier one.

Knows ids and positions; not files, lines or what else is in a row. Kept are 16 hashed bytes a row, not the ids,
and no dict: ten million rows take 160 MB. A collision would refuse a good row; at 128 bits and ten million rows
its chance is below 1e-24.

INVARIANT: two rows have one id exactly where the texts of their ids are equal: ``1`` and ``"1"`` are one id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from batchllm.dataset.field_checks import show
from batchllm.dataset.records import RowKind
from batchllm.errors import RowError
from batchllm.tokens import Int64Array

_NO_ID = bytes(16)


class RowIds:
    """The ids of a job's rows, in the order of the rows."""

    __slots__ = ("_hashes",)

    def __init__(self) -> None:
        self._hashes = bytearray()

    def __len__(self) -> int:
        return len(self._hashes) // 16

    def append(self, given_id: str | int | None) -> None:
        """Adds the next row's id; None where it has none, which repeats nothing."""
        self._hashes += _NO_ID if given_id is None else xxh3_128_digest(str(given_id).encode())

    def find_duplicates(self) -> list[tuple[int, int]]:
        """Finds the rows whose id an earlier row has.

        Returns:
            ``(position, position of the first row with that id)``, ascending, positions from 0. While it runs it
            takes about 25 bytes a row beside what is kept, and more only where most rows are duplicates.
        """
        keys = np.frombuffer(self._hashes, dtype=np.uint64).reshape(-1, 2)
        # One half of each hash tells nearly all ids apart; the few rows left are then compared in full.
        suspects = _rows_with_equals(keys[:, 0])
        pairs = np.column_stack(find_repeats(keys, suspects))
        pairs = pairs[keys[pairs[:, 0]].any(axis=1)]
        return [(int(row), int(first_row)) for row, first_row in pairs[np.argsort(pairs[:, 0])]]


def find_repeats(keys: npt.NDArray[np.uint64], rows: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Those of some rows whose key an earlier one of them has, in the order of keys, and the first row of each key.

    Args:
        keys: Of all rows, 128 bits each: uint64[num_rows, 2].
        rows: Row numbers, ascending.
    """
    order = rows[np.lexsort((keys[rows, 1], keys[rows, 0]))]  # stable: rows of one key stay ascending
    is_first = np.ones(len(order), bool)
    is_first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = order[is_first][np.cumsum(is_first) - 1]
    return order[~is_first], first[~is_first]


def _rows_with_equals(keys: npt.NDArray[np.uint64]) -> Int64Array:
    """Positions, ascending, of the keys that occur more than once."""
    order = np.argsort(keys)
    in_order = keys[order]
    same_as_next = in_order[1:] == in_order[:-1]
    del in_order
    repeated = np.zeros(len(keys), dtype=np.bool_)
    repeated[1:] |= same_as_next
    repeated[:-1] |= same_as_next
    return np.sort(order[repeated])


def duplicate_error(given_id: str | int, first_line: int, kind: RowKind) -> RowError:
    """The error of a row whose id an earlier row has.

    Args:
        first_line: Line of the first row with that id.
        kind: Of the row that is refused.
    """
    return RowError(
        f"id {show(given_id)} is already used on line {first_line}; ids must be unique in a job "
        "(a row without an id has its position as id)",
        code="duplicate_id",
        param="id" if kind == "plain" else "custom_id",
    )
