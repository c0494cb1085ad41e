"""The batch API as one thing: its routes, its storage, and the threads that run batches.

Knows how the parts come together; not the application that the routes are put in, and not the engine.

INVARIANT: what was acknowledged to a client is on disk; a server that is stopped or killed goes on with it at the next
start.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import fastapi
from fastapi import Request

from batchllm.errors import ConfigError
from batchllm.offline.job import JobMaker
from batchllm.offline.jobs import single_job
from batchllm.offline.runtime import Runtime
from batchllm.offline.token_store import TokenMemory
from batchllm.server.api_errors import ApiError, is_foreign
from batchllm.server.batch_routes import BatchRoutes
from batchllm.server.batch_run import BatchContext
from batchllm.server.batch_store import BatchStore
from batchllm.server.database import FLAG, Database
from batchllm.server.dispatcher import Dispatcher
from batchllm.server.file_routes import FileRoutes
from batchllm.server.file_store import FileStore
from batchllm.server.idempotency import IdempotencyKeys
from batchllm.server.metrics import BatchMetrics
from batchllm.server.options import BatchOptions
from batchllm.server.page import BatchPage, LiveNumbers
from batchllm.server.page.content import PageContent
from batchllm.server.placement import Placement


class BatchService:
    """Files and batches of one server.

    Args:
        options: Limits, and the storage.
        page_key: What to sign in with to see the page; None where everybody may.

    Attributes:
        router: The routes ``/v1/files`` and ``/v1/batches``; they answer 503 before `start`.
        page: The page at ``/batch``.

    Raises:
        ConfigError: Another process has the storage, or it cannot be written.
    """

    def __init__(self, options: BatchOptions, *, page_key: str | None = None) -> None:
        self._options = options
        self._metrics: BatchMetrics | None = None
        self._dispatcher: Dispatcher | None = None
        self._database = Database(options.storage)
        try:
            (options.storage / "jobs").mkdir(exist_ok=True)
            self._files = FileStore(self._database, options.storage)
        except (OSError, sqlite3.Error) as error:
            self._database.close()
            raise ConfigError(f"{FLAG} {options.storage}: cannot be used: {error}") from error
        self._batches = BatchStore(self._database)
        keys = IdempotencyKeys(self._database)
        file_routes = FileRoutes(
            self._database,
            self._files,
            keys,
            options=options,
            check_open=self._check_open,
            metrics=lambda: self._metrics,
        )
        batch_routes = BatchRoutes(
            self._database, self._batches, self._files, keys, check_open=self._check_open, wake=self._wake
        )
        self.router = fastapi.APIRouter()
        self.router.include_router(file_routes.router)
        self.router.include_router(batch_routes.router)
        self._content = PageContent(self._batches, self._files)
        self.page = BatchPage(
            self._content,
            file_routes,
            batch_routes,
            is_open=lambda: self._dispatcher is not None,
            key=page_key,
        )

    def start(
        self,
        start_engine: Callable[[], Runtime],
        make_job: JobMaker = single_job,
        metrics: BatchMetrics | None = None,
        numbers: LiveNumbers | None = None,
        give_planned: Callable[[float], None] = lambda share: None,
        make_placement: Callable[[], Placement] | None = None,
    ) -> None:
        """Open the routes, and go on with batches that have not ended. Returns at once.

        Args:
            start_engine: Gives the engine, which all batches share, when it is up; called for each run of a batch, and
                when the engine has died under one.
            make_job: Makes the jobs of runners.
            metrics: Told what happens.
            numbers: How the engine is doing, for the page.
            give_planned: Lets batches have this part of what they and live requests compete for.
            make_placement: Makes what is told where the rows of a batch go, where there are several engines.
        """
        assert self._dispatcher is None, "started twice"
        self._metrics = metrics
        context = BatchContext(
            options=self._options,
            database=self._database,
            files=self._files,
            batches=self._batches,
            start_engine=start_engine,
            make_job=make_job,
            token_memory=TokenMemory(self._options.max_token_bytes, self._options.max_active_jobs),
            metrics=metrics,
            make_placement=make_placement,
        )
        self._content.activity, self._content.numbers = context.activity, numbers
        self._dispatcher = Dispatcher(context, give_planned)
        self._dispatcher.start()

    def stop(self, *, is_crash: bool = False) -> None:
        """Stop running batches at once; what they have recorded stays, and the next start goes on with them.

        Waits for their threads, which may need the engine's event loop meanwhile. Stopping twice does nothing.

        Args:
            is_crash: The engine has died. A batch to which that happens again and again, before one more of its rows
                is recorded, is given up.
        """
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.stop(is_crash=is_crash)

    def close(self) -> None:
        """Stop, and give the storage back. Closing twice does nothing."""
        self.stop()
        self._database.close()

    async def _check_open(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is not None and is_foreign(origin, request.headers.get("host")):
            # SGLang lets pages of any origin ask; these routes read and delete what is stored.
            message = f"pages of {origin[:100]} may not use files and batches; ask from a program, or from this host"
            raise ApiError(403, message, code="cross_origin")
        if self._dispatcher is None:
            raise ApiError(503, "the server is starting or stopping; try again soon", code="not_ready")

    def _wake(self) -> None:
        dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.wake()
