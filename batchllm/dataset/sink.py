"""JSON lines out: rows finish in any order, the file ends in input order.

Finished lines are appended to ``<path>.partial``; memory holds only where each one lies. `close`
rewrites them in order beside the target and moves that over it in one step.

Knows files; nothing of what a line says.

INVARIANT: the target is either as it was before or complete; until then every finished line is in
the partial file, and no partial file of an earlier run is ever overwritten.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import orjson

from batchllm.errors import BatchLLMError, ConfigError

FLUSH_EVERY = 256
"""Finished lines that a crash of this process may lose; the journal has them still."""

_PathLike = str | os.PathLike[str]
_T = TypeVar("_T")


def check_writable(path: _PathLike, flag: str, *, input_path: _PathLike | None = None) -> None:
    """Checks that a file can be written, before anything runs; leaves no trace.

    Args:
        path: The file to be written; it may exist.
        flag: The command line flag that gave it, for messages.
        input_path: The job's input, which must be another file.

    Raises:
        ConfigError: It cannot be written, or it is the input.
    """
    target = Path(os.path.realpath(path))
    if input_path is not None and _same_file(target, Path(os.path.realpath(input_path))):
        raise ConfigError(f"{flag} {path}: is the input itself; write to another file")
    if target.is_dir():
        raise ConfigError(f"{flag} {path}: is a directory; give a file name in it")
    if target.exists() and not target.is_file():
        raise ConfigError(f"{flag} {path}: is not a regular file and cannot be replaced")
    if not target.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no directory {target.parent}; create it first")
    if target.exists() and not os.access(target, os.W_OK):
        raise ConfigError(f"{flag} {path}: is read-only; change its mode or write elsewhere")
    try:
        # Mode bits do not know of full, read-only or special file systems; writing does.
        with tempfile.TemporaryFile(dir=target.parent) as probe:
            probe.write(b"\n")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot write in {target.parent}: {error.strerror}") from error


class JsonlSink:
    """Writes the output lines of a job, and the failed ones to a file of their own if asked.

    A context manager: leaving it well completes the files, leaving it with an exception keeps what
    was finished and notes where on the exception.
    """

    def __init__(
        self,
        path: _PathLike,
        *,
        errors_path: _PathLike | None = None,
        input_path: _PathLike | None = None,
        flag: str = "-o",
        errors_flag: str = "--errors",
    ) -> None:
        """Checks both paths and opens the partial files.

        Raises:
            ConfigError: A path cannot be written, or two of them are the same file.
        """
        check_writable(path, flag, input_path=input_path)
        if errors_path is not None:
            check_writable(errors_path, errors_flag, input_path=input_path)
            if _same_file(Path(os.path.realpath(path)), Path(os.path.realpath(errors_path))):
                raise ConfigError(f"{errors_flag} {errors_path}: is the output file {flag} too")
        self._answers = _OrderedLines(path)
        self._failures = self._answers if errors_path is None else _OrderedLines(errors_path)

    def write(self, index: int, record: dict[str, Any]) -> None:
        """Appends the line of an answered row.

        Args:
            index: The row's position in the input; one line for each.

        Raises:
            BatchLLMError: The disk refuses; the message says what is kept.
        """
        self._answers.append(index, record)

    def write_error(self, index: int, record: dict[str, Any]) -> None:
        """Appends the line of a failed row: to the errors file, or among the others without one."""
        self._failures.append(index, record)

    def close(self) -> None:
        """Puts all lines in input order and completes the files. Closing twice does nothing.

        Raises:
            BatchLLMError: The disk refuses; the partial files stay and the message names them.
        """
        self._failures.finish()
        self._answers.finish()

    def abandon(self) -> str:
        """Stops without completing; returns a sentence that says where the finished rows are."""
        kept = [self._answers.keep()]
        if self._failures is not self._answers:
            kept.append(self._failures.keep())
        return "; ".join(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            error.add_note(self.abandon())


class _OrderedLines:
    """One output file: an append-only partial file and, for each row, where its line lies."""

    def __init__(self, path: _PathLike) -> None:
        self._path = Path(os.path.realpath(path))
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._ordered = self._path.with_name(self._path.name + ".ordered")
        # 16 bytes a row, indexed by the row's position: -1 where no line is written (yet).
        self._offsets = array("q")
        self._lengths = array("q")
        self._end = 0
        self._num_lines = 0
        self._num_unflushed = 0
        self._guarded(self._set_aside_partial)
        # Open for the life of the sink, whose own `with` closes it.
        self._file = self._guarded(lambda: open(self._partial, "xb", buffering=1 << 18))  # noqa: SIM115

    def append(self, index: int, record: dict[str, Any]) -> None:
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        self._grow_to(index)
        assert self._offsets[index] < 0, f"row {index} is written twice to {self._path}"
        self._guarded(lambda: self._file.write(line))
        self._offsets[index] = self._end
        self._lengths[index] = len(line)
        self._end += len(line)
        self._num_lines += 1
        self._num_unflushed += 1
        if self._num_unflushed >= FLUSH_EVERY:
            self._guarded(self._file.flush)
            self._num_unflushed = 0

    def finish(self) -> None:
        if self._file.closed:
            return
        self._guarded(self._file.close)
        self._num_unflushed = 0
        self._guarded(self._write_in_order)
        self._guarded(self._partial.unlink)

    def keep(self) -> str:
        # A close that the disk refuses is not news: the exception under way says so already.
        with contextlib.suppress(OSError):
            self._file.close()
            self._num_unflushed = 0
        return self._kept()

    def _write_in_order(self) -> None:
        try:
            with (
                open(self._partial, "rb") as partial,
                open(self._ordered, "wb", buffering=1 << 20) as ordered,
            ):
                for offset, length in zip(self._offsets, self._lengths, strict=True):
                    if offset >= 0:
                        partial.seek(offset)
                        ordered.write(partial.read(length))
                ordered.flush()
                os.fsync(ordered.fileno())
            os.replace(self._ordered, self._path)
        except BaseException:
            self._ordered.unlink(missing_ok=True)
            raise

    def _grow_to(self, index: int) -> None:
        assert index >= 0, f"row index {index} is negative"
        if index >= len(self._offsets):
            num_new = max(index + 1, 2 * len(self._offsets), 1024) - len(self._offsets)
            self._offsets.extend([-1] * num_new)
            self._lengths.extend([0] * num_new)

    def _set_aside_partial(self) -> None:
        """Renames what a run that failed has left: it may be the only copy of its answers."""
        if not self._partial.exists():
            return
        number = 1
        while (old := self._partial.with_name(f"{self._partial.name}.{number}")).exists():
            number += 1
        os.rename(self._partial, old)

    def _guarded(self, step: Callable[[], _T]) -> _T:
        try:
            return step()
        except OSError as error:
            raise BatchLLMError(f"{self._path}: {error}; {self._kept()}") from error

    def _kept(self) -> str:
        if self._num_lines == 0:
            self._partial.unlink(missing_ok=True)
            return f"no row had finished, and nothing is left at {self._path}"
        # What is not flushed may not be there; claim no more than what is.
        num_safe = self._num_lines - self._num_unflushed
        return f"{num_safe} finished rows are kept in {self._partial}, in finishing order"


def _same_file(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))
