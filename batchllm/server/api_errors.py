"""Errors as OpenAI's clients know them, for routes in an application that is not ours.

Knows HTTP statuses and the error object; not what the routes do.

INVARIANT: whatever a request holds, its answer is an object with a fitting status; what a route raises reaches the
application only where it is a mistake of ours.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from batchllm.errors import BatchLLMError
from batchllm.server.objects import ErrorResponse

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ApiError(BatchLLMError):
    """A request that is answered with an error.

    Args:
        status_code: HTTP status.
        message: What was wrong and what would be right.
        code: Stable machine-readable name.
        param: The parameter at fault, if one is.
    """

    def __init__(self, status_code: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.code = code
        self.param = param

    def response(self) -> JSONResponse:
        """The answer."""
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status_code)


class OpenAIRoute(APIRoute):
    """A route that answers every error itself."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except ApiError as error:
                return error.response()
            except RequestValidationError as error:
                return invalid(error).response()
            except ClientDisconnect:  # nobody will read it
                return ApiError(400, "the request was cut off", code="incomplete_request").response()
            except HTTPException as error:  # of FastAPI's own reading of a request
                return ApiError(error.status_code, str(error.detail), code="invalid_request").response()
            except MemoryError:
                logger.error("there is no memory for a request")
                message = "the server has no memory for this now; try again later"
                return ApiError(503, message, code="out_of_memory").response()
            except (OSError, sqlite3.Error) as error:
                return storage_fault(error).response()

        return answer


def is_foreign(origin: str | None, host: str | None) -> bool:
    """Whether a page of another host has sent the request: browsers name the origin.

    Args:
        origin: The header of that name; None where there is none.
        host: The header of that name.
    """
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != host
    except ValueError:  # it is no URL
        return True


def invalid(error: RequestValidationError | ValidationError) -> ApiError:
    """The first thing wrong with a request's parameters."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in ("body", "query", "header", "path")]
    param = ".".join(map(str, place)).encode(errors="replace").decode() or None
    kind = first["type"]
    if kind == "missing":
        return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param!r}", code="unknown_parameter", param=param)
    if kind == "model_type":
        found = {list: "an array", type(None): "null"}.get(type(first["input"]), "a value")
        return ApiError(400, f"the body must be an object, not {found}", code="invalid_value")
    what = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param}: {what}", code="invalid_value", param=param)


def storage_fault(error: Exception) -> ApiError:
    """The storage refuses; why, is for the server's log."""
    logger.error("the batch storage refuses: %r", error)
    if is_disk_full(error):
        return ApiError(507, "the server's disk is full; try again when there is room", code="storage_full")
    return ApiError(503, "the server cannot use its storage; try again later", code="storage_unavailable")


def is_disk_full(error: BaseException | None) -> bool:
    """The error, or what has caused it, says that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def errors(*status_codes: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside 200, for its description."""
    codes: tuple[int | str, ...] = (400, 401, *status_codes, 503, "4XX")
    return {code: {"model": ErrorResponse} for code in codes}


def unknown_file(file_id: str, param: str) -> ApiError:
    """The answer to an id that no file has."""
    return ApiError(404, f"No such File object: {file_id[:64]}", code="file_not_found", param=param)


def unknown_cursor(after: str | None) -> ApiError:
    """The answer to a page after something that is not there."""
    return ApiError(404, f"after: there is no {after!r}", code="invalid_cursor", param="after")
