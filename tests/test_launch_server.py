"""Claims about the server: a real one in processes of its own, driven by the `openai` client and plain HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai.types.responses import Response

from batchllm import default_model
from tests import forked
from tests.hostile_rows import completion_rows, is_unicode
from tests.live_server import (
    KEY,
    Server,
    answers,
    create,
    in_a_batch,
    long_stream,
    rows,
    running,
    text_of,
    wait,
    wait_for_answers,
)
from tests.sizes import sized

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), is_forked=False) as server:
        yield server


def chat_bodies(num: int) -> list[dict[str, Any]]:
    """Chats of different forms, of which a few are refused."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    parts = [{"type": "text", "text": "Summarise:"}, {"type": "text", "text": "Rivers are long."}]
    forms: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Name one river."}]},
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}]},
        {"messages": [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "Hi"}]},
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "3 degrees"},
            ]
        },
        {"messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2,"}]},
        {
            "messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2,"}],
            "continue_final_message": True,
        },
        {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"enable_thinking": False}},
        {
            "messages": [
                {"role": "assistant", "content": "The Rhine.", "refusal": None, "annotations": [], "audio": None},
                {"role": "user", "content": "Another."},
            ]
        },
        {"messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"300": 5}, "top_p": 0.9},
        {"messages": [{"role": "user", "content": None}]},
    ]
    return [form | {"stop": f"{i // len(forms)}"} for i in range(num) for form in [forms[i % len(forms)]]]


def test_health_says_that_scheduler_and_cache_are_in(server: Server) -> None:
    """The names come from the scheduler's process."""
    health = json.loads(server.get("/health"))
    assert (health["status"], health["scheduler"], health["radix_cache"]) == (
        "ok",
        "BatchScheduler",
        "PlannedRadixCache",
    )


def test_a_server_whose_port_is_taken_says_so_before_its_engine_starts(server: Server, tmp_path: Path) -> None:
    """It is a wrong flag, and has the status of one."""
    log = tmp_path / "log"
    with log.open("wb") as stream:
        flags = ["serve", "--port", str(server.port), "--demo-model", "--batch-storage", str(tmp_path / "storage")]
        process = forked.Process("batchllm.cli:command", flags, stdout=stream, stderr=stream, needs_sglang=True)
        assert process.wait(60) == 2
    assert f"--port {server.port}: " in log.read_text().splitlines()[-1]
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/files/file-1/content", "/v1/batches/batch_1"])
def test_no_batch_route_answers_without_the_key(server: Server, path: str) -> None:
    """As every other route of a server with `--api-key`."""
    for key in (None, "sk-other"):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            server.get(path, key=key)
        assert refused.value.response.status_code == 401


def test_stock_routes_answer_as_ever(server: Server) -> None:
    """Completions, chat, streams, models, and SGLang's own route."""
    client = server.client
    whole = client.completions.create(model="m", prompt="a b c", max_tokens=12, temperature=0)
    stream = client.completions.create(model="m", prompt="a b c", max_tokens=12, temperature=0, stream=True)
    pieces = [piece.choices[0].text for piece in stream if piece.choices]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].text
    chat = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert chat.usage is not None and chat.usage.completion_tokens <= 4
    assert len(client.models.list().data) == 1


def test_a_batch_is_planned_and_answers_what_single_requests_answer(server: Server) -> None:
    """Prompt tokens computed, counted in the scheduler, are the fewest possible."""
    lines = rows(6, 10)
    computed = {"kind": "planned", "source": "computed"}
    before = server.metric("batchllm_scheduler_prompt_tokens_total", **computed)
    batch = wait(server, create(server, lines, metadata={"of": "test"}).id)
    assert batch.status == "completed", batch
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (60, 60, 0)
    assert batch.error_file_id is None
    assert batch.metadata == {"of": "test"}
    found = answers(server, batch.output_file_id)
    assert set(found) == {line["custom_id"] for line in lines}
    for line in lines[::13]:
        single = server.client.completions.create(**line["body"])
        assert text_of(found[line["custom_id"]]) == single.choices[0].text
    num_computed = server.metric("batchllm_scheduler_prompt_tokens_total", **computed) - before
    assert num_computed == 6 * 200 + 60 * 2
    deadline = time.monotonic() + 10  # the scheduler looks once more when it has nothing to do
    while server.metric("batchllm_scheduler_pinned_tokens") and time.monotonic() < deadline:
        time.sleep(0.1)
    for gauge in ("pinned_tokens", "open_prefixes", "waiting_requests"):
        assert server.metric(f"batchllm_scheduler_{gauge}") == 0


