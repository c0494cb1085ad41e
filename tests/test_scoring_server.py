"""Claims about scoring on a server, live and in batches: a real one, the `openai` client, and plain HTTP."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from batchllm.default_model import default_model_path
from tests.live_server import KEY, Server, in_a_batch, running
from tests.reranker import TEMPLATE, make_reranker
from tests.run_here import run_here
from tests.srt.harness_tasks import responses, tasks

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
_HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    return make_reranker(tmp_path_factory.mktemp("models") / "reranker")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, reranker: tuple[Path, int, int]) -> Iterator[Server]:
    flags = ["--grace", "1", "--model-path", str(reranker[0]), "--served-model-name", "m", "--enable-cache-report"]
    with running(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


def post(server: Server, url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + url, json=body, headers=_HEADERS, timeout=60)


def ask(server: Server, url: str, body: dict[str, Any]) -> Any:
    answer = post(server, url, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def num_computed(server: Server, kind: str = "live") -> float:
    """Prompt tokens that the scheduler has computed."""
    return server.metric("batchllm_scheduler_prompt_tokens_total", kind=kind, source="computed")


def token_ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


@cache
def _model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32)


def expected(ids: list[int]) -> list[float]:
    """Log probabilities that ``transformers`` gives the tokens from the second on."""
    import torch

    with torch.no_grad():
        logprobs = torch.log_softmax(_model()(torch.tensor([ids])).logits[0].double(), dim=-1)
    return [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]


def near(values: list[float]) -> list[Any]:
    return [pytest.approx(value, abs=TOLERANCE) for value in values]


@pytest.mark.parametrize("num_top", [0, 2])
def test_a_prompt_is_scored_live_as_in_a_batch(server: Server, num_top: int) -> None:
    """``echo`` with ``logprobs``; the numbers are those of ``transformers``. SGLang takes no ``max_tokens: 0``."""
    ids = token_ids(random.Random(num_top), 90)
    bodies = [
        {"model": "m", "prompt": ids, "echo": True, "logprobs": num_top, "temperature": 0, "max_tokens": limit}
        for limit in (1, 3)
    ]
    planned = in_a_batch(server, "/v1/completions", bodies)
    for body, response in zip(bodies, planned, strict=True):
        live = server.client.completions.create(**body).choices[0]
        of_batch = response["body"]["choices"][0]
        assert live.text == of_batch["text"] and live.logprobs is not None
        assert live.logprobs.token_logprobs is not None and live.logprobs.token_logprobs[0] is None
        assert live.logprobs.tokens == of_batch["logprobs"]["tokens"]
        values = live.logprobs.token_logprobs[1:]
        assert values == near(of_batch["logprobs"]["token_logprobs"][1:])
        assert values[:89] == near(expected(ids)) and len(values) == 89 + body["max_tokens"]
        if num_top:
            assert live.logprobs.top_logprobs is not None
            for own, other in zip(
                live.logprobs.top_logprobs[1:], of_batch["logprobs"]["top_logprobs"][1:], strict=True
            ):
                assert own == pytest.approx(other, abs=TOLERANCE)


@pytest.mark.parametrize("num_top", [0, 2])
def test_a_scored_prompt_is_streamed_as_it_is_answered(server: Server, num_top: int) -> None:
    """``echo`` with ``logprobs``, 0 among them: the pieces of the stream are the answer, prompts first."""
    rng = random.Random(num_top)
    body: dict[str, Any] = {"model": "m", "echo": True, "logprobs": num_top, "temperature": 0, "max_tokens": 4}
    body["prompt"] = [token_ids(rng, 40), token_ids(rng, 30)]
    whole = server.client.completions.create(**body)
    texts, values, tops = (["", ""], [[], []], [[], []])
    for piece in server.client.completions.create(**body, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                values[choice.index] += choice.logprobs.token_logprobs or []
                tops[choice.index] += choice.logprobs.top_logprobs or []
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert len(values[choice.index]) == len(body["prompt"][choice.index]) + 4
        assert values[choice.index][0] is None
        assert values[choice.index][1:] == near([float(v) for v in choice.logprobs.token_logprobs[1:] if v is not None])
        assert len(tops[choice.index]) == len(choice.logprobs.top_logprobs or ())


def test_a_live_request_reads_what_is_in_front_of_its_scores(server: Server) -> None:
    """SGLang's own ``logprob_start_len``, one request behind the other, and all at once."""
    rng = random.Random(5)
    context = token_ids(rng, 150)
    prompts = [context + token_ids(rng, 4) for _ in range(8)]
    asked = [
        {"input_ids": ids, "return_logprob": True, "logprob_start_len": 149, "sampling_params": {"max_new_tokens": 0}}
        for ids in prompts
    ]
    before = num_computed(server)
    told = [ask(server, "/generate", body)["meta_info"] for body in asked[:3]]
    assert [meta["cached_tokens"] for meta in told] == [0, 149, 149]
    with ThreadPoolExecutor(5) as pool:
        told += [answer["meta_info"] for answer in pool.map(lambda body: ask(server, "/generate", body), asked[3:])]
    assert num_computed(server) - before == 149 + 8 * 5
    for ids, meta in zip(prompts, told, strict=True):
        assert [entry[1] for entry in meta["input_token_logprobs"]] == ids[149:]
        assert [entry[0] for entry in meta["input_token_logprobs"][1:]] == near(expected(ids)[149:])


