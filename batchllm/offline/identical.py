"""Rows that must have the same answer: run once, answered all.

The same prompt is not enough: only where the answer is a function of the row, greedy or seeded and one sample, is one
row's answer the other's by definition.

Knows columns of rows; not requests, files or engines.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import xxhash

from batchllm.dataset.row_ids import find_repeats
from batchllm.request import SamplingParams
from batchllm.tokens import Int64Array

_HASH_BYTES = 16


def is_determined(sampling: SamplingParams) -> bool:
    """The answer is a function of the prompt and these parameters."""
    return sampling.n == 1 and (is_greedy(sampling) or sampling.seed is not None)


def is_greedy(sampling: SamplingParams) -> bool:
    """The most likely token is taken every time."""
    return sampling.temperature == 0.0 or sampling.top_k == 1


class IdenticalRows:
    """A hash of 128 bits for each row, and who is whose double.

    At that length the chance that ten million rows have two alike by accident is below 1e-24.

    Attributes:
        is_follower: Rows that need not run, once `find` has looked. Shape ``[num_rows]``.
    """

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._followers: Int64Array = np.zeros(0, np.int64)
        self._leaders: Int64Array = np.zeros(0, np.int64)
        self.is_follower: npt.NDArray[np.bool_] = np.zeros(0, bool)

    def append(self, ids: bytes, *numbers: int) -> None:
        """The next row, which is determined by its token ids and these numbers."""
        self._hashes += xxhash.xxh3_128_digest(struct.pack(f"<{len(numbers)}q", *numbers) + ids)

    def append_single(self) -> None:
        """The next row, which is like no other."""
        self._hashes += struct.pack("<qq", -1, len(self._hashes) // _HASH_BYTES)

    def find(self, rows: Int64Array) -> None:
        """All rows have been appended; look among these, ascending."""
        words = np.frombuffer(self._hashes, np.uint64).reshape(-1, 2)
        followers, leaders = find_repeats(words, rows)
        self.is_follower = np.zeros(len(words), bool)
        self.is_follower[followers] = True
        by_leader = np.argsort(leaders, kind="stable")
        self._followers, self._leaders = followers[by_leader], leaders[by_leader]

    def followers(self, row: int) -> list[int]:
        """Rows that get the answer of this one too, ascending."""
        first, last = np.searchsorted(self._leaders, [row, row + 1])
        numbers: list[int] = self._followers[first:last].tolist()
        return numbers
