"""Finished output lines into files: plain or compressed JSON lines and Parquet, here or anywhere fsspec reaches.

    ``-``                standard output
    ``*.gz``, ``*.zst``  compressed JSON lines
    ``*.parquet``        a table (`batchllm.dataset.parquet_table`)
    any other name       JSON lines
    ``scheme://...``     any of these formats by its ending, through fsspec

Knows places and compression; not where lines come from, nor what they say.

INVARIANT: a local file is as it was before or complete. An object behind a URL gets its name when it is complete, where
its file system can do that.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from batchllm.errors import BatchLLMError, ConfigError
from batchllm.trace.whole_file import temporary_beside

BUFFER_BYTES = 1 << 18
"""Lines are handed on in pieces of about this size."""

_OTHER_FORMATS = {".csv", ".tsv", ".arrow", ".feather", ".bz2", ".xz", ".lz4", ".zip", ".gzip", ".zstd", ".pq"}
"""Endings that say something else than JSON lines, which a file of any other name is."""

_PathLike = str | os.PathLike[str]


def check_writable(path: _PathLike, flag: str, *, input_path: _PathLike | None = None) -> None:
    """Checks that a file can be written, before anything runs; leaves no trace.

    Args:
        path: The file to be written; it may exist.
        flag: The command line flag that gave it, for messages.
        input_path: The job's input, which must be another file.

    Raises:
        ConfigError: It cannot be written, or it is the input.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"{flag} {path!r}: must be the name of a file")
    if os.fspath(path) == "-":
        raise ConfigError(f"{flag} -: cannot be standard output; give a file name")
    target = Path(os.path.realpath(path))
    if _is_too_long(target):
        raise ConfigError(f"{flag} {path}: the name is too long for its file system; shorten it")
    if input_path is not None and _is_same_file(target, Path(os.path.realpath(input_path))):
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