def test_the_page_shows_what_the_engine_did_to_who_has_signed_in(server: Server) -> None:
    """What is counted in the scheduler and where live tokens arrive; its cookie opens no other route, and pages of
    other origins read nothing.
    """
    batch = wait(server, create(server, rows(3, 40, max_tokens=12, ignore_eos=True)).id)
    asked: dict[str, Any] = {"model": "m", "prompt": [800] * 30, "max_tokens": 9, "extra_body": {"ignore_eos": True}}
    for _ in server.client.completions.create(**asked, stream=True):
        pass
    with httpx.Client(base_url=server.url, headers={"Origin": server.url}, timeout=60) as browser:
        assert browser.get("/batch").status_code == 401
        assert browser.post("/batch/sign-in", data={"key": KEY}).status_code == 303
        page = browser.get("/batch")
        one = browser.get(f"/batch/{batch.id}").text
        assert browser.get("/v1/batches").status_code == 401
        other = browser.get("/batch", headers={"Origin": "https://evil.example"})
    assert other.status_code == 403 and "access-control-allow-origin" not in page.headers
    num_streamed = [int(num) for num in re.findall(r'data-label="counted"><bdi>(\d+)<', page.text)]
    assert len(num_streamed) == 2 and num_streamed[0] >= 1 and num_streamed[1] >= 8
    for name in ("time_to_first_token", "inter_token_latency"):  # what the dashboard draws
        assert server.metric(f"sglang:{name}_seconds_count") >= 1
    assert page.text.count('<svg class="chart"') == 2
    mix = dict(re.findall(r"<bdi>(planned \w+)</bdi></th>\s*<td[^>]*><bdi>([\d,]+)<", page.text))
    assert int(mix["planned decode"].replace(",", "")) >= 120 * 11
    prompt_tokens, optimum = 120 * 202, 3 * 200 + 120 * 2
    assert f"<dd>{prompt_tokens:,}</dd>" in one and f"<dt>Optimum</dt><dd>{optimum:,}</dd>" in one
    assert f"at best {1 - optimum / prompt_tokens:.1%}" in one
    assert one.count("<bdi>7,800</bdi></th>") == 3  # 39 rows less for each document


def test_chats_are_answered_in_a_batch_as_live(server: Server) -> None:
    """Greedy answers and the lengths of prompts are equal, or both refuse the body."""
    bodies = [body | {"model": "m", "temperature": 0, "max_tokens": 6} for body in chat_bodies(30)]
    url = "/v1/chat/completions"
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    batch = wait(server, create(server, lines, endpoint=url).id)
    assert batch.status == "completed", batch
    found = [answers(server, file_id) for file_id in (batch.output_file_id, batch.error_file_id)]
    headers = {"Authorization": f"Bearer {KEY}"}
    num_answered = 0
    for i, body in enumerate(bodies):
        live = httpx.post(server.url + url, json=body, headers=headers, timeout=60)
        if str(i) not in found[0]:
            assert live.status_code >= 400, (body, found[1][str(i)], live.text)
            continue
        assert live.status_code == 200, (body, live.text)
        of_batch, of_live = found[0][str(i)]["response"]["body"], live.json()
        assert of_batch["choices"][0]["message"]["content"] == of_live["choices"][0]["message"]["content"], body
        assert of_batch["usage"]["prompt_tokens"] == of_live["usage"]["prompt_tokens"], body
        num_answered += 1
    assert 20 <= num_answered < 30