def test_what_was_scored_before_is_not_scored_again(server: Server) -> None:
    """Clients that ask from token 0, as most do, read what an earlier prompt had, until the cache is flushed."""
    rng = random.Random(6)
    block = token_ids(rng, 160)
    asked = {"model": "m", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    prompts = [block + token_ids(rng, 5) for _ in range(6)]
    before = num_computed(server)
    first = ask(server, "/v1/completions", asked | {"prompt": prompts[:1]})
    rest = ask(server, "/v1/completions", asked | {"prompt": prompts[1:]})
    # Of each of the others what is its own, and the token in front, for its logits.
    assert num_computed(server) - before == 165 + 5 * 6
    for ids, choice in zip(prompts, first["choices"] + rest["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:165] == near(expected(ids))
        assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == 166
    assert post(server, "/flush_cache", {}).status_code == 200
    before = num_computed(server)
    ask(server, "/v1/completions", asked | {"prompt": prompts[0]})
    assert num_computed(server) - before == 165


@pytest.mark.parametrize("item_first", [False, True])
def test_a_score_in_a_batch_is_the_live_one_and_its_query_is_computed_once(server: Server, item_first: bool) -> None:
    """Token ids and texts; what several items of a query, and several queries, share is computed once."""
    rng = random.Random(8 + item_first)
    system = token_ids(rng, 60)
    queries = [system + token_ids(rng, 40) for _ in range(3)]
    items = [[token_ids(rng, 3) for _ in range(5)] for _ in queries]
    labels = [7, 300, 4095]
    bodies: list[dict[str, Any]] = [
        {"query": query, "items": own, "label_token_ids": labels, "item_first": item_first, "model": "m"}
        for query, own in zip(queries, items, strict=True)
    ]
    before = num_computed(server, "planned")
    planned = in_a_batch(server, "/v1/score", bodies)
    optimum = 15 * 103 if item_first else 60 + 3 * 40 + 15 * 3
    assert num_computed(server, "planned") - before == optimum
    bodies.append({"query": "Is it so? ", "items": ["yes", "no, it"], "label_token_ids": labels, "apply_softmax": True})
    bodies.append({"query": "", "items": "one alone", "label_token_ids": labels, "model": "another"})
    planned += in_a_batch(server, "/v1/score", bodies[3:])
    for body, response in zip(bodies, planned, strict=True):
        assert response["status_code"] == 200, response
        live = ask(server, "/v1/score", body)
        assert response["body"]["scores"] == [pytest.approx(scores, abs=1e-5) for scores in live.pop("scores")]
        assert response["body"] == live | {"scores": response["body"]["scores"]}
    ids = items[0][0] + queries[0] if item_first else queries[0] + items[0][0]
    expected_scores = [math.exp(expected([*ids, label])[-1]) for label in labels]
    assert planned[0]["body"]["scores"][0] == pytest.approx(expected_scores, abs=TOLERANCE)


def test_a_live_score_reads_its_query(server: Server) -> None:
    rng = random.Random(11)
    body = {"query": token_ids(rng, 90), "label_token_ids": [5, 6], "model": "m"}
    before = num_computed(server)
    ask(server, "/v1/score", body | {"items": [token_ids(rng, 4) for _ in range(6)]})
    assert num_computed(server) - before == 90 + 6 * 4


def test_a_ranking_in_a_batch_is_the_live_one_and_its_query_is_computed_once(
    server: Server, reranker: tuple[Path, int, int]
) -> None:
    documents = ["The cat sat on the mat.", "A tree.", "Seven red dogs and a cat ran under the tree.", "the"]
    body = {"query": "Where does the cat sit, and who ran under which tree, and then?", "documents": documents}
    bodies: list[dict[str, Any]] = [
        body,
        body | {"top_n": 2, "return_documents": False},
        body | {"instruct": "be strict"},
    ]
    before = num_computed(server, "planned")
    planned = in_a_batch(server, "/v1/rerank", bodies)
    computed = num_computed(server, "planned") - before
    for body, response in zip(bodies, planned, strict=True):
        live = ask(server, "/v1/rerank", body)
        assert [found.pop("score") for found in response["body"]] == pytest.approx(
            [f.pop("score") for f in live], abs=1e-5
        )
        assert response["body"] == live
    assert {len(response["body"]) for response in planned} == {2, 4}
    prompts = [tuple(ids) for body in bodies for ids in _rerank_prompts(reranker[0], body)]
    assert computed == _optimum(prompts)


def _rerank_prompts(folder: Path, body: dict[str, Any]) -> list[list[int]]:
    """Token ids of the prompts, as ``transformers`` makes them of the template."""
    from jinja2 import Environment
    from transformers import AutoTokenizer

    template, tokenizer = Environment().from_string(TEMPLATE), AutoTokenizer.from_pretrained(folder)
    options = {"instruct": body["instruct"]} if "instruct" in body else {}
    texts = [
        template.render(messages=[{"content": body["query"]}, {"content": document}], **options)
        for document in body["documents"]
    ]
    return [tokenizer.encode(text) for text in texts]


def _optimum(prompts: list[tuple[int, ...]]) -> int:
    """Fewest tokens that must be computed: of each what the one in front of it, sorted, does not begin with."""
    num_tokens = 0
    before: tuple[int, ...] = ()
    for ids in sorted(prompts):
        num_shared = 0
        while ids[: num_shared + 1] == before[: num_shared + 1] and num_shared < len(ids):
            num_shared += 1
        num_tokens += len(ids) - min(num_shared, len(ids) - 1)
        before = ids
    return num_tokens


def test_the_command_answers_rows_of_all_kinds_as_the_server(
    server: Server, reranker: tuple[Path, int, int], engines: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One file of scores, rankings and completions, each row at its optimum."""
    rng = random.Random(12)
    query = token_ids(rng, 80)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/score", {"query": query, "items": [token_ids(rng, 3) for _ in range(4)], "label_token_ids": [5, 6]}),
        ("/v1/rerank", {"query": "a cat?", "documents": ["The dog and the tree.", "The cat sat."]}),
        ("/v1/completions", {"model": "m", "prompt": query, "max_tokens": 3, "temperature": 0}),
    ]
    rows = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, (url, body) in enumerate(bodies)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["-i", str(tmp_path / "in.jsonl"), "-m", str(reranker[0])]
    assert run_here("plan", *common) == 0 and "7" in capfd.readouterr().out
    assert run_here("run", *common, "-o", tmp_path / "out.jsonl", "--max-total-tokens", "4096") == 0
    answered = [json.loads(line)["response"]["body"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = [ask(server, url, body) for url, body in bodies]
    assert answered[0]["scores"] == [pytest.approx(scores, abs=1e-5) for scores in wanted[0]["scores"]]
    assert [found["index"] for found in answered[1]] == [found["index"] for found in wanted[1]]
    assert [found["score"] for found in answered[1]] == pytest.approx([f["score"] for f in wanted[1]], abs=1e-5)
    assert answered[2]["choices"][0]["text"] == wanted[2]["choices"][0]["text"]


def test_an_item_that_cannot_be_scored_fails_its_row_and_is_named(server: Server) -> None:
    """The others of the batch are answered."""
    good = {"query": [1, 2, 3], "items": [[4], [5]], "label_token_ids": [7], "model": "m"}
    bad: dict[str, dict[str, Any]] = {
        "items[1]": good | {"items": [[4], [5] * 9000]},
        "items[0]": good | {"items": [[4096], [5]]},
        "label_token_ids": good | {"label_token_ids": [5, 4096]},
    }
    responses = in_a_batch(server, "/v1/score", [good, *bad.values(), good])
    assert [response["status_code"] for response in responses] == [200, 400, 400, 400, 200]
    for place, response in zip(bad, responses[1:], strict=False):
        error = response["body"]["error"]
        assert error["param"] == place and place in error["message"]


def test_several_answers_to_a_scored_prompt_are_refused_in_a_batch_and_end_nothing_live(server: Server) -> None:
    body = {"model": "m", "prompt": [11] * 30, "echo": True, "logprobs": 1, "max_tokens": 2, "n": 2}
    (refused, answered) = in_a_batch(server, "/v1/completions", [body, body | {"n": 1}])
    assert (refused["status_code"], refused["body"]["error"]["param"]) == (400, "n")
    assert answered["status_code"] == 200
    choices = ask(server, "/v1/completions", body)["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [32, 32]
    assert [choice["logprobs"]["token_logprobs"][1:30] for choice in choices] == [near(expected([11] * 30))] * 2


def test_the_harness_asks_our_server_and_finds_what_transformers_finds(
    server: Server, reranker: tuple[Path, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-evaluation-harness's ``local-completions``, as it is; the examples in front of the questions are read."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder = str(reranker[0])
    theirs = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4, max_length=3000)
    ours = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="m",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        max_length=3001,  # it leaves room for the token that it has generated; its windows are others than theirs
        num_concurrent=1,
    )
    before = num_computed(server), _num_reused(server)
    results = [
        simple_evaluate(model=model, tasks=tasks(tmp_path)[:2], log_samples=True, bootstrap_iters=0, verbosity="ERROR")
        for model in (ours, theirs)
    ]
    computed, reused = num_computed(server) - before[0], _num_reused(server) - before[1]
    for name in ("local_choices", "local_rolling"):
        numbers = [
            {key: value for key, value in result["results"][name].items() if isinstance(value, float)}
            for result in results
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, nan_ok=True), name
    for own, other in zip(*(responses(result, "local_choices") for result in results), strict=True):
        for ((value, is_greedy),), ((wanted, wanted_greedy),) in zip(own, other, strict=True):
            assert float(value) == pytest.approx(float(wanted), abs=TOLERANCE)
            assert str(is_greedy) == str(wanted_greedy)
    assert reused > computed


def _num_reused(server: Server) -> float:
    return server.metric("batchllm_scheduler_prompt_tokens_total", kind="live", source="reused")