def check_output(path: str, flag: str, *, input_path: str | None = None) -> None:
    """Checks what can be known of an output before anything runs; leaves no trace.

    Args:
        path: A path, a URL, or ``-``.
        flag: The command line flag that gave it, for messages.
        input_path: The job's input, which must be something else.

    Raises:
        ConfigError: It cannot be written, it is the input, its name is of a format that is only read, or nothing is
            installed that can write to such URLs.
    """
    if path == "-":
        return
    ending = Path(path).suffix.lower()
    if ending in _OTHER_FORMATS:
        raise ConfigError(f"{flag} {path}: {ending} is not written; give .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
    if not _is_url(path):
        check_writable(path, flag, input_path=input_path)
        return
    if path == input_path:
        raise ConfigError(f"{flag} {path}: is the input itself; write to another file")
    protocol = path.partition("://")[0]
    if protocol in ("http", "https"):
        raise ConfigError(f"{flag} {path}: {protocol}:// can be read, not written; give a path or another URL")
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        message = (
            f"{flag} {path}: no file system is known as {protocol}://; give a path or a URL such as s3://bucket/name"
        )
        raise ConfigError(message) from error
    except ImportError as error:
        raise ConfigError(f"{flag} {path}: {protocol}:// needs a package that is not installed: {error}") from error


def is_same_output(one: str, other: str) -> bool:
    """Whether two outputs are the same file, under whatever names."""
    if one == other:
        return True
    if "-" in (one, other) or _is_url(one) or _is_url(other):
        return False
    return _is_same_file(Path(os.path.realpath(one)), Path(os.path.realpath(other)))


def can_append(path: str) -> bool:
    """Whether lines can be added to this output one by one, each readable at once: `open_appender`."""
    return not _is_url(path) and _format_of(path) == "plain"


def open_writer(path: str, *, flag: str = "-o") -> LineWriter:
    """Opens an output that replaces what is there when it is complete.

    Args:
        path: A path, a URL, or ``-``; its ending says the format.
        flag: The command line flag that gave it, for messages.

    Raises:
        BatchLLMError: It cannot be opened.
    """
    place: _Place = _StandardOutput() if path == "-" else _RemoteFile(path) if _is_url(path) else _LocalFile(path)
    kind = LineWriter if path == "-" or _format_of(path) != "parquet" else ParquetLineWriter
    return kind(place, path, flag)


def open_appender(path: str, *, flag: str = "-o") -> LineWriter:
    """Opens an output whose lines can be read as soon as they are flushed; what is there stays.

    Args:
        path: A path or ``-``, `can_append`.
        flag: The command line flag that gave it, for messages.

    Raises:
        BatchLLMError: It cannot be opened.
    """
    assert can_append(path), f"{path}: lines cannot be appended to it"
    return LineWriter(_StandardOutput() if path == "-" else _OpenEndedFile(path), path, flag)


class LineWriter:
    """Writes the lines of one output, as JSON lines.

    A context manager: leaving it well completes the output, leaving it with an exception removes what is unfinished.
    What a disk or a file system refuses becomes a `BatchLLMError`; a reader of standard output that has gone stays a
    `BrokenPipeError`.
    """

    def __init__(self, place: _Place, path: str, flag: str) -> None:
        self._place = place
        self._name = f"{flag} {path}"
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._is_open = True
        try:
            place.open()
            try:
                self._stream = self._encoded(_format_of(path), place.stream)
            except BaseException:
                place.discard()
                raise
        except place.faults as error:
            raise self._explain(error) from error

    def write(self, line: bytes) -> None:
        """Adds a line: one JSON object, without a newline."""
        self._pieces.append(line)
        self._num_bytes += len(line)
        if self._num_bytes >= BUFFER_BYTES:
            self._hand_on_guarded()

    def flush(self) -> None:
        """Hands on what has been written, for a reader to see."""
        self._hand_on_guarded(is_for_reader=True)

    def close(self) -> None:
        """Completes the output. Closing twice does nothing."""
        if not self._is_open:
            return
        try:
            self._finish()
            self._place.complete()
        except self._place.faults as error:
            self.abandon()
            if isinstance(error, self._place.passed_on):
                raise
            raise self._explain(error) from error
        self._is_open = False

    def abandon(self) -> None:
        """Removes what is unfinished; what was there before stays. After `close` it does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._pieces.clear()
        # Closing writes, and may be refused like what went before it; why we are here is told by then.
        with contextlib.suppress(*self._place.faults):
            if self._stream is not self._place.stream:
                self._stream.close()
        with contextlib.suppress(*self._place.faults):
            self._place.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def _finish(self) -> None:
        self._hand_on()
        if self._stream is not self._place.stream:
            self._stream.close()

    def _hand_on(self) -> None:
        if self._pieces:
            self._pieces.append(b"")  # a newline behind the last one
            self._stream.write(b"\n".join(self._pieces))
            self._pieces.clear()
            self._num_bytes = 0

    def _hand_on_guarded(self, *, is_for_reader: bool = False) -> None:
        try:
            self._hand_on()
            if is_for_reader:
                self._stream.flush()
        except self._place.faults as error:
            if isinstance(error, self._place.passed_on):
                raise
            raise self._explain(error) from error

    def _encoded(self, form: str, stream: BinaryIO) -> BinaryIO:
        if form == "gz":
            # No name and no time in the header: same lines, same bytes.
            return cast(BinaryIO, gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=6, mtime=0))
        if form == "zst":
            import zstandard

            return cast(BinaryIO, zstandard.ZstdCompressor().stream_writer(stream, closefd=False))
        return stream

    def _explain(self, error: BaseException) -> BatchLLMError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        return BatchLLMError(f"{self._name}: cannot be written: {reason}; all results are kept in the job's folder")


class ParquetLineWriter(LineWriter):
    """Writes a table.

    The types of its columns are known when all lines are, so lines wait in a temporary file.
    """

    def _encoded(self, form: str, stream: BinaryIO) -> BinaryIO:
        # Without a name; gone when closed, or when this process ends.
        return cast(BinaryIO, tempfile.TemporaryFile(dir=self._place.folder))

    def _finish(self) -> None:
        from batchllm.dataset.parquet_table import write_table

        self._hand_on()
        write_table(self._stream, self._place.stream)
        self._stream.close()


class _Place(ABC):
    """Where bytes of an output go."""

    stream: BinaryIO
    folder: Path | None = None
    """For temporary files; None for the system's."""
    faults: tuple[type[Exception], ...] = (OSError,)
    """What a refusal looks like."""
    passed_on: tuple[type[Exception], ...] = ()
    """Those of them that are not for us to explain."""

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def complete(self) -> None: ...

    @abstractmethod
    def discard(self) -> None: ...


class _LocalFile(_Place):
    def __init__(self, path: str) -> None:
        self._path = Path(os.path.realpath(path))
        self._temporary = temporary_beside(self._path)
        self.folder = self._path.parent

    def open(self) -> None:
        self.stream = open(self._temporary, "wb", buffering=BUFFER_BYTES)  # noqa: SIM115 - until complete or discarded

    def complete(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        self._temporary.unlink(missing_ok=True)
        self.stream.close()


class _OpenEndedFile(_Place):
    """A file that grows in place."""

    def __init__(self, path: str) -> None:
        self._path = path

    def open(self) -> None:
        self.stream = open(self._path, "ab", buffering=BUFFER_BYTES)  # noqa: SIM115 - until complete or discarded

    def complete(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()

    def discard(self) -> None:
        self.stream.close()


class _StandardOutput(_Place):
    passed_on = (BrokenPipeError,)

    def open(self) -> None:
        self.stream = sys.stdout.buffer

    def complete(self) -> None:
        self.stream.flush()

    def discard(self) -> None:
        """It is not ours to close."""


class _RemoteFile(_Place):
    # What their clients raise is not only OSError; all of it is told, with its cause.
    faults = (Exception,)

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self) -> None:
        import fsspec

        system, path = fsspec.core.url_to_fs(self._url)
        self._file: Any = system.open(path, "wb", autocommit=False)
        self.stream = cast(BinaryIO, self._file)

    def complete(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        try:
            self._file.close()
        finally:
            self._file.discard()


def _format_of(path: str) -> str:
    ending = Path(path).suffix.lower()
    return ending.removeprefix(".") if ending in (".gz", ".zst", ".parquet") else "plain"


def _is_url(path: str) -> bool:
    return "://" in path


def _is_too_long(path: Path) -> bool:
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def _is_same_file(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))
