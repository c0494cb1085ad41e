"""Claims about ``/v1/embeddings`` on a server that embeds, live and in batches: a real one, and the `openai` client.

The live route is SGLang's own code, on SGLang's own requests: what a row means there, it means in a batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import pytest

from batchllm.default_model import default_model_path
from tests.live_server import KEY, Server, in_a_batch, running

pytestmark = pytest.mark.engine

TOLERANCE = 1e-5
_CHUNK = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--grace", "1", "--is-embedding", "--chunked-prefill-size", str(_CHUNK)]
    flags += ["--json-model-override-args", '{"matryoshka_dimensions": [8, 16]}']
    with running(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


def live(server: Server, body: dict[str, Any], url: str = "/v1/embeddings") -> httpx.Response:
    return httpx.post(server.url + url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)


def num_computed(server: Server, kind: str) -> float:
    return server.metric("batchllm_scheduler_prompt_tokens_total", kind=kind, source="computed")


def token_ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


@cache
def _model() -> Any:
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(default_model_path(), dtype=torch.float32)


def expected(ids: list[int], dimensions: int | None = None) -> list[float]:
    """The last token's hidden state in ``transformers``, cut and normalised."""
    import torch

    with torch.no_grad():
        state = _model()(torch.tensor([ids])).last_hidden_state[0, -1].double()
    return torch.nn.functional.normalize(state[:dimensions], dim=-1).tolist()


@pytest.mark.parametrize(
    "body",
    [
        {"input": "Where is the Nile?", "model": "m"},
        {"input": ["Where is the Nile?", "Where is the Rhine?", "Why?"], "user": "u"},
        {"input": ["one"], "encoding_format": "float"},
        {"input": [5, 6, 7, 8]},
        {"input": [[5, 6, 7, 8], [5, 6, 9]], "dimensions": 8},
        {"input": "A text " * 60, "dimensions": 16},  # in pieces
        {"input": ["Where is the Nile?", "Why?"], "encoding_format": "base64"},
    ],
)
def test_a_row_is_answered_as_sglangs_own_route_answers(server: Server, body: dict[str, Any]) -> None:
    """The whole body: its fields, how vectors are written, what is counted. Numbers are equal to rounding."""
    (planned,) = in_a_batch(server, "/v1/embeddings", [body])
    answer = live(server, body)
    assert answer.status_code == 200 and planned["status_code"] == 200
    theirs, ours = answer.json(), planned["body"]
    if body.get("encoding_format") == "base64":
        client = server.client.embeddings.create(**body, model="m")  # the client reads them
        assert all(isinstance(item.embedding, str) for item in client.data)
        assert [len(item["embedding"]) for item in ours["data"]] == [len(item["embedding"]) for item in theirs["data"]]
        own = in_a_batch(server, "/v1/embeddings", [body | {"encoding_format": "float"}])[0]["body"]
        import base64
        import struct

        for item, packed in zip(own["data"], ours["data"], strict=True):
            vector = struct.unpack(f"<{len(item['embedding'])}f", base64.b64decode(packed["embedding"]))
            assert list(vector) == item["embedding"]
        for item in (*ours["data"], *theirs["data"]):
            item["embedding"] = None
    else:
        for item, other in zip(ours["data"], theirs["data"], strict=True):
            assert item["embedding"] == pytest.approx(other["embedding"], abs=TOLERANCE)
            item["embedding"] = other["embedding"]
    assert ours == theirs


def test_vectors_are_the_models(server: Server) -> None:
    """The numbers of ``transformers``: alone, behind a shared prefix, and in pieces."""
    rng = random.Random(1)
    shared = token_ids(rng, 100)
    inputs = [shared + token_ids(rng, 5), shared + token_ids(rng, 90), token_ids(rng, 1), shared]
    (planned,) = in_a_batch(server, "/v1/embeddings", [{"input": inputs}])
    assert [item["embedding"] for item in planned["body"]["data"]] == [
        pytest.approx(expected(ids), abs=1e-4) for ids in inputs
    ]
    (planned,) = in_a_batch(server, "/v1/embeddings", [{"input": inputs[1], "dimensions": 16}])
    assert planned["body"]["data"][0]["embedding"] == pytest.approx(expected(inputs[1], 16), abs=1e-4)


def test_rows_share_what_they_begin_with(server: Server) -> None:
    """An instruction in front of every text is computed once, and a text that is nothing more costs nothing more."""
    rng = random.Random(2)
    shared = token_ids(rng, 200)
    rows = [{"input": shared + token_ids(rng, 7)} for _ in range(20)] + [{"input": shared}]
    before = num_computed(server, "planned")
    planned = in_a_batch(server, "/v1/embeddings", rows)
    assert all(answer["status_code"] == 200 for answer in planned)
    assert num_computed(server, "planned") - before == 200 + 20 * 7


def test_live_requests_run_beside_a_batch(server: Server) -> None:
    """Each has its own vector."""
    rng = random.Random(3)
    shared = token_ids(rng, 80)
    inputs = [shared + token_ids(rng, 6) for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        of_batch = pool.submit(in_a_batch, server, "/v1/embeddings", [{"input": ids} for ids in inputs])
        answers = list(pool.map(lambda ids: live(server, {"input": ids}).json(), inputs))
    planned = [answer["body"]["data"][0]["embedding"] for answer in of_batch.result()]
    for ids, vector, answer in zip(inputs, planned, answers, strict=True):
        assert vector == pytest.approx(expected(ids), abs=1e-4)
        assert answer["data"][0]["embedding"] == pytest.approx(vector, abs=TOLERANCE)


def test_what_cannot_be_embedded_fails_its_row_by_name(server: Server) -> None:
    """Where SGLang's route refuses too, both do."""
    bad = [
        ({"input": "x", "dimensions": 9}, "dimensions_not_supported"),
        ({"input": " \n"}, "empty_prompt"),
        ({"input": ["x", "  "]}, "empty_prompt"),
        ({"input": []}, "empty_prompt"),
        ({"input": [[]]}, "empty_prompt"),
        ({"input": [[5], []]}, "empty_prompt"),
        ({"input": "x", "encoding_format": "int8"}, "parameter_out_of_range"),
        ({"input": [5, 10_000_000]}, "token_id_out_of_range"),
        ({"input": token_ids(random.Random(4), 5000)}, "never_fits_kv_pool"),
    ]
    good = {"input": "x"}
    planned = in_a_batch(server, "/v1/embeddings", [*(body for body, _ in bad), good])
    assert [answer["body"]["error"]["code"] for answer in planned[:-1]] == [code for _, code in bad]
    assert planned[-1]["status_code"] == 200
    assert [live(server, body).status_code for body, _ in bad] == [400] * len(bad)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 3}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_an_engine_that_embeds_does_nothing_else(server: Server, url: str, body: dict[str, Any]) -> None:
    """Rows fail with what to do, live requests have status 400, and the engine goes on."""
    (planned,) = in_a_batch(server, url, [body | {"model": "m"}])
    error = planned["body"]["error"]
    assert (planned["status_code"], error["code"]) == (400, "engine_embeds")
    assert "without --is-embedding" in error["message"]
    answer = live(server, body | {"model": "m"}, url)
    assert answer.status_code == 400 and "--is-embedding" in answer.text
    assert live(server, {"input": "x"}).status_code == 200
