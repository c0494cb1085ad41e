"""A server with two real engines on a Ray of its own: batches over both, live requests beside them, and an engine that
dies. The tests share the server, in this order.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.live_server import KEY, Server, answers, create, long_stream, rows, running, text_of, wait, wait_for_answers

pytestmark = pytest.mark.engine
_UP_AGAIN_S = 240


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), "--replicas", "2", "--demo-model", is_forked=False) as server:
        yield server


def _num_asked(server: Server) -> list[float]:
    """Live requests that each engine has answered so far."""
    return [server.metric("sglang:num_requests_total", replica=str(engine)) for engine in (0, 1)]


def test_both_engines_are_up_and_nobody_is_answered_without_the_key(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "replicas": 2, "up": 2}
    for path in ("/v1/models", "/v1/batches", "/v1/files"):
        assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(server.url + path, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_batch_runs_on_both_engines_and_answers_what_live_requests_do(server: Server) -> None:
    """Of prompts no more is computed than the optimum and what the plan pays for cuts: documents stay whole."""
    lines = rows(8, 12)
    batch = wait(server, create(server, lines).id)
    assert batch.status == "completed" and batch.request_counts is not None
    assert batch.request_counts.completed == len(lines)
    found = answers(server, batch.output_file_id)
    num_optimal = server.metric("batchllm_planned_prompt_tokens", of="optimum")
    num_computed = server.metric("batchllm_planned_prompt_tokens", of="computed")
    assert num_optimal <= num_computed <= num_optimal + 200 * 3
    before = _num_asked(server)
    for line in lines[::9]:
        answer = server.client.completions.create(**line["body"])
        assert answer.choices[0].text == text_of(found[line["custom_id"]])
    assert all(now > then for now, then in zip(_num_asked(server), before, strict=True))


def test_a_live_request_reads_what_a_batch_has_computed_in_one_of_the_engines(server: Server) -> None:
    """A document on each engine; of one after another live request, none of which has been asked before."""
    lines = [line for line in rows(10, 100, max_tokens=80, ignore_eos=True) if line["custom_id"] >= "8"]
    batch = create(server, lines)
    wait_for_answers(server, batch.id, 30)
    for line in lines[:2]:
        fields = {"input_ids": [*line["body"]["prompt"][:200], 3], "sampling_params": {"max_new_tokens": 1}}
        answer = httpx.post(f"{server.url}/generate", json=fields, headers={"authorization": f"Bearer {KEY}"}).json()
        assert answer["meta_info"]["cached_tokens"] == 200
    assert server.client.batches.retrieve(batch.id).status == "in_progress"
    assert wait(server, batch.id).status == "completed"


def test_live_requests_with_one_beginning_go_to_one_engine(server: Server) -> None:
    before = _num_asked(server)
    for number in range(6):
        messages: Any = [{"role": "system", "content": "Answer in one word. " * 30}]
        messages.append({"role": "user", "content": str(number)})
        server.client.chat.completions.create(model="m", messages=messages, max_tokens=2)
    asked = [now - then for now, then in zip(_num_asked(server), before, strict=True)]
    assert sorted(asked) == [0, 6]


def test_an_engine_that_dies_costs_no_row_and_another_takes_its_place(server: Server) -> None:
    """Live requests are answered meanwhile, or told when to come again."""
    batch = create(server, rows(12, 40, max_tokens=24))
    wait_for_answers(server, batch.id, 40)
    assert server.process is not None
    processes = psutil.Process(server.process.pid).children(recursive=True)
    next(p for p in processes if "scheduler" in " ".join(p.cmdline())).kill()
    statuses = Counter[int]()
    deadline = time.monotonic() + _UP_AGAIN_S
    while "is gone" not in server.log or httpx.get(f"{server.url}/health").json()["up"] < 2:
        assert time.monotonic() < deadline, server.log[-3000:]
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "m", "prompt": f"question {statuses.total()}", "max_tokens": 2},
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        statuses[answer.status_code] += 1
        assert answer.status_code == 200 or "retry-after" in answer.headers
    assert statuses.keys() <= {200, 503} and statuses[200]
    done = wait(server, batch.id)
    assert done.status == "completed"
    found = answers(server, done.output_file_id)
    assert len(found) == 12 * 40 and done.error_file_id is None


def test_sigterm_lets_live_requests_finish_and_leaves_nothing(server: Server) -> None:
    pieces = long_stream(server, 60)
    next(pieces)
    batch = create(server, rows(10, 60, max_tokens=40))
    wait_for_answers(server, batch.id, 1)
    assert server.end() == 0
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"
    assert not os.listdir(server.folder / "tmp")
