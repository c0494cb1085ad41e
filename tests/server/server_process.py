"""Servers of the batch API on the instant engine, in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import openai

from tests import forked
from tests.cli.instant_engine import Settings
from tests.cli.jobs import environment_of
from tests.server.api_rows import until


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, base: Path, **engine: Any) -> None:
        port_file = base / "port"
        port_file.unlink(missing_ok=True)
        self.process = forked.Process(
            "tests.server.instant_server:serve",
            [str(base / "storage"), str(port_file)],
            environment=environment_of(Settings(**engine)),
        )
        until(lambda: port_file.exists() or self.process.poll() is not None, "the server does not start")
        port = port_file.read_text() if port_file.exists() else "1"
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()


class ServerProcesses:
    """Servers that run one after the other on one storage, ended at the end."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._all: list[ServerProcess] = []

    def start(self, **engine: Any) -> ServerProcess:
        self._all.append(ServerProcess(self.base, **engine))
        return self._all[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