def test_a_response_in_a_batch_is_the_chats_and_the_live_ones(server: Server) -> None:
    """Instructions, developers' messages and parts are where SGLang puts them; SGLang generates two tokens less."""
    bodies: list[dict[str, Any]] = [
        {"input": "Where is the cat?", "instructions": "Be brief."},
        {
            "input": [
                {"role": "developer", "content": [{"type": "input_text", "text": "No dogs."}]},
                {"role": "user", "content": [{"type": "input_text", "text": "Where is it?"}]},
                {"role": "assistant", "content": "There."},
                {"type": "message", "role": "user", "content": "Where?"},
            ],
        },
    ]
    bodies = [body | {"model": "m", "temperature": 0, "max_output_tokens": 6} for body in bodies]
    *planned, refused = in_a_batch(server, "/v1/responses", [*bodies, bodies[0] | {"tools": [{"type": "web_search"}]}])
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "tools")
    for body, answered in zip(bodies, planned, strict=True):
        of_batch = Response.model_validate(answered["body"])
        live = server.client.responses.create(**body | {"max_output_tokens": 8})
        assert of_batch.output_text == live.output_text != ""
        assert of_batch.usage is not None and of_batch.usage.output_tokens == 6
        assert (of_batch.status, of_batch.instructions) == ("incomplete", body.get("instructions"))


def test_a_model_that_does_not_rank_refuses_to_and_scores_all_the_same(server: Server) -> None:
    ranking = {"query": "q", "documents": ["a", "b"]}
    (refused,) = in_a_batch(server, "/v1/rerank", [ranking])
    assert (refused["status_code"], refused["body"]["error"]["code"]) == (400, "no_reranker")
    assert post(server, ranking, "/v1/rerank").status_code == 400
    score = {"query": "q", "items": ["a"], "label_token_ids": [5]}
    (scored,) = in_a_batch(server, "/v1/score", [score])
    ((live,),) = post(server, score, "/v1/score").json()["scores"]
    assert scored["body"]["scores"] == [[pytest.approx(live, abs=1e-5)]]


def test_live_requests_are_answered_while_a_batch_runs(server: Server) -> None:
    """One that needs more than pins and rows leave free, too; and the batch goes on."""
    batch = create(server, rows(4, 60, max_tokens=56, ignore_eos=True))
    wait_for_answers(server, batch.id, 1)
    for prompt_len in (10, 2500):
        answer = server.client.completions.create(model="m", prompt=[900] * prompt_len, max_tokens=4)
        assert answer.usage is not None and answer.usage.prompt_tokens == prompt_len
    during = server.client.batches.retrieve(batch.id)
    assert during.status == "in_progress", "the batch was too short for this test"
    assert wait(server, batch.id).request_counts.completed == 240


def test_a_small_batch_does_not_wait_for_the_end_of_a_large_one(server: Server) -> None:
    """They are planned together and share the engine fairly; both answer all."""
    large = create(server, rows(8, 40, max_tokens=56, ignore_eos=True))
    wait_for_answers(server, large.id, 1)
    small = wait(server, create(server, rows(2, 10)).id)
    assert small.request_counts.completed == 20
    assert server.client.batches.retrieve(large.id).status == "in_progress"
    done = wait(server, large.id)
    assert len(answers(server, done.output_file_id)) == 320


