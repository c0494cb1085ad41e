"""``/v1/files``: files up, listed, down and gone.

Knows requests and answers; what a file is, is `file_store`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, BinaryIO

import fastapi
from fastapi import Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from batchllm.server.api_errors import ApiError, OpenAIRoute, errors, unknown_cursor, unknown_file
from batchllm.server.database import Database
from batchllm.server.file_store import FileInUseError, FileRecord, FileStore, Order, UnknownCursorError
from batchllm.server.idempotency import IdempotencyKey, IdempotencyKeys, request_digest
from batchllm.server.metrics import BatchMetrics
from batchllm.server.objects import (
    INPUT_PURPOSE,
    MAX_EXPIRY_S,
    MIN_EXPIRY_S,
    FileDeleted,
    FileList,
    FileObject,
)
from batchllm.server.options import BatchOptions
from batchllm.server.upload import Upload

_PIECE_LEN = 1 << 18
_MAX_PAGE = 10_000
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [INPUT_PURPOSE]},
                        _ANCHOR: {"type": "string", "enum": ["created_at"]},
                        _SECONDS: {"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S},
                    },
                    "dependentRequired": {_ANCHOR: [_SECONDS], _SECONDS: [_ANCHOR]},
                    "additionalProperties": False,
                }
            }
        },
    }
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "description": "The file's bytes",
    }
}


class FileRoutes:
    """The routes of files.

    Args:
        database: Has the records.
        files: The files.
        keys: Keys of requests that were sent before.
        options: Limits.
        check_open: Called first; raises where nothing is served.
        metrics: Gives the metrics, once there are any.
    """

    def __init__(
        self,
        database: Database,
        files: FileStore,
        keys: IdempotencyKeys,
        *,
        options: BatchOptions,
        check_open: Callable[[Request], Awaitable[None]],
        metrics: Callable[[], BatchMetrics | None],
    ) -> None:
        self._database = database
        self._files = files
        self._keys = keys
        self._options = options
        self._num_open = 0
        self._num_incoming = 0
        self._turn = threading.Lock()
        self._metrics = metrics
        self.router = fastapi.APIRouter(
            prefix="/v1/files", route_class=OpenAIRoute, dependencies=[Depends(check_open)], tags=["files"]
        )
        add = self.router.add_api_route
        add("", self.upload, methods=["POST"], openapi_extra=_FORM, responses=errors(409, 413, 415, 507))
        add("", self._list, methods=["GET"], responses=errors(404))
        add("/{file_id}", self._get, methods=["GET"], responses=errors(404))
        add("/{file_id}", self._delete, methods=["DELETE"], responses=errors(404, 409))
        add(
            "/{file_id}/content",
            self.content,
            methods=["GET"],
            response_class=StreamingResponse,
            responses=_CONTENT | errors(404),
        )

    async def upload(self, request: Request, idempotency_key: IdempotencyKey = None) -> FileObject:
        """Upload a file."""
        if self._num_open >= self._options.max_open_uploads:
            message = f"{self._num_open} files are being uploaded; try again soon"
            raise ApiError(503, message, code="too_many_uploads")
        self._num_open += 1
        try:
            return await self._receive(request, idempotency_key)
        finally:
            self._num_open -= 1

    async def _receive(self, request: Request, idempotency_key: str | None) -> FileObject:
        options = self._options
        await run_in_threadpool(self._check_room, 1)  # where nothing fits, nothing is received
        stream, path = await run_in_threadpool(self._files.open_incoming)
        taken: list[int] = []

        def take_room(num_bytes: int) -> None:
            taken.append(num_bytes)
            self._take_incoming(num_bytes)
            self._check_room(self._num_incoming)  # of all that come at once

        try:
            with stream:
                upload = Upload(stream, path, options.max_file_bytes, options.upload_idle_s, take_room)
                await upload.receive(request)
            lifetime_s = _lifetime_s(upload.fields)
            record = await run_in_threadpool(self._add, upload, lifetime_s, idempotency_key)
        finally:
            self._take_incoming(-sum(taken))
            path.unlink(missing_ok=True)
        metrics = self._metrics()
        if metrics is not None:
            metrics.add_upload(upload.num_bytes)
        return _object(record)

    def _add(self, upload: Upload, lifetime_s: int | None, key: str | None) -> FileRecord:
        assert upload.filename is not None
        digest = request_digest(upload.filename, upload.fields, upload.digest)
        found = self._find(key, digest)
        if found is not None:
            return found
        file_id = self._files.place(upload.path)
        try:
            with self._database.transaction():
                found = self._find(key, digest)  # two at once
                if found is None:
                    self._check_room(upload.num_bytes)
                    self._keys.add("file", key, digest, file_id)
                    return self._files.add(
                        file_id, filename=upload.filename, purpose=INPUT_PURPOSE, lifetime_s=lifetime_s
                    )
        except BaseException:
            self._files.drop(file_id)
            raise
        self._files.drop(file_id)
        return found

    def _take_incoming(self, num_bytes: int) -> None:
        with self._turn:
            self._num_incoming += num_bytes

    def _check_room(self, num_bytes: int) -> None:
        limit = self._options.storage_limit
        if limit is not None and self._files.num_bytes() + num_bytes > limit:
            message = f"files may have {limit} bytes together; delete some, or wait until they expire"
            raise ApiError(507, message, code="storage_full")

    def _find(self, key: str | None, digest: str) -> FileRecord | None:
        file_id = self._keys.find("file", key, digest)
        return None if file_id is None else self._files.get(file_id)  # it may have expired: then it is made again

    def _list(
        self,
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
        order: Order = "desc",
        after: Annotated[str | None, Query(max_length=64)] = None,
    ) -> FileList:
        """List files."""
        try:
            records, has_more = self._files.page(purpose=purpose, after=after, limit=limit, order=order)
        except UnknownCursorError:
            raise unknown_cursor(after) from None
        data = list(map(_object, records))
        return FileList(
            data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
        )

    def _get(self, file_id: str) -> FileObject:
        """Say what is known of a file."""
        return _object(self.need(file_id))

    def _delete(self, file_id: str) -> FileDeleted:
        """Delete a file."""
        try:
            if self._files.delete(file_id):
                return FileDeleted(id=file_id)
        except FileInUseError:
            message = f"{file_id} is the input of a batch that has not ended; cancel that, or wait"
            raise ApiError(409, message, code="file_in_use", param="file_id") from None
        raise unknown_file(file_id, "file_id")

    def content(self, file_id: str) -> StreamingResponse:
        """Give a file's bytes."""
        record = self.need(file_id)
        try:
            stream = self._files.path(record.id).open("rb", buffering=0)
        except FileNotFoundError:  # deleted in this moment
            raise unknown_file(file_id, "file_id") from None
        return _OpenFileResponse(stream, record.num_bytes)

    def need(self, file_id: str) -> FileRecord:
        """The record of a file.

        Raises:
            ApiError: There is no such file.
        """
        record = self._files.get(file_id)
        if record is None:
            raise unknown_file(file_id, "file_id")
        return record


