"""The batch API over HTTP on an engine that answers at once; everything above the runtime's seam is the real thing.

    python tests/server/instant_server.py STORAGE PORT_FILE

The port, any that is free, is written to PORT_FILE when requests are served. The engine's `Settings` are taken from the
environment, as those of `tests.cli.instant_engine`. A prompt that ends with `KILLER` ends the process.

Knows the runtime's seam, and how a server is started; claims nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import fastapi
import uvicorn

from batchllm.offline.fake_runtime import FakeJob
from batchllm.offline.job import JobMaker
from batchllm.offline.jobs import single_job
from batchllm.offline.runtime import Runtime
from batchllm.server import BatchMetrics, BatchOptions, BatchService, LiveNumbers
from tests.cli.instant_engine import InstantRuntime, Settings

if TYPE_CHECKING:
    import openai

T = TypeVar("T")
START_S = 30
KILLER = 998


class SharedRuntime(InstantRuntime):
    """Many jobs at once, each of which gets as many answers as the settings say."""

    def num_answered_for(self, job: FakeJob) -> int:
        return job.num_answered

    async def before_answers(self, job: FakeJob) -> None:
        if any(request.prompt[-1] == KILLER for request in job.outstanding.values()):
            os.kill(os.getpid(), signal.SIGKILL)
        await super().before_answers(job)


class Api:
    """A server in a thread of this process.

    Attributes:
        url: Where it listens.
        service: What it serves.
    """

    def __init__(
        self,
        options: BatchOptions,
        runtime: Runtime,
        *,
        is_started: bool = True,
        metrics: BatchMetrics | None = None,
        page_key: str | None = None,
        make_job: JobMaker = single_job,
        numbers: LiveNumbers | None = None,
    ) -> None:
        self.service = BatchService(options, page_key=page_key)
        self.storage = options.storage
        app = fastapi.FastAPI()
        app.include_router(self.service.router)
        served: Any = self.service.page.before(app)
        self._server = uvicorn.Server(uvicorn.Config(served, port=0, log_level="warning", timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._is_up = True
        if is_started:
            self.service.start(lambda: runtime, make_job, metrics, numbers)

    @cached_property
    def client(self) -> openai.OpenAI:
        """A real client of it, which tries nothing twice."""
        import openai  # takes a second, which a process of its own does without

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        """End in good order. Ending twice does nothing."""
        if self._is_up:
            self._is_up = False
            if "client" in self.__dict__:
                self.client.close()
            self.service.stop()
            self._server.should_exit = True
            self._thread.join()
            self.service.close()

    def wait(self) -> None:
        """Return when the server has ended; signals are answered meanwhile."""
        while self._thread.is_alive():
            self._thread.join(0.05)


def serve(arguments: list[str]) -> None:
    """Serve a storage until SIGTERM; the port is written to a file."""
    storage, port_file = arguments
    options: dict[str, Any] = {"grace_s": 0.2}
    api = Api(BatchOptions(storage=Path(storage), **options), SharedRuntime(Settings.from_environment()))
    unfinished = Path(f"{port_file}.new")
    unfinished.write_text(str(api.port))
    unfinished.rename(port_file)
    signal.signal(signal.SIGTERM, lambda *_: api.stop())
    api.wait()


if __name__ == "__main__":
    serve(sys.argv[1:])
