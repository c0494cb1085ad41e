"""The page's routes, and what a browser must bring to be answered.

Knows requests, forms, cookies and headers; what is shown, is `view`'s, what is done, the API's routes'.

INVARIANT: a form changes something only if this host's own page has sent it; every answer forbids the browser to load
anything, to run what is not ours, and to be framed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, quote

from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from batchllm.server.api_errors import ApiError, invalid, is_foreign, storage_fault
from batchllm.server.batch_routes import BatchRoutes
from batchllm.server.file_routes import FileRoutes
from batchllm.server.objects import BatchCreate
from batchllm.server.page.content import PageContent
from batchllm.server.page.session import LIFETIME_S, Sessions

PATH = "/batch"
_MAX_FORM_LEN = 16_384
_MAX_FIELDS = 16
_Handler = Callable[[Request], Awaitable[Response]]


class BatchPage:
    """The page as an application of its own, in front of another one.

    It stands in front so that nothing of the other's is in its way: SGLang asks for a bearer's key, which a browser
    does not send, and lets pages of any origin read.

    Args:
        content: What is shown.
        files: Takes and gives files.
        batches: Begins and cancels batches.
        is_open: Whether forms are taken.
        key: What to sign in with; None where everybody may.
    """

    def __init__(
        self,
        content: PageContent,
        files: FileRoutes,
        batches: BatchRoutes,
        *,
        is_open: Callable[[], bool],
        key: str | None,
    ) -> None:
        self._content = content
        self._files = files
        self._batches = batches
        self._is_open = is_open
        self._sessions = Sessions(key) if key else None
        self._headers = {
            "content-security-policy": content.policy,
            "cache-control": "no-store",
            "referrer-policy": "same-origin",
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
        }
        get, post = self._get, self._post
        self._app = Starlette(
            routes=[
                Route(PATH, get(self._overview), methods=["GET"]),
                Route(f"{PATH}/sign-in", post(self._sign_in, is_open_to_all=True), methods=["POST"]),
                Route(f"{PATH}/sign-out", post(self._sign_out), methods=["POST"]),
                Route(f"{PATH}/files", post(self._upload), methods=["POST"]),
                Route(f"{PATH}/files/{{file_id}}", get(self._download), methods=["GET"]),
                Route(f"{PATH}/batches", post(self._begin), methods=["POST"]),
                Route(f"{PATH}/{{batch_id}}", get(self._batch), methods=["GET"]),
                Route(f"{PATH}/{{batch_id}}/cancel", post(self._cancel), methods=["POST"]),
            ]
        )

    def before(self, app: ASGIApp) -> ASGIApp:
        """An application that is this page below `PATH`, and ``app`` elsewhere."""

        async def either(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
            is_ours = scope["type"] == "http" and (path == PATH or path.startswith(f"{PATH}/"))
            await (self._app if is_ours else app)(scope, receive, send)

        return either

    # Who asks, and what is answered where something is wrong

    def _get(self, handle: _Handler) -> _Handler:
        async def answer(request: Request) -> Response:
            _check_origin(request, needs_one=False)
            return await handle(request) if self._is_signed_in(request) else self._ask_for_key(request)

        return self._guarded(answer)

    def _post(self, handle: _Handler, *, is_open_to_all: bool = False) -> _Handler:
        async def answer(request: Request) -> Response:
            _check_origin(request, needs_one=True)
            if not is_open_to_all and not self._is_signed_in(request):
                return self._ask_for_key(request)
            if not self._is_open():
                raise ApiError(503, "the server is starting or stopping; try again soon", code="not_ready")
            return await handle(request)

        return self._guarded(answer)

    def _guarded(self, handle: _Handler) -> _Handler:
        """Every answer with its headers; what goes wrong as a page that says so."""

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except ApiError as error:
                response = await self._refused(request, error)
            except ValidationError as error:
                response = await self._refused(request, invalid(error))
            except ClientDisconnect:  # nobody will read it
                response = Response(status_code=400)
            except (OSError, sqlite3.Error) as error:
                response = await self._refused(request, storage_fault(error))
            response.headers.update(self._headers)
            return response

        return answer

    async def _refused(self, request: Request, error: ApiError) -> Response:
        """The overview with what was wrong; alone where nobody is signed in, or the overview does not work either."""
        if error.status_code in (400, 404, 409, 413, 415, 507) and self._is_signed_in(request):
            return await self._overview(request, told=error.message, status_code=error.status_code)
        return self._page(request, "message", error.status_code, told=error.message)

    def _is_signed_in(self, request: Request) -> bool:
        return self._sessions is None or self._sessions.is_good(request.cookies.get(_cookie(request)))

    def _ask_for_key(self, request: Request, told: str = "") -> Response:
        return self._page(request, "sign_in", HTTPStatus.UNAUTHORIZED, told=told)

    def _page(self, request: Request, name: str, status_code: int = 200, **values: Any) -> Response:
        page = self._content.render(
            name,
            base=_base(request),
            here=_here(request),
            can_sign_out=self._sessions is not None and name != "sign_in" and self._is_signed_in(request),
            **values,
        )
        return HTMLResponse(page, status_code)

    # What is shown

    async def _overview(self, request: Request, told: str = "", status_code: int = 200) -> Response:
        def render() -> Response:
            is_told = bool(told)  # then the request's own parameters may be what is wrong
            after, chosen = (None, None) if is_told else map(request.query_params.get, ("after", "file"))
            return self._page(request, "overview", status_code, told=told, **self._content.overview(after, chosen))

        return await run_in_threadpool(render)

    async def _batch(self, request: Request) -> Response:
        def render() -> Response:
            return self._page(request, "batch", **self._content.batch(request.path_params["batch_id"]))

        return await run_in_threadpool(render)

    async def _download(self, request: Request) -> Response:
        record = await run_in_threadpool(self._files.need, request.path_params["file_id"])
        response = await run_in_threadpool(self._files.content, record.id)
        name = quote(record.filename.encode(errors="replace"), safe="")
        response.headers["content-disposition"] = f"attachment; filename=\"{record.id}.jsonl\"; filename*=UTF-8''{name}"
        return response

    # What is done

    async def _sign_in(self, request: Request) -> Response:
        given = (await _read_form(request)).get("key", "")
        if self._sessions is None or not self._sessions.is_key(given):
            return self._ask_for_key(request, "That is not the key that the server was started with.")
        response = RedirectResponse(_base(request), HTTPStatus.SEE_OTHER)
        response.set_cookie(
            _cookie(request),
            self._sessions.new_token(),
            max_age=LIFETIME_S,
            path=_base(request),
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    async def _sign_out(self, request: Request) -> Response:
        response = RedirectResponse(_base(request), HTTPStatus.SEE_OTHER)
        response.delete_cookie(_cookie(request), path=_base(request), httponly=True, samesite="strict")
        return response

    async def _upload(self, request: Request) -> Response:
        file = await self._files.upload(request)
        return RedirectResponse(f"{_base(request)}?file={file.id}#create", HTTPStatus.SEE_OTHER)

    async def _begin(self, request: Request) -> Response:
        asked = BatchCreate.model_validate(await _read_form(request))
        record = await run_in_threadpool(self._batches.begin, asked)
        return RedirectResponse(f"{_base(request)}/{record.id}", HTTPStatus.SEE_OTHER)

    async def _cancel(self, request: Request) -> Response:
        batch = await run_in_threadpool(self._batches.cancel, request.path_params["batch_id"])
        return RedirectResponse(f"{_base(request)}/{batch.id}", HTTPStatus.SEE_OTHER)


def _base(request: Request) -> str:
    return str(request.scope.get("root_path", "")) + PATH


def _here(request: Request) -> str:
    """What shows the same again: of a form that was refused, the overview."""
    if request.method == "POST":
        return _base(request)
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


def _cookie(request: Request) -> str:
    """Cookies are a host's, whatever the port: each of its servers has its own."""
    server = request.scope.get("server")
    return f"batchllm_session_{server[1] if server else ''}"


def _check_origin(request: Request, *, needs_one: bool) -> None:
    """Refuse what another page has a browser send. Browsers name the origin of every form that they post."""
    origin, host = request.headers.get("origin"), request.headers.get("host")
    is_own = host is not None and origin is not None and not is_foreign(origin, host)
    is_cross = request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
    if (needs_one and (is_cross or not is_own)) or (origin is not None and not is_own):
        message = "this was not sent by the page of this server; open the page and use its forms"
        raise ApiError(403, message, code="cross_origin")


async def _read_form(request: Request) -> dict[str, str]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise ApiError(415, "send the form as application/x-www-form-urlencoded", code="unsupported_media_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_LEN:
            raise ApiError(413, f"the form is longer than {_MAX_FORM_LEN} bytes", code="body_too_large")
    try:
        return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=_MAX_FIELDS))
    except ValueError as error:
        raise ApiError(400, f"the form has more than {_MAX_FIELDS} fields", code="invalid_form") from error
