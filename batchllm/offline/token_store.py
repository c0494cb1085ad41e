"""Token ids of the rows of a job, in the order they come: in memory, and in a file once they are too many for it.

Knows: runs of token ids, how long each is, how much memory they may take. Must not know: what a row is, plans, engines.
Invariant: row ``i`` reads the same whether in memory or spilled; memory never holds the tokens twice, and once
spilled only a block of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from batchllm.errors import WorkloadError
from batchllm.planner.shards import TokenBlock
from batchllm.tokens import Int32Array, Int64Array, TokenTable, copy_runs, raw_bytes, starts_of

_TOKEN_BYTES = 4
_BLOCK_LEN = 1 << 20
"""Tokens written, read or gathered at once: large enough for a disk, small beside a table."""
_MIN_GROWTH_LEN = 4 * _BLOCK_LEN
_MIN_SHARE_LEN = 1 << 16
"""Tokens that a store takes of shared memory at least; a small job takes little from a large one."""


class TokenMemory:
    """Memory that stores of several jobs share; from any thread.

    One half is for tokens of jobs that are whole in memory, first come, first served. The other half is for jobs that
    are not, in equal shares, one for each job: a shard.

    Args:
        max_bytes: Most bytes of tokens (4 each) in all of it.
        max_jobs: Most jobs at once.

    Attributes:
        max_shard_bytes: Most bytes of a job that is not whole in memory.
        num_bytes: Bytes taken now by jobs that are whole in memory.
        peak_bytes: Most bytes that were taken at once.
    """

    def __init__(self, max_bytes: int, max_jobs: int) -> None:
        self._max_bytes = max_bytes // 2
        self._turn = threading.Lock()
        self.max_shard_bytes = max(max_bytes // 2 // max_jobs, _TOKEN_BYTES)
        self.num_bytes = 0
        self.peak_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Take so many bytes; False, and nothing is taken, where there are not so many."""
        with self._turn:
            if self.num_bytes + num_bytes > self._max_bytes:
                return False
            self.num_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            return True

    def give_back(self, num_bytes: int) -> None:
        """So many of the bytes that were taken are free again."""
        with self._turn:
            self.num_bytes -= num_bytes


