"""A real server in processes of its own, and what tests ask of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from openai import OpenAI

from batchllm.distributed.actor import free_port
from tests import forked
from tests.environment import WITHOUT_STREAMS, of_user
from tests.plain_http import read_certificates_once

read_certificates_once()

KEY = "sk-test"
ENDED = ("completed", "failed", "expired", "cancelled")
_START_TIMEOUT_S = 240
_BATCH_TIMEOUT_S = 120


@dataclass
class Server:
    """One server at a time, on one storage."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | forked.Process | None = None
    flags: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=2)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self, *, is_forked: bool = True) -> None:
        """Start the command, forked from a process that has imported SGLang; or in an interpreter of its own."""
        environment = of_user()
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        environment |= {"TMPDIR": str(temporary), "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
        flags = ["--port", str(self.port), "--api-key", KEY, "--enable-metrics", "--max-total-tokens", "4096"]
        flags += ["--random-seed", "7", "--batch-storage", str(self.folder / "storage"), *self.flags]
        with (self.folder / "log").open("ab") as log:
            if is_forked:
                self.process = forked.Process(
                    "batchllm.cli:command",
                    ["serve", *flags],
                    environment=environment,
                    stdout=log,
                    stderr=log,
                    needs_sglang=True,
                )
            else:
                # As a daemon may be started: nothing to read, nobody who listens.
                self.process = subprocess.Popen(
                    [*WITHOUT_STREAMS, sys.executable, "-W", "ignore", "-m", "batchllm.launch_server", *flags],
                    stderr=log,
                    env=environment,
                )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log[-3000:]
            try:
                self.get("/health")
                return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError(self.log[-3000:])

    def get(self, path: str, *, key: str | None = KEY) -> str:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        response = httpx.get(self.url + path, headers=headers, timeout=60)
        response.raise_for_status()
        return response.text

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        status = self.process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, alive
        self.process = None
        return status

    def metric(self, name: str, **labels: str) -> float:
        """Sum of what is said of this name with these labels."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            if re.match(rf"{name}[ {{]", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


@contextmanager
def running(folder: Path, *flags: str, is_forked: bool = True) -> Iterator[Server]:
    """A server with these flags, ended at last if a test has not ended it."""
    server = Server(folder, flags=list(flags))
    server.start(is_forked=is_forked)
    yield server
    server.client.close()
    if server.process is not None:
        server.end()


def rows(num_documents: int, num_questions: int, **body: Any) -> list[dict[str, Any]]:
    """Questions to documents of 200 tokens, the documents in turn."""
    made = []
    for question in range(num_questions):
        for document in range(num_documents):
            prompt = [100 + document] * 200 + [500 + question, 700 + document]
            fields = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 8} | body
            row_id = f"{document}-{question}"
            made.append({"custom_id": row_id, "method": "POST", "url": "/v1/completions", "body": fields})
    return made


def create(server: Server, lines: list[dict[str, Any]], **options: Any) -> openai.types.Batch:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = server.client.files.create(file=("rows.jsonl", content), purpose="batch")
    options = {"endpoint": "/v1/completions", "completion_window": "24h"} | options
    return server.client.batches.create(input_file_id=file.id, **options)


def wait(server: Server, batch_id: str) -> openai.types.Batch:
    deadline = time.monotonic() + _BATCH_TIMEOUT_S
    while (batch := server.client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch


def wait_for_answers(server: Server, batch_id: str, num_rows: int) -> None:
    deadline = time.monotonic() + _BATCH_TIMEOUT_S
    while server.client.batches.retrieve(batch_id).request_counts.completed < num_rows:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(server: Server, file_id: str | None) -> dict[str, dict[str, Any]]:
    if file_id is None:
        return {}
    records = [json.loads(line) for line in server.client.files.content(file_id).text.splitlines()]
    by_id = {record["custom_id"]: record for record in records}
    assert len(by_id) == len(records), "a row was answered twice"
    return by_id


def in_a_batch(server: Server, url: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The response to each of these bodies in one batch."""
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    batch = wait(server, create(server, lines, endpoint=url).id)
    assert batch.status == "completed", batch
    found = answers(server, batch.output_file_id) | answers(server, batch.error_file_id)
    return [found[str(i)]["response"] for i in range(len(bodies))]


def text_of(record: dict[str, Any]) -> str:
    return str(record["response"]["body"]["choices"][0]["text"])


def long_stream(server: Server, max_tokens: int) -> Iterator[Any]:
    """Pieces of an answer of so many tokens."""
    return iter(
        server.client.completions.create(
            model="m", prompt="a b c", stream=True, max_tokens=max_tokens, extra_body={"ignore_eos": True}
        )
    )
