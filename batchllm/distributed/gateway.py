"""Live requests in front of several engines, each of which answers by HTTP: an ASGI application that hands them on.

Knows paths and bodies of SGLang's server as far as they say which engine a request belongs to; every answer is the
engine's own. Must not know how engines come and go.

INVARIANT: a request that an engine may have begun is sent to no other: one that ends engines ends one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from urllib.parse import quote

import aiohttp
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from batchllm.distributed.beginnings import of_body
from batchllm.distributed.live_router import LiveRouter
from batchllm.trace.latency import LiveLatency

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 20
_CONNECT_TIMEOUT_S = 10.0
_TO_ONE = frozenset(
    [
        *("/", "/ping", "/generate", "/encode", "/classify", "/invocations", "/vertex_generate"),
        *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/v1/score", "/v1/rerank"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/audio/transcriptions"),
        *("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/parse_function_call", "/separate_reasoning"),
        *("/api/chat", "/api/generate", "/api/tags", "/api/show"),
        *("/v1/models", "/model_info", "/get_model_info", "/server_info", "/get_server_info"),
        *("/weight_version", "/get_weight_version", "/health_generate", "/docs", "/openapi.json"),
    ]
)
"""Paths that any engine answers alike."""
_TO_ALL = frozenset(
    ["/flush_cache", "/abort_request", "/freeze_gc", "/start_profile", "/stop_profile", "/configure_logging"]
)
"""Paths that mean every engine. What would change answers of those that are up and not of those to come is not here."""
_STATEFUL = "/v1/responses"
"""Its answers are kept in the process that gave them."""
_MODELS = "/v1/models/"
_OF_A_CONNECTION = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "expect",
    ]
)
"""Headers that are between two ends, not of the request."""
_OF_CONTENT = ("content-type", "content-encoding")


class Gateway:
    """The application.

    Args:
        urls: Where the engines that are up answer, by their numbers.
        api_key: What they ask for, in place of what the client gives; None: what that gives is for them to judge.
        latency: Told what streamed requests wait.
        router: Says which engine a request goes to; None: one that knows nothing but these requests.
    """

    def __init__(
        self,
        urls: Callable[[], Mapping[int, str]],
        *,
        api_key: str | None,
        latency: LiveLatency,
        router: LiveRouter | None = None,
    ) -> None:
        self._urls = urls
        self._api_key = api_key
        self._latency = latency
        self._router = router or LiveRouter()
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Give connections back."""
        if self._session is not None:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003, "reason": "not served by several replicas"})
            return
        body = await _read(receive)
        if body is None:
            return
        work = asyncio.create_task(self._answer(scope, body, send))
        gone = asyncio.create_task(_wait_until_gone(receive))
        try:
            done, _ = await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in (work, gone):  # nobody waits for the answer any more: the engine sees its connection closed
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def scrape(self) -> dict[int, str]:
        """What each engine that answers says of itself on ``/metrics``, by its number."""

        async def ask(engine: int, url: str) -> tuple[int, str]:
            try:
                async with self._http().get(f"{url}/metrics", headers={"accept-encoding": "identity"}) as answer:
                    return engine, await answer.text() if answer.status == HTTPStatus.OK else ""
            except aiohttp.ClientError as error:
                logger.warning("replica %d does not tell its metrics: %s", engine, error)
                return engine, ""

        return dict(await asyncio.gather(*(ask(engine, url) for engine, url in self._urls().items())))

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A connection of its own for each request: one that the engine has just closed would look like its end.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        path = scope["path"]
        if path in _TO_ALL:
            await (await self._ask_all(scope, body))(scope, _nothing_more, send)
        elif path in _TO_ONE or path.startswith((_STATEFUL, _MODELS)) or scope["method"] == "OPTIONS":
            await self._hand_on(scope, body, send)
        else:
            message = f"with several replicas the server has no {path[:200]}; ask a server with one engine for it"
            await _refusal(HTTPStatus.NOT_FOUND, message, "not_served_by_replicas")(scope, _nothing_more, send)

    async def _ask_all(self, scope: Scope, body: bytes) -> Response:
        """Every engine does it; the first refusal is the answer, or what all have said."""

        async def ask(url: str) -> Response:
            try:
                async with await self._request(url, scope, body) as answer:
                    headers = {name: answer.headers[name] for name in _OF_CONTENT if name in answer.headers}
                    return Response(await answer.read(), answer.status, headers)
            except aiohttp.ClientError:
                return _down()

        answers = await asyncio.gather(*(ask(url) for url in self._urls().values())) or [_down()]
        return next((answer for answer in answers if answer.status_code >= HTTPStatus.BAD_REQUEST), answers[0])

    async def _hand_on(self, scope: Scope, body: bytes, send: Send) -> None:
        """One engine answers. Another is asked only where the first was not reached at all."""
        untried, prompt = dict(self._urls()), of_body(body)
        if untried and scope["path"].startswith(_STATEFUL):
            untried = {min(untried): untried[min(untried)]}
        while untried:
            engine = self._router.begin(prompt, untried)
            try:
                answer = await self._request(untried.pop(engine), scope, body)
                async with answer:
                    await self._copy(answer, send)
                return
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                continue
            except aiohttp.ClientError:  # it has gone with the request
                break
            finally:
                self._router.end(engine)
        await _down()(scope, _nothing_more, send)

    async def _request(self, url: str, scope: Scope, body: bytes) -> aiohttp.ClientResponse:
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        headers = [(name, value) for name, value in headers if name.lower() not in _OF_A_CONNECTION | {"host"}]
        if self._api_key is not None:
            headers = [(name, value) for name, value in headers if name.lower() != "authorization"]
            headers.append(("authorization", f"Bearer {self._api_key}"))
        query = scope["query_string"].decode("latin-1")
        path = quote(scope["path"], safe="/:@!$&'()*+,;=~-._")
        return await self._http().request(
            scope["method"],
            URL(f"{url}{path}{'?' if query else ''}{query}", encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def _copy(self, answer: aiohttp.ClientResponse, send: Send) -> None:
        """Send an answer on as it comes. One that is cut off stays cut off, but for streams, which say why."""
        is_stream = answer.content_type == "text/event-stream"
        headers = [(name.lower(), value) for name, value in answer.raw_headers]
        left_out = _OF_A_CONNECTION - {"content-length"}
        headers = [(name, value) for name, value in headers if name.decode("latin-1") not in left_out]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        began = last = time.monotonic()
        try:
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if is_stream:
                    now = time.monotonic()
                    wait = self._latency.first_token if last == began else self._latency.between_tokens
                    wait.add(now - last, now_s=now)
                    last = now
        except aiohttp.ClientError:
            if not is_stream:
                return
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % bytes(_down().body)})
            return
        await send({"type": "http.response.body", "body": b""})


async def _read(receive: Receive) -> bytes | None:
    """The body; None where the client has gone before its end."""
    pieces = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing_more() -> Message:
    """The body has been read."""
    return {"type": "http.request", "body": b"", "more_body": False}


def _refusal(status: HTTPStatus, message: str, code: str) -> JSONResponse:
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def _down() -> JSONResponse:
    message = "the engine has ended, and another one is started; send the request again"
    answer = _refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, "engine_down")
    answer.headers["retry-after"] = str(RETRY_AFTER_S)
    return answer
