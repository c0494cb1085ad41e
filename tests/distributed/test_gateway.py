"""What stands in front of several engines hands requests on: unchanged, to one engine, and as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import httpx
import pytest

from batchllm.distributed.gateway import Gateway
from batchllm.distributed.live_metrics import merged
from batchllm.trace.latency import LiveLatency
from tests.distributed.live_engines import LiveEngine, dying, gateway_to, served


@dataclass
class _Setup:
    client: httpx.AsyncClient
    gateway: Gateway
    latency: LiveLatency
    engines: list[LiveEngine]
    urls: dict[int, str]

    @property
    def asked(self) -> list[int]:
        return [len(engine.asked) for engine in self.engines]


@contextlib.asynccontextmanager
async def _setup(key: str | None = None) -> AsyncIterator[_Setup]:
    engines = [LiveEngine("0"), LiveEngine("1")]
    async with served(engines[0].app) as first, served(engines[1].app) as second:
        urls = {0: first, 1: second}
        async with gateway_to(urls, key) as (url, gateway, latency), httpx.AsyncClient(base_url=url) as client:
            yield _Setup(client, gateway, latency, engines, urls)


def _run(test: Callable[[_Setup], Awaitable[None]], key: str | None = None) -> None:
    async def run() -> None:
        async with _setup(key) as setup, asyncio.timeout(30):
            await test(setup)

    asyncio.run(run())


def test_a_request_arrives_as_it_was_sent_and_its_answer_as_it_was_given() -> None:
    async def test(setup: _Setup) -> None:
        body = {"messages": [{"role": "user", "content": "ä"}], "model": "m"}
        answer = await setup.client.post(
            "/v1/chat/completions?a=b%20c", json=body, headers={"authorization": "Bearer mine"}
        )
        told = answer.json()
        assert json.loads(told.pop("body")) == body
        engine = told.pop("engine")
        assert told == {"path": "/v1/chat/completions", "query": "a=b%20c", "authorization": "Bearer mine"}
        assert answer.headers["x-engine"] == engine and answer.headers["content-type"] == "application/json"
        refused = await setup.client.post("/v1/score", content=b"{no json", headers={"x-fail": "0"})
        assert {refused.status_code, (await setup.client.get("/v1/models/a/b")).status_code} <= {200, 418}

    _run(test)


def test_engines_are_told_their_own_key_where_clients_have_none() -> None:
    async def test(setup: _Setup) -> None:
        answer = await setup.client.get("/v1/models", headers={"authorization": "Bearer EMPTY"})
        assert answer.json()["authorization"] == "Bearer theirs"

    _run(test, key="theirs")


def test_what_shares_a_beginning_goes_to_one_engine_and_other_things_to_the_other() -> None:
    async def test(setup: _Setup) -> None:
        for number in range(5):
            for system in ("You are brief. " * 20, "You are thorough. " * 20):
                body = {"model": "m", "messages": [{"role": "system", "content": system}, {"content": str(number)}]}
                await setup.client.post("/v1/chat/completions", json=body)
        assert setup.asked == [5, 5]

    _run(test)


def test_a_stream_comes_as_it_is_made_and_its_delays_are_told() -> None:
    async def test(setup: _Setup) -> None:
        arrived = []
        async with setup.client.stream("POST", "/v1/completions?pieces=4", json={"prompt": "p"}) as answer:
            async for line in answer.aiter_lines():
                if line:
                    arrived.append((line.split()[-1], time.monotonic()))
        assert [number for number, _ in arrived] == ["0", "1", "2", "3"]
        assert arrived[-1][1] - arrived[0][1] > 0.02  # not all at the end
        now = time.monotonic()
        assert setup.latency.first_token.summary(now).count == 1
        assert setup.latency.between_tokens.summary(now).count == 3

    _run(test)


def test_who_goes_before_the_answer_is_seen_to_go_by_the_engine() -> None:
    async def test(setup: _Setup) -> None:
        async with setup.client.stream("POST", "/v1/completions?pieces=100000", json={"prompt": "p"}) as answer:
            async for _ in answer.aiter_lines():
                break
        while not sum(engine.num_left for engine in setup.engines):
            await asyncio.sleep(0.01)

    _run(test)


def test_a_request_that_ends_an_engine_is_sent_to_no_other() -> None:
    """It is answered with 503, and when to come again."""

    async def test(setup: _Setup) -> None:
        async with dying() as (url, asked):
            setup.urls.update({0: url, 1: url})
            answer = await setup.client.post("/v1/chat/completions", json={"text": "poison"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_down"
        assert int(answer.headers["retry-after"]) > 0
        assert asked == [b"POST /v1/chat/completions HTTP/1.1\r\n"]

    _run(test)


def test_a_stream_whose_engine_ends_says_so_at_its_end() -> None:
    async def test(setup: _Setup) -> None:
        answer = await setup.client.post("/generate", json={"text": "poison"})
        pieces = answer.text.split("\n\n")
        assert pieces[0] == "data: 1" and json.loads(pieces[1].removeprefix("data: "))["error"]["code"] == "engine_down"
        assert sum(setup.asked) == 1

    _run(test)


def test_an_engine_that_is_not_reached_is_passed_over_and_without_any_the_answer_says_so() -> None:
    async def test(setup: _Setup) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            setup.urls[0] = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            for number in range(4):
                answer = await setup.client.post("/v1/chat/completions", json={"prompt": str(number)})
                assert answer.json()["engine"] == "1"
        setup.urls.clear()
        for path in ("/v1/models", "/flush_cache"):
            assert (await setup.client.get(path)).status_code == 503

    _run(test)


def test_what_means_every_engine_goes_to_all_and_one_refusal_is_the_answer() -> None:
    async def test(setup: _Setup) -> None:
        assert (await setup.client.post("/flush_cache")).status_code == 200
        assert setup.asked == [1, 1]
        assert (await setup.client.post("/flush_cache", headers={"x-fail": "1"})).status_code == 418

    _run(test)


@pytest.mark.parametrize("path", ["/update_weights_from_disk", "/load_lora_adapter", "/open_session", "/no/such"])
def test_what_only_some_engines_would_keep_is_refused_by_path(path: str) -> None:
    async def test(setup: _Setup) -> None:
        answer = await setup.client.post(path, json={})
        assert answer.status_code == 404 and path in answer.json()["error"]["message"]
        assert setup.asked == [0, 0]

    _run(test)


def test_answers_that_are_kept_are_all_in_one_engine() -> None:
    async def test(setup: _Setup) -> None:
        for number in range(4):
            await setup.client.post("/v1/responses", json={"input": str(number)})
        await setup.client.get("/v1/responses/resp_1")
        assert setup.asked == [5, 0]

    _run(test)


def test_metrics_of_all_engines_are_on_one_page_each_with_its_number() -> None:
    async def test(setup: _Setup) -> None:
        await setup.client.get("/v1/models")
        page = merged(await setup.gateway.scrape()).decode()
        found = sorted(line for line in page.splitlines() if line.startswith("asked_total"))
        assert found == ['asked_total{kind="all",replica="0"} 1.0', 'asked_total{kind="all",replica="1"} 0.0']
        assert "python_info" in page  # this process's own

    _run(test)
