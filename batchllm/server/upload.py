"""A file on its way in: a multipart body, piece by piece, onto the disk.

Knows multipart bodies and their limits; not files' records.

INVARIANT: a body of any length takes a bounded part of the memory, and one that is not accepted leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from batchllm.server.api_errors import ApiError

_PIECE_LEN = 1 << 18
"""Bytes that are written together; as many wait in memory for each upload."""
_MAX_PARTS = 16
_MAX_FIELD_LEN = 4096
_MAX_FILENAME_LEN = 1024
_MAX_FORM_LEN = 1 << 20
"""More than a form can be long beside its file."""
_MAX_DIGITS = 18
_LEAST_BYTES_PER_S = 1024
"""What comes more slowly than this, on the whole, keeps its place from others for ever."""
_MAX_DRAINED = 64 << 20
_MAX_DRAIN_S = 10.0


class _StalledError(ApiError):
    """Nothing comes any more: there is nothing to wait for."""


class Upload:
    """The body of one request.

    Args:
        stream: Where the file's bytes go, unbuffered.
        path: Name of that file on disk.
        max_file_bytes: Longest file that is taken.
        idle_s: Seconds for which the body may stand still, or be behind `_LEAST_BYTES_PER_S`.

        take_room: Called in a thread before so many bytes are written; raises where there is no room for them.

    Attributes:
        fields: The form's other fields.
        filename: What the user calls the file; None if none came.
        num_bytes: Bytes of the file so far.
    """

    def __init__(
        self,
        stream: BinaryIO,
        path: Path,
        max_file_bytes: int,
        idle_s: float,
        take_room: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self.path = path
        self._take_room = take_room
        self._idle_s = idle_s
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes = 0
        self._stream = stream
        self._max_file_bytes = max_file_bytes
        self._hash = sha256()
        self._pieces: list[bytes] = []
        self._num_waiting = 0
        self._num_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._field_name = ""
        self._field: bytearray | None = None
        self._is_ended = False

    @property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, in hex."""
        return self._hash.hexdigest()

    async def receive(self, request: Request) -> None:
        """Take all of it in; the file's bytes are on disk then.

        Raises:
            ApiError: It is no form with one file, too large, or stands still for too long.
            OSError: The disk refuses.
            ClientDisconnect: The rest does not come.
        """
        body = request.stream()
        try:
            self._check_length(request.headers.get("content-length", ""))
            parser = MultipartParser(_boundary(request), {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            })  # fmt: skip
            async for chunk in self._in_time(body):
                parser.write(chunk)
                if self._num_waiting >= _PIECE_LEN:
                    await run_in_threadpool(self._write)
            if not self._is_ended:
                raise ApiError(400, "the body ends before its last boundary", code="invalid_multipart")
            if self.filename is None:
                raise ApiError(400, "the form has no file", code="missing_required_parameter", param="file")
            await run_in_threadpool(self._finish)
        except FormParserError as error:
            await _drain(body)
            raise ApiError(400, f"the body is no multipart form: {error}", code="invalid_multipart") from error
        except _StalledError:
            raise
        except (ApiError, OSError):
            await _drain(body)  # a client that is still sending would not read the answer
            raise

    async def _in_time(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The pieces of a body, each of which comes soon after the one before it, and all of them not too slowly."""
        started, num_bytes = time.monotonic(), 0
        while True:
            left_s = self._idle_s + num_bytes / _LEAST_BYTES_PER_S - (time.monotonic() - started)
            try:
                async with asyncio.timeout(min(left_s, self._idle_s)):
                    chunk = await anext(body, None)
            except TimeoutError:
                what = "nothing came" if left_s >= self._idle_s else f"fewer than {_LEAST_BYTES_PER_S} bytes/s came"
                message = f"{what} for {self._idle_s:.0f} s; send the file again"
                raise _StalledError(408, message, code="upload_timeout") from None
            if chunk is None:
                return
            num_bytes += len(chunk)
            if num_bytes > self._max_file_bytes + _MAX_FORM_LEN:
                raise self._too_large()
            yield chunk

    def _check_length(self, told: str) -> None:
        """A body that must be too long is not waited for."""
        if told.isdecimal() and int(told[:_MAX_DIGITS]) > self._max_file_bytes + _MAX_FORM_LEN:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = f"the file is larger than {self._max_file_bytes} bytes; split it"
        return ApiError(413, message, code="file_too_large", param="file")

    def _write(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._num_waiting = 0
        self._take_room(len(data))
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]

    def _finish(self) -> None:
        self._write()
        os.fsync(self._stream.fileno())

    # What the parser finds

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise ApiError(400, f"the form has more than {_MAX_PARTS} parts", code="invalid_multipart")
        self._headers = {}

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            self._begin_file(options.get(b"filename"))
            return
        if name in self.fields:
            raise ApiError(400, f"{name} is there twice", code="invalid_multipart", param=name)
        self._field_name, self._field = name, bytearray()

    def _begin_file(self, filename: bytes | None) -> None:
        if self.filename is not None:
            raise ApiError(400, "the form has two files; send one", code="invalid_multipart", param="file")
        if filename is None:
            raise ApiError(400, "file must be a file, with a filename", code="invalid_value", param="file")
        self.filename = filename.decode(errors="replace")
        if len(self.filename) > _MAX_FILENAME_LEN:
            message = f"the file's name is longer than {_MAX_FILENAME_LEN} characters"
            raise ApiError(400, message, code="invalid_value", param="file")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            self._field += data[start:end]
            if len(self._field) > _MAX_FIELD_LEN:
                message = f"{self._field_name} is longer than {_MAX_FIELD_LEN} bytes"
                raise ApiError(400, message, code="invalid_value", param=self._field_name)
            return
        self.num_bytes += end - start
        if self.num_bytes > self._max_file_bytes:
            raise self._too_large()
        self._pieces.append(data[start:end])
        self._num_waiting += end - start

    def _end_part(self) -> None:
        if self._field is not None:
            self.fields[self._field_name] = self._field.decode(errors="replace")
            self._field = None

    def _end(self) -> None:
        self._is_ended = True


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise ApiError(415, "send the file as multipart/form-data", code="unsupported_media_type")
    boundary = options.get(b"boundary")
    if not boundary:
        raise ApiError(400, "the multipart/form-data has no boundary", code="invalid_multipart")
    return boundary


async def _drain(body: AsyncIterator[bytes]) -> None:
    """Read on for a while."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_MAX_DRAIN_S):
            async for chunk in body:
                num_bytes += len(chunk)
                if num_bytes > _MAX_DRAINED:
                    return
    except TimeoutError:
        return