class TokenStore:
    """Rows of token ids, numbered from 0 as they are appended.

    Args:
        folder: Where the tokens go that memory may not hold; None for the system's temporary folder. The file has no
            name, so the kernel removes it with the process.
        max_memory_bytes: Most bytes of tokens (4 each) in memory; with one token more all of them move to the file.
        shared: Where that memory is taken from; with one token more than it has, too. None: nobody else wants it.
    """

    def __init__(self, folder: Path | None, max_memory_bytes: int, shared: TokenMemory | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._max_memory_len = max_memory_bytes // _TOKEN_BYTES
        self._shared = shared
        self._taken_len = self._max_memory_len if shared is None else 0
        self._lengths = array("i")
        self._file: BinaryIO | None = None
        self._num_written = 0
        # Behind `_num_written`: all tokens in memory, or those that wait to be written. An anonymous mapping grows by
        # moving pages, not bytes, and takes memory only where it was written to.
        self._memory = mmap.mmap(-1, _MIN_GROWTH_LEN * _TOKEN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer = self._view_memory()
        self._num_buffered = 0

    @property
    def num_rows(self) -> int:
        """Rows appended."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return self._num_written + self._num_buffered

    @property
    def lengths(self) -> Int32Array:
        """Tokens of every row, a copy: int32[num_rows]."""
        return np.array(self._lengths, np.int32)

    @property
    def is_spilled(self) -> bool:
        """The tokens are in the file."""
        return self._file is not None

    def append(self, ids: Int32Array) -> None:
        """Take the next row.

        Args:
            ids: Its token ids, int32[length]. They are copied.

        Raises:
            WorkloadError: The file cannot be made or the disk refuses; the store is of no use any more.
            BufferError: A table of all rows, or a block, is still in use and the memory behind it must grow.
        """
        end = self._num_buffered + len(ids)
        if end <= len(self._buffer):
            self._buffer[self._num_buffered : end] = ids
            self._num_buffered = end
        else:
            self._put(ids)
        self._lengths.append(len(ids))

    def extend(self, tokens: Int32Array, lengths: npt.NDArray[np.integer]) -> None:
        """Take the next rows.

        Args:
            tokens: Their token ids, one row after another, int32[sum of lengths]. They are copied.
            lengths: Tokens of each, int[number of rows].

        Raises:
            WorkloadError: As `append`; or the lengths do not add up to the tokens.
            BufferError: As `append`.
        """
        if int(lengths.sum()) != len(tokens):
            raise WorkloadError(f"rows of {int(lengths.sum())} tokens were announced and {len(tokens)} given")
        self._put(tokens)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def table(self, rows: Int64Array | None = None) -> TokenTable:
        """The tokens of some rows, or of all.

        Args:
            rows: Row numbers in any order, repeats allowed, int64[any]. None: every row; that table is not a copy
                where the tokens are in memory, so nothing may be appended while it is in use.

        Raises:
            WorkloadError: The disk refuses.
        """
        offsets = starts_of(self.lengths)
        if rows is None:
            return TokenTable(tokens=self._read(0, self.num_tokens), offsets=offsets)
        in_order = np.argsort(rows, kind="stable")
        starts, ends = offsets[rows[in_order]], offsets[rows[in_order] + 1]
        chosen_offsets = starts_of(offsets[rows + 1] - offsets[rows])
        targets = chosen_offsets[in_order]
        tokens = np.empty(chosen_offsets[-1], np.int32)
        for first, last in _windows(starts, ends):
            first_token, piece = starts[first], slice(first, last)
            source = self._read(first_token, ends[last - 1])
            copy_runs(source, starts[piece] - first_token, ends[piece] - first_token, tokens, targets[piece])
        return TokenTable(tokens=tokens, offsets=chosen_offsets)

    def blocks(self) -> Iterator[TokenBlock]:
        """All rows in order: one view of what is in memory, or the file in large sequential reads.

        Raises:
            WorkloadError: The disk refuses.
        """
        offsets = starts_of(self.lengths)
        if not self.is_spilled:
            yield TokenBlock(0, self._read(0, self.num_tokens), offsets)
            return
        for first, last in _windows(offsets[:-1], offsets[1:]):
            start, end = offsets[first], offsets[last]
            yield TokenBlock(first, self._read(start, end), offsets[first : last + 1] - start)

    def close(self) -> None:
        """Give file and memory back. Closing twice does nothing; the rows cannot be read afterwards."""
        self._give_back()
        if self._file is not None:
            self._file.close()

    def _view_memory(self) -> Int32Array:
        return np.frombuffer(self._memory, np.int32)[: self._taken_len]

    def _take(self, num_tokens: int) -> bool:
        """Whether so many tokens may be in memory; with some more, where others leave that."""
        if num_tokens > self._max_memory_len:
            return False
        if self._shared is None or num_tokens <= self._taken_len:
            return True
        for length in (num_tokens + max(_MIN_SHARE_LEN, num_tokens // 4), num_tokens):
            if self._shared.take((length - self._taken_len) * _TOKEN_BYTES):
                self._taken_len = length
                return True
        return False

    def _give_back(self) -> None:
        if self._shared is not None:
            self._shared.give_back(self._taken_len * _TOKEN_BYTES)
            self._taken_len = 0

    def _put(self, tokens: Int32Array) -> None:
        """Append tokens, making room for them first."""
        end = self._num_buffered + len(tokens)
        if end > len(self._buffer):
            if not self.is_spilled and self._take(end):
                self._grow(end)
            else:
                self._write_buffer()
                end = len(tokens)
        if end > len(self._buffer):
            self._write(tokens)
        else:
            self._buffer[self._num_buffered : end] = tokens
            self._num_buffered = end

    def _grow(self, num_tokens: int) -> None:
        """Have room in memory for so many tokens, and some more."""
        room = num_tokens + max(_MIN_GROWTH_LEN, num_tokens // 4)
        # A mapping that someone looks at refuses to move, so our own view goes first.
        self._buffer = np.empty(0, np.int32)
        try:
            if min(room, self._taken_len) * _TOKEN_BYTES > len(self._memory):
                self._memory.resize(room * _TOKEN_BYTES)
        finally:
            self._buffer = self._view_memory()

    def _write_buffer(self) -> None:
        """Move to the file what is buffered; the first time that is everything, and its memory is given back."""
        is_first = self._file is None
        num_buffered, self._num_buffered = self._num_buffered, 0
        self._write(self._buffer[:num_buffered])
        if is_first:
            self._buffer = np.empty(_BLOCK_LEN, np.int32)
            del self._memory
            self._give_back()

    def _write(self, tokens: Int32Array) -> None:
        try:
            if self._file is None:
                # For the life of the store, whose `close` closes it.
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            view = raw_bytes(np.ascontiguousarray(tokens))
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            raise self._refused(error) from error
        self._num_written += len(tokens)

    def _read(self, start: int, end: int) -> Int32Array:
        """Tokens ``start .. end - 1`` of all, not to be written to: a view of memory, or read from the file."""
        if self._file is None:
            tokens = self._buffer[start:end]
            tokens.flags.writeable = False  # others see the same memory
            return tokens
        self._write_buffer()
        tokens = np.empty(end - start, np.int32)
        view, at = raw_bytes(tokens), int(start) * _TOKEN_BYTES
        try:
            while view:
                num_read = os.preadv(self._file.fileno(), [view], at)
                if num_read == 0:
                    raise WorkloadError(f"{self._folder}: the token file ends at byte {at}; run it again")
                view, at = view[num_read:], at + num_read
        except OSError as error:
            raise self._refused(error) from error
        tokens.flags.writeable = False  # as above: one signature for kernels
        return tokens

    def _refused(self, error: OSError) -> WorkloadError:
        return WorkloadError(
            f"{self._folder}: {error.strerror}; the tokens of the job do not fit in memory and are kept there: "
            f"make room, or name another folder, and run it again"
        )


def _windows(starts: Int64Array, ends: Int64Array) -> Iterator[tuple[int, int]]:
    """Cut rows in groups ``[first, last)`` that span a block at most; a longer row is alone.

    Args:
        starts: First token of each row, ascending.
        ends: The token behind each row, ascending.
    """
    first = 0
    while first < len(starts):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _BLOCK_LEN, side="right")))
        yield first, last
        first = last