def test_batches_over_the_same_documents_compute_them_once(server: Server) -> None:
    """Two batches created together cost the optimum of their union, but for what had begun when the second came."""
    computed = {"kind": "planned", "source": "computed"}
    blocker = create(server, rows(1, 60, max_tokens=32, ignore_eos=True))  # the others are planned while it runs
    wait_for_answers(server, blocker.id, 1)
    before = server.metric("batchllm_scheduler_prompt_tokens_total", **computed)
    documents = [line for line in rows(9, 16) if not line["custom_id"].startswith("0-")]
    batches = [create(server, documents[part::2]) for part in range(2)]
    for batch in [*batches, blocker]:
        assert wait(server, batch.id).status == "completed"
    num_computed = server.metric("batchllm_scheduler_prompt_tokens_total", **computed) - before
    optimum = 8 * 200 + len(documents) * 2
    rest_of_blocker = 60 * 2
    assert num_computed <= optimum + rest_of_blocker + 200 * 8 // 2, "documents were computed for each batch"


def test_a_burst_of_plain_requests_computes_what_they_share_once(server: Server) -> None:
    """200 requests at once over 5 documents, in no order."""
    live = {"kind": "live", "source": "computed"}
    before = server.metric("batchllm_scheduler_prompt_tokens_total", **live)
    lines = [line["body"] | {"prompt": [40, *line["body"]["prompt"]]} for line in rows(5, 40)]
    client = server.client
    texts: list[str | None] = [None] * len(lines)

    def ask(number: int) -> None:
        texts[number] = client.completions.create(**lines[number]).choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in texts
    num_computed = server.metric("batchllm_scheduler_prompt_tokens_total", **live) - before
    optimum = 1 + 5 * 200 + 200 * 2
    assert num_computed <= 1.25 * optimum


_GROUP = {"master_address": "127.0.0.1", "rank_offset": 1, "world_size": 2, "group_name": "g", "backend": "gloo"}
_SENDERS = {"master_address": "127.0.0.1", "ports": "1", "group_rank": 1, "world_size": 2, "backend": "gloo"}
"""Groups of processes of which the other does not come."""
_ASKED: list[tuple[str, Any, int]] = [
    ("/abort_request", {"abort_all": True}, 200),
    ("/pause_generation", {"mode": "abort"}, 200),
    ("/continue_generation", {}, 200),
    ("/release_memory_occupation", {}, 400),
    ("/resume_memory_occupation", {}, 400),
    ("/update_weights_from_disk", {"model_path": "/nowhere"}, 400),
    ("/weights_checker", {"action": "reset_tensors"}, 400),
    ("/init_weights_update_group", _GROUP | {"master_port": 1}, 400),
    ("/init_weights_send_group_for_remote_instance", _SENDERS, 400),
    ("/start_profile", {"output_dir": "/proc/nowhere", "num_steps": 2}, 200),
    ("/flush_cache", None, 400),
]


def test_nothing_that_is_asked_of_the_server_ends_a_batch_or_the_engine(server: Server) -> None:
    """What cannot be done beside a batch is refused; what ends live requests spares its rows."""
    assert server.process is not None
    before = {child.pid for child in psutil.Process(server.process.pid).children()}
    lines = rows(4, 80, max_tokens=56, ignore_eos=True)
    batch = create(server, lines)
    wait_for_answers(server, batch.id, 1)
    headers = {"Authorization": f"Bearer {KEY}"}
    for path, body, status in _ASKED:
        answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)
        assert answer.status_code == status, (path, answer.text)
        assert server.client.batches.retrieve(batch.id).status == "in_progress", path
    done = wait(server, batch.id)
    assert done.request_counts is not None
    assert (done.status, done.request_counts.completed) == ("completed", len(lines))
    assert {child.pid for child in psutil.Process(server.process.pid).children()} == before


def test_a_request_whose_id_begins_those_of_planned_ones_may_be_aborted(server: Server) -> None:
    """SGLang aborts what begins with an id, as it does when a client goes away."""
    batch = create(server, rows(4, 60, max_tokens=48, ignore_eos=True))
    wait_for_answers(server, batch.id, 1)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {
        "text": "a b c",
        "rid": "b",
        "stream": True,
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
    }
    with httpx.stream("POST", f"{server.url}/generate", json=body, headers=headers, timeout=60) as stream:
        assert stream.status_code == 200
        next(stream.iter_bytes())
        assert httpx.post(f"{server.url}/abort_request", json={"rid": "b"}, headers=headers).status_code == 200
    counts = wait(server, batch.id).request_counts
    assert counts is not None and (counts.completed, counts.failed) == (240, 0)
    body = {"text": "a", "rid": "\0batchllm:0:0", "sampling_params": {"max_new_tokens": 1}}
    assert httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=60).status_code == 400


