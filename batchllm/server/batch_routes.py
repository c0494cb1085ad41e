"""``/v1/batches``: batches begun, looked at, listed and cancelled.

Knows requests and answers; what a batch is, is `batch_store`'s.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import fastapi
import orjson
from fastapi import Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from batchllm.server.api_errors import ApiError, OpenAIRoute, errors, invalid, unknown_cursor, unknown_file
from batchllm.server.batch_store import BatchRecord, BatchStore
from batchllm.server.database import Database
from batchllm.server.file_store import FileStore, UnknownCursorError
from batchllm.server.idempotency import IdempotencyKey, IdempotencyKeys, request_digest
from batchllm.server.objects import (
    ACTIVE_STATUSES,
    INPUT_PURPOSE,
    BatchCreate,
    BatchDeleted,
    BatchErrors,
    BatchList,
    BatchObject,
    BatchUsage,
    InputTokensDetails,
    RequestCounts,
)

_MAX_BODY_LEN = 1 << 18
_MAX_PAGE = 100


def _body_schema() -> dict[str, Any]:
    schema = BatchCreate.model_json_schema()
    (expiry,) = schema.pop("$defs").values()
    schema["properties"]["output_expires_after"]["anyOf"][0] = expiry
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class BatchRoutes:
    """The routes of batches.

    Args:
        database: Has the records.
        batches: The batches.
        files: The files.
        keys: Keys of requests that were sent before.
        check_open: Called first; raises where nothing is served yet.
        wake: Called when a batch has been begun or cancelled.
    """

    def __init__(
        self,
        database: Database,
        batches: BatchStore,
        files: FileStore,
        keys: IdempotencyKeys,
        *,
        check_open: Callable[[Request], Awaitable[None]],
        wake: Callable[[], None],
    ) -> None:
        self._database = database
        self._batches = batches
        self._files = files
        self._keys = keys
        self._wake = wake
        self.router = fastapi.APIRouter(
            prefix="/v1/batches", route_class=OpenAIRoute, dependencies=[Depends(check_open)], tags=["batches"]
        )
        add = self.router.add_api_route
        add("", self._create, methods=["POST"], openapi_extra=_body_schema(), responses=errors(404, 409, 413, 415, 507))
        add("", self._list, methods=["GET"], responses=errors(404))
        add("/{batch_id}", self._get, methods=["GET"], responses=errors(404))
        add("/{batch_id}", self._delete, methods=["DELETE"], responses=errors(404, 409))
        add("/{batch_id}/cancel", self.cancel, methods=["POST"], responses=errors(404, 409))

    async def _create(self, request: Request, idempotency_key: IdempotencyKey = None) -> BatchObject:
        """Begin a batch."""
        asked = await _read_body(request)
        return _object(await run_in_threadpool(self.begin, asked, idempotency_key))

    def begin(self, asked: BatchCreate, key: str | None = None) -> BatchRecord:
        """Record a batch, and have it begun.

        Raises:
            ApiError: It cannot be.
        """
        record = self._add(asked, key)
        self._wake()
        return record

    def _add(self, asked: BatchCreate, key: str | None) -> BatchRecord:
        digest = request_digest(asked.model_dump())
        with self._database.transaction():
            batch_id = self._keys.find("batch", key, digest)
            if batch_id is not None:
                return self._need(batch_id)
            file = self._files.get(asked.input_file_id)
            if file is None:
                raise unknown_file(asked.input_file_id, "input_file_id")
            if file.purpose != INPUT_PURPOSE:
                message = f'{file.id} has the purpose "{file.purpose}"; upload the input with "{INPUT_PURPOSE}"'
                raise ApiError(400, message, code="invalid_file_purpose", param="input_file_id")
            record = self._batches.add(asked)
            self._keys.add("batch", key, digest, record.id)
            return record

    def _list(
        self,
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 20,
        after: Annotated[str | None, Query(max_length=64)] = None,
    ) -> BatchList:
        """List batches, the newest first."""
        try:
            records, has_more = self._batches.page(after=after, limit=limit)
        except UnknownCursorError:
            raise unknown_cursor(after) from None
        data = list(map(_object, records))
        return BatchList(
            data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
        )

    def _get(self, batch_id: str) -> BatchObject:
        """Say where a batch stands."""
        return _object(self._need(batch_id))

    def cancel(self, batch_id: str) -> BatchObject:
        """Cancel a batch; what it has answered so far is kept."""
        with self._database.transaction():
            self._need(batch_id)
            self._batches.move(batch_id, ("validating", "in_progress"), "cancelling")
            record = self._need(batch_id)
        if record.status != "cancelling":
            message = f"Cannot cancel a batch with status '{record.status}'."
            raise ApiError(409, message, code="batch_not_cancellable", param="batch_id")
        self._wake()
        return _object(record)

    def _delete(self, batch_id: str) -> BatchDeleted:
        """Forget a batch that has ended; the files of its results stay until they are deleted or expire."""
        with self._database.transaction():
            if self._need(batch_id).status in ACTIVE_STATUSES:
                message = f"{batch_id} has not ended; cancel it, or wait"
                raise ApiError(409, message, code="batch_not_ended", param="batch_id")
            self._batches.delete(batch_id)
        return BatchDeleted(id=batch_id)

    def _need(self, batch_id: str) -> BatchRecord:
        record = self._batches.get(batch_id)
        if record is None:
            message = f"No such Batch object: {batch_id[:64]}"
            raise ApiError(404, message, code="batch_not_found", param="batch_id")
        return record


async def _read_body(request: Request) -> BatchCreate:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the batch as application/json", code="unsupported_media_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_LEN:
            raise ApiError(413, f"the body is longer than {_MAX_BODY_LEN} bytes", code="body_too_large")
    try:
        return BatchCreate.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    except ValidationError as error:
        raise invalid(error) from error


def _object(record: BatchRecord) -> BatchObject:
    usage = record.usage
    same = (
        *("id", "endpoint", "model", "input_file_id", "completion_window", "status", "output_file_id", "error_file_id"),
        *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
        *("cancelling_at", "cancelled_at", "metadata"),
    )
    return BatchObject(
        **{name: getattr(record, name) for name in same},
        errors=None if record.errors is None else BatchErrors.model_validate({"data": record.errors}),
        request_counts=RequestCounts(total=record.num_rows, completed=record.num_answered, failed=record.num_failed),
        usage=None
        if usage is None
        else BatchUsage(
            input_tokens=usage["input"],
            input_tokens_details=InputTokensDetails(cached_tokens=usage["cached"]),
            output_tokens=usage["output"],
            total_tokens=usage["input"] + usage["output"],
        ),
    )
