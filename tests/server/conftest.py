"""Servers of the batch API for the tests, ended when a test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm.server import BatchMetrics, BatchOptions, LiveNumbers
from tests.cli.instant_engine import Settings
from tests.plain_http import read_certificates_once
from tests.server.instant_server import Api, SharedRuntime

read_certificates_once()

Serve = Callable[..., Api]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a server on a storage of this test.

    ``engine`` are the `Settings` of its engine, where no ``runtime`` is given; other keywords are its `BatchOptions`.
    """
    running: list[Api] = []

    def start(
        *,
        engine: dict[str, Any] | None = None,
        runtime: SharedRuntime | None = None,
        is_started: bool = True,
        metrics: BatchMetrics | None = None,
        page_key: str | None = None,
        numbers: LiveNumbers | None = None,
        **options: Any,
    ) -> Api:
        options = {"storage": tmp_path / "storage", "grace_s": 0.2} | options
        runtime = runtime or SharedRuntime(Settings(**(engine or {})))
        api = Api(
            BatchOptions(**options),
            runtime,
            is_started=is_started,
            metrics=metrics,
            page_key=page_key,
            numbers=numbers,
        )
        running.append(api)
        return api

    yield start
    for api in running:
        api.stop()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A server that answers at once, with what other tests of the file have left there."""
    api = Api(BatchOptions(storage=tmp_path_factory.mktemp("storage")), SharedRuntime(Settings()))
    yield api
    api.stop()