def test_a_label_that_the_metrics_do_not_have_ends_its_request_only(server: Server) -> None:
    """SGLang ends the whole server where it counts such a request."""
    body = {"text": "a b c", "custom_labels": {"team": "x"}, "sampling_params": {"max_new_tokens": 1}}
    refused = post(server, body, "/generate")
    assert (refused.status_code, "'team' is no label" in refused.text) == (400, True), refused.text
    assert post(server, body | {"custom_labels": None}, "/generate").status_code == 200


@pytest.mark.parametrize("ids", [[[]], [[5, 6], []]])
def test_a_prompt_of_no_tokens_is_refused_and_does_not_end_the_engine(server: Server, ids: list[list[int]]) -> None:
    """Nor is it answered with what stands in the memory."""
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{server.url}/generate", json={"input_ids": ids}, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "the prompt has no tokens; give at least one",
    )


def test_a_stream_that_is_refused_leaves_its_connection_open(server: Server) -> None:
    """SGLang fails behind the answer, when it ends what a client may have left, and the connection closes."""
    body = {"text": "a b c", "sampling_params": {"max_new_tokens": 1, "temperature": "x"}, "stream": True}
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        for rid in (None, "a", ["a"]):
            refused = client.post("/generate", json=body | {"rid": rid})
            assert '"code":400' in refused.text, refused.text
            assert client.get("/v1/models").status_code == 200


def test_no_row_ends_the_engine(server: Server) -> None:
    """Rows with values at and beyond the limits, each value once and more, in a batch and live: each row is answered or
    refused by itself, by the same processes."""
    assert server.process is not None
    before = {child.pid for child in psutil.Process(server.process.pid).children()}
    lines = [row for row in completion_rows(sized(260, 700), seed=1) if is_unicode(row)]
    batch = wait(server, create(server, lines).id)
    assert batch.status == "completed", batch.errors
    found = [answers(server, file_id) for file_id in (batch.output_file_id, batch.error_file_id)]
    assert sorted([*found[0], *found[1]]) == sorted(row["custom_id"] for row in lines)
    assert len(found[0]) > 80
    codes = {record["response"]["body"]["error"]["code"] for record in found[1].values()}
    assert not codes & {"engine_died", "aborted"}, codes
    for line in lines[: sized(194, 400)]:
        assert post(server, line["body"]).status_code != 503, line
    assert {child.pid for child in psutil.Process(server.process.pid).children()} == before


@pytest.mark.parametrize("victim", ["scheduler", pytest.param("detokenizer", marks=pytest.mark.thorough)])
def test_a_dead_engine_is_started_again_behind_the_server(server: Server, victim: str) -> None:
    """Live requests in flight, and those that come meanwhile, are asked to come again; the batch goes on."""
    batch = create(server, rows(4, 60, max_tokens=16, ignore_eos=True))
    wait_for_answers(server, batch.id, 1)
    body = {"model": "m", "prompt": "a b c", "max_tokens": 3000, "ignore_eos": True}
    in_flight: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: in_flight.append(post(server, body)))
    started = server.metric(_STARTED, kind="live", source="computed")
    asking.start()
    deadline = time.monotonic() + 30
    while server.metric(_STARTED, kind="live", source="computed") == started and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.process is not None
    (process,) = [
        child for child in psutil.Process(server.process.pid).children() if victim in " ".join(child.cmdline())
    ]
    process.kill()
    asking.join(60)
    refused, answer = in_flight, post(server, body | {"max_tokens": 4})
    while answer.status_code == 503:
        refused.append(answer)
        time.sleep(0.2)
        answer = post(server, body | {"max_tokens": 4})
    assert answer.status_code == 200
    assert len(refused) > 1
    for response in refused:
        assert (response.status_code, response.headers["retry-after"]) == (503, "20"), response.text
    done = wait(server, batch.id)
    assert (done.status, done.request_counts.completed) == ("completed", 240)
    assert len(answers(server, done.output_file_id)) == 240
    assert json.loads(server.get("/health"))["scheduler"] == "BatchScheduler"


