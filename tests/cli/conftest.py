"""The command in the test's own process: a second faster than in one of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from batchllm.cli import main
from tests.cli.instant_engine import Settings, engine_starter
from tests.cli.jobs import Argument, Done

Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs ``batchllm`` with these arguments; keywords are `Settings` of its engine."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: Argument, **settings: Any) -> Done:
        monkeypatch.setattr("batchllm.cli.begin_engine", lambda _: nullcontext())
        monkeypatch.setattr("batchllm.cli.run._held_template", lambda _: nullcontext())
        monkeypatch.setattr("batchllm.cli.run._start_engine", engine_starter(Settings(**settings)))
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Done(status, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)
