"""Claims about a server with LoRA adapters: batches and live requests name them alike."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from batchllm.default_model import default_model_path
from tests.live_server import KEY, Server, answers, create, long_stream, rows, running, text_of, wait, wait_for_answers
from tests.srt.adapters import make_adapter

pytestmark = pytest.mark.engine

HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPT = [7, 8, 9, 10]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(folder / name, base, seed=seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]) -> Iterator[Server]:
    """Adapters a and b at the start; two places, of which live requests are left one; it ends without waiting long."""
    paths = [f"{name}={adapters[name]}" for name in "ab"]
    flags = ["--grace", "1", "--max-loras-per-batch", "2", "--lora-paths", *paths]
    with running(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


def line(row_id: str, **body: Any) -> dict[str, Any]:
    fields = {"model": "m", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True} | body
    return {"custom_id": row_id, "method": "POST", "url": "/v1/completions", "body": fields}


def live(server: Server, body: dict[str, Any], url: str = "/v1/completions") -> httpx.Response:
    return httpx.post(server.url + url, json=body, headers=HEADERS, timeout=60)


def test_an_adapter_is_named_in_a_batch_as_live_and_answers_alike(server: Server) -> None:
    """By lora_path, behind a colon, or by the name that /v1/models lists; another name fails its row only."""
    forms: dict[str, dict[str, Any]] = {
        "base": {},
        "a-path": {"lora_path": "a"},
        "a-colon": {"model": "m:a"},
        "a-name": {"model": "a"},
        "b-name": {"model": "b"},
        "b-both": {"model": "m:b", "lora_path": "a"},
    }
    lines = [line(name, **body) for name, body in forms.items()]
    batch = wait(server, create(server, [*lines, line("x", lora_path="x"), line("y", model="m:y")]).id)
    assert batch.request_counts.failed == 2
    failed = answers(server, batch.error_file_id)
    assert {row_id: record["response"]["body"]["error"]["code"] for row_id, record in failed.items()} == {
        "x": "unknown_adapter",
        "y": "unknown_adapter",
    }
    found = {row_id: text_of(record) for row_id, record in answers(server, batch.output_file_id).items()}
    for row in lines:
        response = live(server, row["body"])
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == found[row["custom_id"]], row
    assert found["a-path"] == found["a-colon"] == found["a-name"]
    assert found["b-name"] == found["b-both"]
    assert len({found["base"], found["a-path"], found["b-name"]}) == 3
    assert live(server, line("", model="m:nobody")["body"]).status_code == 400
    assert {model.id for model in server.client.models.list().data} >= {"a", "b"}


def test_chats_name_adapters_too(server: Server) -> None:
    url = "/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8, "model": "a"}
    rows = [{"custom_id": "c", "method": "POST", "url": url, "body": body}]
    done = wait(server, create(server, rows, endpoint=url).id)
    of_batch = answers(server, done.output_file_id)["c"]["response"]["body"]["choices"][0]["message"]["content"]
    texts = {
        model: live(server, body | {"model": model}, url).json()["choices"][0]["message"]["content"]
        for model in ("a", "m")
    }
    assert of_batch == texts["a"] != texts["m"]


def test_a_live_request_does_not_wait_for_batches_to_leave_their_adapters(server: Server) -> None:
    """Two batches take turns, one by the base model, one by a; b answers meanwhile. Then a can be unloaded."""
    batches = [create(server, rows(4, 40, max_tokens=80, ignore_eos=True, **of)) for of in ({}, {"lora_path": "a"})]
    for batch in batches:
        wait_for_answers(server, batch.id, 1)
    assert live(server, line("", model="b")["body"]).status_code == 200
    refused = live(server, {"lora_name": "a"}, "/unload_lora_adapter")
    assert refused.status_code == 400 and "a batch runs with the adapter 'a'" in refused.text
    during = [server.client.batches.retrieve(batch.id).status for batch in batches]
    assert during == ["in_progress"] * 2, "the batches were too short for this test"
    for batch in batches:
        assert wait(server, batch.id).request_counts.completed == 160
    assert live(server, {"lora_name": "a"}, "/unload_lora_adapter").status_code == 200


def test_adapters_come_and_go_and_batches_know(server: Server, adapters: dict[str, Path]) -> None:
    assert wait(server, create(server, [line("c", model="m:c")]).id).request_counts.failed == 1
    loaded = live(server, {"lora_name": "c", "lora_path": str(adapters["c"])}, "/load_lora_adapter")
    assert loaded.status_code == 200, loaded.text
    batch = wait(server, create(server, [line("c", model="c")]).id)
    assert batch.request_counts.completed == 1
    of_live = live(server, line("", model="c")["body"]).json()["choices"][0]["text"]
    assert text_of(answers(server, batch.output_file_id)["c"]) == of_live
    assert live(server, {"lora_name": "c"}, "/unload_lora_adapter").status_code == 200
    assert wait(server, create(server, [line("c", model="m:c")]).id).request_counts.failed == 1


@pytest.mark.thorough
def test_an_engine_that_is_started_again_has_the_adapters_that_were_loaded(
    server: Server, adapters: dict[str, Path]
) -> None:
    """Those that came later too; requests for one that it lacked would end it."""
    assert live(server, {"lora_name": "c", "lora_path": str(adapters["c"])}, "/load_lora_adapter").status_code == 200
    bodies = [line("", model=name)["body"] for name in ("m", "b", "c")]
    before = [live(server, body).json()["choices"][0]["text"] for body in bodies]
    assert server.process is not None
    (scheduler,) = [
        child for child in psutil.Process(server.process.pid).children() if "scheduler" in " ".join(child.cmdline())
    ]
    scheduler.kill()
    scheduler.wait(30)
    deadline = time.monotonic() + 120
    while live(server, bodies[0]).status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [live(server, body).json()["choices"][0]["text"] for body in bodies] == before


def test_sigint_cuts_off_a_live_request_that_outlasts_the_grace(server: Server) -> None:
    """The exit status is that of a command that a signal has stopped."""
    assert server.process is not None
    stream = long_stream(server, max_tokens=3000)
    pieces = [next(stream)]
    server.process.send_signal(signal.SIGINT)
    with contextlib.suppress(httpx.HTTPError, openai.APIError):
        pieces += stream
    assert len(pieces) < 3000
    assert server.process.wait(30) == 3
    server.process = None
