"""A number for each of millions of rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class Column:
    """A number per row; while all are the same it costs nothing, however many rows there are.

    Args:
        dtype: Type of the numbers, a signed integer of numpy.
    """

    def __init__(self, dtype: type[np.signedinteger[Any]]) -> None:
        self._dtype = dtype
        self._same = 0
        self._len = 0
        self._array: array[int] | None = None

    def append(self, value: int) -> None:
        """The number of the next row."""
        self.extend([value])

    def extend(self, values: Sequence[int]) -> None:
        """The numbers of the next rows."""
        if self._array is not None:
            self._array.extend(values)
            return
        if self._len == 0 and values:
            self._same = values[0]
        if values.count(self._same) == len(values):
            self._len += len(values)
            return
        self._array = array(np.dtype(self._dtype).char, [self._same]) * self._len
        self._array.extend(values)

    def __len__(self) -> int:
        return self._len if self._array is None else len(self._array)

    def __getitem__(self, row: int) -> int:
        return self._same if self._array is None else self._array[row]

    @property
    def same(self) -> int | None:
        """The number of all rows; None where they differ."""
        return self._same if self._array is None else None

    @property
    def values(self) -> npt.NDArray[Any]:
        """Not to be written to. Shape ``[num_rows]``."""
        if self._array is None:
            return np.broadcast_to(self._dtype(self._same), self._len)
        return np.frombuffer(self._array, self._dtype)
