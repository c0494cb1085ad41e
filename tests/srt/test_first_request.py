"""Claims about the first request of a server: it says whether the server is up, and holds up no end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sglang.srt.entrypoints.http_server as upstream

from batchllm.srt.entrypoints.first_request import FirstRequest

ARGS: Any = object()


@pytest.mark.parametrize("is_up", [True, False])
def test_what_it_finds_is_told(monkeypatch: pytest.MonkeyPatch, is_up: bool) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(upstream, "_execute_server_warmup", lambda args: asked.append(args) or is_up)
    assert FirstRequest().ask(ARGS) is is_up
    assert asked == [ARGS]


def test_a_server_that_is_to_end_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, never = threading.Event(), threading.Event()

    def ask(args: Any) -> bool:
        begun.set()
        return never.wait()

    monkeypatch.setattr(upstream, "_execute_server_warmup", ask)
    request = FirstRequest()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(request.ask, ARGS)
        assert begun.wait(30)
        request.cut_off()
        assert answer.result(30) is False
    never.set()


def test_a_server_that_was_to_end_before_it_was_asked_is_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(upstream, "_execute_server_warmup", lambda args: never.wait())
    request = FirstRequest()
    request.cut_off()
    assert request.ask(ARGS) is False
    never.set()
