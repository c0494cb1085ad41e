"""JSON as bytes of UTF-8, out of whatever it is wrapped in: compressions, also one in another, and other encodings.

Knows streams; not lines. What decompresses without end costs no memory until somebody reads it.

INVARIANT: a stream that is corrupt, or ends before it should, raises OSError when it is read.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from batchllm.dataset.formats import HEAD_LEN, Format, tell_format

_BLOCK_LEN = 1 << 20
_MAX_DEPTH = 8
_USUAL_ZSTD_WINDOW = 1 << 27
"""Larger ones must be asked for (``zstd --long=31``)."""
_MAX_ZSTD_WINDOW = 1 << 31


class NotJsonError(OSError):
    """Something else is in there; the message says what, in words that go behind "is"."""


def open_unwrapped(path: Path) -> io.BufferedReader:
    """Opens the JSON in a file.

    Raises:
        OSError: It cannot be opened.
        NotJsonError: It is of a format that is not read as JSON.
    """
    stream: Any = open(path, "rb", buffering=_BLOCK_LEN)  # noqa: SIM115 - the caller closes it
    found = tell_format(stream.peek(HEAD_LEN)[:HEAD_LEN])
    around: list[str] = []
    try:
        while found.kind in ("compressed", "encoded"):
            if len(around) == _MAX_DEPTH:
                raise NotJsonError(f"compressed more than {_MAX_DEPTH} times")
            stream = _unwrap(stream, found, path if not around else None)
            around.append(found.name)
            found = _format_inside(stream)
    except BaseException:
        stream.close()
        raise
    if found.kind == "lines":
        reader: io.BufferedReader = stream
        return reader
    stream.close()
    names = {"table": f"a {found.name} table", "csv": "CSV"}
    inside = "".join(f", inside {name}" for name in reversed(around))
    raise NotJsonError(f"{names.get(found.kind, found.name)}{inside}")


def _format_inside(stream: Any) -> Format:
    try:
        return tell_format(stream.peek(HEAD_LEN)[:HEAD_LEN])
    except OSError:
        return Format("lines")  # it is told again to whoever reads


def _unwrap(stream: Any, found: Format, path: Path | None) -> Any:
    if found.kind == "encoded":
        return io.BufferedReader(_Recoded(stream, found.name), _BLOCK_LEN)
    if found.name == "xz":
        import lzma

        return io.BufferedReader(_Checked(lzma.LZMAFile(stream), stream), _BLOCK_LEN)
    if found.name == "zstd" and path is not None and _zstd_window(path) > _USUAL_ZSTD_WINDOW:
        return io.BufferedReader(_Checked(_LargeZstd(path), stream), _BLOCK_LEN)
    import pyarrow

    # Not `zstandard` or `bz2`, whose readers take a file that was cut off for a whole one.
    source = pyarrow.PythonFile(stream, mode="r") if path is None else pyarrow.OSFile(os.fspath(path))
    return io.BufferedReader(_Checked(pyarrow.CompressedInputStream(source, found.name), stream), _BLOCK_LEN)


class _Checked(io.RawIOBase):
    """A reader of another library, whose errors are OSErrors here."""

    def __init__(self, reader: Any, below: Any) -> None:
        self._reader = reader
        self._below = below
        self._error: OSError | None = None  # told each time: after one, some readers give an end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error is not None:
            raise self._error
        try:
            data = self._reader.read(len(buffer))
        except Exception as error:  # each library has its own
            self._error = error if isinstance(error, OSError) else OSError(str(error) or type(error).__name__)
            raise self._error from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._reader.close()
            self._below.close()
        super().close()


class _Recoded(io.RawIOBase):
    """Text of another encoding, as UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding=encoding, newline="")
        self._encoding = encoding
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            try:
                self._left = self._text.read(_BLOCK_LEN // 4).encode()
            except UnicodeError as error:
                raise OSError(f"it is not {self._encoding.upper()}: {error}") from error
        length = min(len(buffer), len(self._left))
        buffer[:length], self._left = self._left[:length], self._left[length:]
        return length

    def close(self) -> None:
        if not self.closed:
            self._text.close()
        super().close()


def _zstd_window(path: Path) -> int:
    """The window of the first frame that holds data; 0 where that cannot be told."""
    import zstandard

    with open(path, "rb") as file:
        head = file.read(HEAD_LEN)
        while _is_skipped(head):
            file.seek(int.from_bytes(head[4:8], "little") + 8 - len(head), os.SEEK_CUR)
            head = file.read(HEAD_LEN)
    try:
        return int(zstandard.get_frame_parameters(head).window_size)
    except zstandard.ZstdError:
        return 0


def _is_skipped(head: bytes) -> bool:
    """A frame begins here that holds no data."""
    return head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] < 0x60


class _LargeZstd:
    """A reader of frames with large windows, which sees first whether the file is whole."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._path = path
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
        file = open(path, "rb")  # noqa: SIM115 - the reader closes it
        self._reader: Any = decompressor.stream_reader(file, read_across_frames=True)
        self._is_checked = False

    def read(self, size: int) -> bytes:
        if not self._is_checked:
            _check_zstd_is_whole(self._path)
            self._is_checked = True
        data: bytes = self._reader.read(size)
        return data

    def close(self) -> None:
        self._reader.close()


def _check_zstd_is_whole(path: Path) -> None:
    """Walk from block to block: the reader takes a file that was cut off for a whole one. (RFC 8878, 3.1.1)

    Raises:
        OSError: A frame ends before it should.
    """
    import zstandard

    size = path.stat().st_size
    with open(path, "rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(18)
            if _is_skipped(head):
                at += 8 + int.from_bytes(head[4:8], "little")
                continue
            try:
                at += zstandard.frame_header_size(head)
            except zstandard.ZstdError as error:
                raise OSError(f"at byte {at} there is no zstd frame") from error
            is_last = False
            while not is_last and at <= size:
                file.seek(at)
                block = int.from_bytes(file.read(3), "little")
                is_last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
                at += 3 + (1 if kind == 1 else length)
            at += 4 if head[4] & 4 else 0
    if at != size:
        raise OSError("it ends in the midst of a zstd frame")