class _OpenFileResponse(StreamingResponse):
    """A file that was open before the answer began: deleted meanwhile, it is still sent whole."""

    def __init__(self, stream: BinaryIO, num_bytes: int) -> None:
        super().__init__(
            _pieces(stream), media_type="application/octet-stream", headers={"content-length": str(num_bytes)}
        )
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_PIECE_LEN):
        yield piece


def _object(record: FileRecord) -> FileObject:
    return FileObject.model_validate(
        {
            "id": record.id,
            "bytes": record.num_bytes,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
            "filename": record.filename,
            "purpose": record.purpose,
        }
    )


def _lifetime_s(fields: dict[str, str]) -> int | None:
    """How long the file shall live by the other fields of the form, in seconds; None for ever."""
    for name in fields:
        if name not in ("purpose", _ANCHOR, _SECONDS):
            raise ApiError(400, f"unknown parameter {name!r}", code="unknown_parameter", param=name)
    purpose = fields.get("purpose")
    if purpose is None:
        raise ApiError(400, "purpose is missing", code="missing_required_parameter", param="purpose")
    if purpose != INPUT_PURPOSE:
        raise ApiError(400, f'purpose must be "batch", not {purpose[:64]!r}', code="invalid_value", param="purpose")
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise ApiError(400, f'{_ANCHOR} must be "created_at"', code="invalid_value", param=_ANCHOR)
    digits = seconds or ""
    if not (
        digits.isascii() and digits.isdecimal() and len(digits) < 10 and MIN_EXPIRY_S <= int(digits) <= MAX_EXPIRY_S
    ):
        message = f"{_SECONDS} must be a whole number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}"
        raise ApiError(400, message, code="invalid_value", param=_SECONDS)
    return int(digits)