@pytest.mark.thorough
def test_an_engine_that_is_started_again_has_the_weights_that_were_loaded_last(server: Server) -> None:
    """And a request of another kind that waited for the old engine is asked to come again."""
    weights = {"model_path": default_model.cached_model_path(default_model.DEFAULT, seed=1)}
    body = {"model": "m", "prompt": "a b c", "max_tokens": 8, "temperature": 0}
    first = post(server, body).json()["choices"][0]["text"]
    assert post(server, weights, "/update_weights_from_disk").status_code == 200
    before = post(server, body).json()["choices"][0]["text"]
    assert before != first
    assert server.process is not None
    (scheduler,) = [
        child for child in psutil.Process(server.process.pid).children() if "scheduler" in " ".join(child.cmdline())
    ]
    scheduler.suspend()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server, {"name": "model.norm.weight"}, "/get_weights_by_name")
        while not server.metric("sglang:http_requests_active", endpoint="/get_weights_by_name"):
            time.sleep(0.05)
        scheduler.kill()
        assert waiting.result(60).status_code == 503
    while (answer := post(server, body)).status_code == 503:
        time.sleep(0.2)
    assert answer.json()["choices"][0]["text"] == before


_STARTED = "batchllm_scheduler_prompt_tokens_total"


def post(server: Server, body: dict[str, Any], url: str = "/v1/completions") -> httpx.Response:
    """What a live completion is answered with, or another request."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}{url}", json=body, headers=headers, timeout=60)


def test_a_server_killed_in_a_batch_goes_on_with_it(server: Server) -> None:
    """SIGKILL to the server, then the same command: each row answered once, none that was acknowledged again."""
    lines = rows(4, 60, max_tokens=16, ignore_eos=True)
    batch = create(server, lines)
    wait_for_answers(server, batch.id, 10)
    server.end(signal.SIGKILL)
    server.start()
    done = wait(server, batch.id)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed) == (240, 240)
    assert set(answers(server, done.output_file_id)) == {line["custom_id"] for line in lines}


def test_sigterm_ends_batches_at_once_and_lets_live_requests_finish(server: Server) -> None:
    """In the middle of a batch, beside a stream; no process, no file in the temporary directory or in shared memory.
    The signal goes to all processes of the server, as `timeout` and systemd send it.

    That the batch goes on with the next start is in tests/server/test_restart.py.
    """
    batch = create(server, rows(4, 500, max_tokens=32, ignore_eos=True))
    wait_for_answers(server, batch.id, 1)
    assert server.process is not None
    pid = server.process.pid
    stream = long_stream(server, max_tokens=400)
    pieces = [next(stream)]
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        process.send_signal(signal.SIGTERM)
    num_answered = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) in (100, 300):
            num_answered.append(num_recorded(server, batch.id))
    assert pieces[-1].choices[0].finish_reason == "length"  # a piece may have two tokens
    assert num_answered[0] == num_answered[1] < 2000, "the batch went on beside the stream"
    assert server.process.wait(60) == 0
    server.process = None
    assert not [name for name in os.listdir("/dev/shm") if f"batchllm-{pid}" in name]
    assert not list((server.folder / "tmp").iterdir())


def num_recorded(server: Server, batch_id: str) -> int:
    """Rows in the journal of a batch."""
    with contextlib.closing(sqlite3.connect(server.folder / "storage" / "jobs" / batch_id / "journal.db")) as db:
        return int(db.execute("SELECT count(*) FROM result").fetchone()[0])
