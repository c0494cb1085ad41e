"""The prompts of a job as one flat buffer of token ids, and the arithmetic of runs of tokens.

Knows: token ids, where each prompt starts, how many leading tokens two runs share, what a page is.
Must not know: text, tokenizers, files, plans, engines.
Invariant: row ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``; ids are never negative; nothing here
copies the buffer or changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import WorkloadError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@njit(nogil=True, error_model="numpy")
def common_len(a: Int32Array, a_start: int, b: Int32Array, b_start: int, limit: int) -> np.int64:
    """How many leading tokens of ``a[a_start:][:limit]`` and ``b[b_start:][:limit]`` agree.

    A numba kernel for other kernels. No bounds check: both runs must be at least ``limit`` long.

    NOTE: numba inlines this into its callers and does not see it change, so after an edit here
    delete the ``*.nbi`` and ``*.nbc`` files in the ``__pycache__`` folders of those callers.
    """
    # Unsigned indices spare numba's wrap-around of negative ones, which would keep the block
    # below from becoming SIMD instructions.
    i, j, n = np.uint64(a_start), np.uint64(b_start), np.uint64(limit)
    same = np.uint64(0)
    one, block = np.uint64(1), np.uint64(16)
    while same + block <= n:
        difference = np.int32(0)
        for k in range(block):
            difference |= a[i + same + k] ^ b[j + same + k]
        if difference != 0:
            break
        same += block
    while same < n and a[i + same] == b[j + same]:
        same += one
    return np.int64(same)


def lcp(a: Int32Array, b: Int32Array) -> int:
    """Length in tokens of the longest common prefix of two rows.

    Args:
        a: Token ids, int32[len_a].
        b: Token ids, int32[len_b].
    """
    return int(common_len(a, 0, b, 0, min(len(a), len(b))))


def page_floor(num_tokens: int, page_size: int) -> int:
    """The most tokens, at most ``num_tokens``, that fill whole pages of ``page_size`` tokens."""
    return num_tokens - num_tokens % page_size


def page_ceil(num_tokens: int, page_size: int) -> int:
    """The slots of the whole pages that ``num_tokens`` tokens occupy."""
    return -(-num_tokens // page_size) * page_size


def starts_of(lens: Sequence[int] | npt.NDArray[np.integer]) -> Int64Array:
    """Where runs of these lengths start, one behind the other, and at the end the total: int64[len(lens) + 1]."""
    starts = np.zeros(len(lens) + 1, np.int64)
    np.cumsum(lens, out=starts[1:])
    return starts


@njit(nogil=True)
def copy_runs(
    source: Int32Array, starts: Int64Array, ends: Int64Array, target: Int32Array, target_starts: Int64Array
) -> None:
    """Copy ``source[starts[i] : ends[i]]`` to ``target[target_starts[i] :]``, for every i."""
    for i in range(len(starts)):
        # Unsigned, as in `common_len`: five times as fast.
        start, end, to = np.uint64(starts[i]), np.uint64(ends[i]), np.uint64(target_starts[i])
        for k in range(end - start):
            target[to + k] = source[start + k]


def gather_runs(tokens: Int32Array, starts: Int64Array, lens: npt.NDArray[np.integer]) -> Int32Array:
    """``tokens[starts[i] : starts[i] + lens[i]]`` of every i, one behind the other."""
    offsets = starts_of(lens)
    gathered = np.empty(offsets[-1], np.int32)
    copy_runs(tokens, starts, starts + lens, gathered, offsets[:-1])
    return gathered


def check_integers(name: str, array: npt.NDArray[Any], num: int) -> None:
    """Check that an array holds ``num`` integers, one a row.

    Raises:
        WorkloadError: It does not.
    """
    if array.shape != (num,) or not np.issubdtype(array.dtype, np.integer):
        raise WorkloadError(f"{name} must be {num} integers, not {array.dtype} of shape {array.shape}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTable:
    """All prompts of a job, tokenized: the layout of an Arrow list array.

    Compare two tables by `content_hash`.

    Attributes:
        tokens: Token ids of every prompt, one after another, int32[num_tokens].
        offsets: Where each prompt starts, and at the end the total, int64[num_prompts + 1].

    Raises:
        WorkloadError: The arrays are not such a table; the message names the first offence.
    """

    tokens: Int32Array
    offsets: Int64Array

    def __post_init__(self) -> None:
        for name, array, dtype in (
            ("tokens", self.tokens, np.int32),
            ("offsets", self.offsets, np.int64),
        ):
            if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                raise WorkloadError(
                    f"TokenTable.{name} must be a contiguous {np.dtype(dtype)} vector, "
                    f"not {array.dtype} of shape {array.shape}"
                )
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise WorkloadError(f"TokenTable.offsets must run from 0 to the {len(self.tokens)} tokens there are")
        shrinks = np.flatnonzero(self.offsets[1:] < self.offsets[:-1])
        if len(shrinks):
            raise WorkloadError(f"TokenTable.offsets decrease after row {shrinks[0]}")
        if len(self.tokens) and self.tokens.min() < 0:
            where = int(np.flatnonzero(self.tokens < 0)[0])
            row = int(np.searchsorted(self.offsets, where, side="right")) - 1
            raise WorkloadError(f"row {row} has a negative token id, {self.tokens[where]}")

    @classmethod
    def from_lists(cls, prompts: Sequence[Sequence[int] | Int32Array]) -> TokenTable:
        """Pack one sequence of token ids per prompt.

        Args:
            prompts: Token ids per prompt, each at least 0 and below 2**31. Rows that all are int32
                arrays are packed much faster.

        Raises:
            WorkloadError: A token id is negative or does not fit; the message names its row.
        """
        offsets = starts_of([len(prompt) for prompt in prompts])
        arrays = [p for p in prompts if isinstance(p, np.ndarray) and p.dtype == np.int32]
        if prompts and len(arrays) == len(prompts):
            return cls(tokens=np.concatenate(arrays), offsets=offsets)
        try:
            tokens = np.fromiter(chain.from_iterable(prompts), dtype=np.int32, count=int(offsets[-1]))
        except OverflowError:
            limit = np.iinfo(np.int32).max
            row = next(i for i, p in enumerate(prompts) if any(not 0 <= t <= limit for t in p))
            raise WorkloadError(f"row {row} has a token id outside 0..{limit}") from None
        return cls(tokens=tokens, offsets=offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, i: int) -> Int32Array:
        """Token ids of prompt ``i`` (from 0), a view: int32[length of prompt i].

        Raises:
            IndexError: There is no such row.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of a table of {len(self)}")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> Int64Array:
        """Tokens of every prompt, int64[num_prompts]."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts together."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes both arrays take."""
        return self.tokens.nbytes + self.offsets.nbytes

    def content_hash(self) -> str:
        """32 hex digits that depend on the prompts and their order only, whatever the machine."""
        digest = hashlib.blake2b(b"batchllm.TokenTable/1", digest_size=16)
        for array in (
            self.offsets.astype("<i8", copy=False),
            self.tokens.astype("<i4", copy=False),
        ):
            digest.update(raw_bytes(array))
        return digest.hexdigest()


def raw_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The memory of a contiguous array, not a copy."""
    return array.data.cast("B") if array.size else memoryview(b"")
