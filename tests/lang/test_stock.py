"""Programs on real engines: what stock SGLang's server and endpoint give, ours give too."""

from __future__ import annotations

from typing import Any

import pytest
import sglang as sgl

from batchllm import BatchEngine
from batchllm.errors import RowError
from batchllm.lang import BatchBackend, Endpoint
from tests.lang.documents import ARGUMENTS, review, what_came

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OPTIONS = [
    {"max_tokens": 6, "stop": "e"},
    {"max_tokens": 6, "stop": ["a", "e"]},
    {"max_tokens": 9, "stop_regex": "[a-z]{3}"},
    {"max_tokens": 9, "regex": "(yes|no) [0-9]{2}"},
    {
        "max_tokens": 24,
        "json_schema": '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}',
    },
    {"max_tokens": 9, "dtype": float},
    {"max_tokens": 9, "frequency_penalty": 1.5, "ignore_eos": True},
]


@sgl.function
def complete(s: Any, text: str, options: Any) -> None:
    s += text + sgl.gen("answer", **options)


@sgl.function
def choose(s: Any, text: str, method: Any) -> None:
    s += text
    s += sgl.gen("choice", choices=["yes", "no, it is not", "perhaps"], choices_method=method)


def _all(backend: Any) -> list[Any]:
    found: list[Any] = [what_came(state) for state in review.run_batch(ARGUMENTS, backend=backend, temperature=0)]
    for options in OPTIONS:
        found.append(complete.run(text="What is it?", options=options, backend=backend, temperature=0)["answer"])
    state = choose.run(text="Is it?", method=sgl.token_length_normalized, backend=backend)
    found.append(state["choice"])
    pieces = list(review.run(**ARGUMENTS[0], backend=backend, temperature=0, stream=True).text_iter())
    assert len(pieces) > 10
    found.append("".join(pieces))
    return found


def test_programs_give_what_they_give_on_stock_sglang(engine: BatchEngine, stock_url: str) -> None:
    """In process and over HTTP: texts, choices, variables, messages, streams."""
    expected = _all(sgl.RuntimeEndpoint(stock_url))
    assert expected[-1] == expected[0]["text"]
    backend = BatchBackend(engine)
    assert _all(backend) == expected
    endpoint = Endpoint(stock_url)
    assert _all(endpoint) == expected
    endpoint.shutdown()


def test_a_batch_computes_no_more_than_its_waves_must(engine: BatchEngine) -> None:
    backend = BatchBackend(engine)
    review.run_batch(ARGUMENTS, backend=backend, temperature=0)
    planned = backend.planned
    assert 0 < planned.num_computed_prompt_tokens <= planned.num_optimal_prompt_tokens < planned.num_prompt_tokens


@pytest.mark.parametrize("method", [sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized])
def test_methods_of_choice_that_fail_upstream_choose(engine: BatchEngine, method: Any) -> None:
    state = choose.run(text="Is it?", method=method, backend=BatchBackend(engine))
    assert state["choice"] in ("yes", "no, it is not", "perhaps") and state.error() is None


def test_log_probabilities_are_those_that_were_asked_for(engine: BatchEngine) -> None:
    options = {"max_tokens": 5, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    state = complete.run(text="What is it?", options=options, backend=BatchBackend(engine), temperature=0)
    meta = state.get_meta_info("answer")
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == 5
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]


def test_min_tokens_holds_beside_stop_strings_where_stock_stops_earlier(engine: BatchEngine) -> None:
    options = {"max_tokens": 6, "min_tokens": 4, "stop": ["a", "e"]}
    state = complete.run(text="What is it?", options=options, backend=BatchBackend(engine), temperature=0)
    assert 4 <= state.get_meta_info("answer")["completion_tokens"] <= 6


def test_a_prompt_that_cannot_run_is_its_program_s_error_alone(engine: BatchEngine) -> None:
    arguments = [{"text": "Why?", "options": {"max_tokens": limit}} for limit in (3, 10**6, 4)]
    states = complete.run_batch(arguments, backend=BatchBackend(engine), temperature=0)
    assert [type(state.error()) for state in states] == [type(None), RowError, type(None)]
    assert states[2].get_meta_info("answer")["completion_tokens"] == 4


def test_samples_of_one_prompt_differ_and_so_do_two_batches(engine: BatchEngine) -> None:
    backend = BatchBackend(engine)
    arguments = [{"text": "Once", "options": {"max_tokens": 12, "n": 2}}] * 3
    texts = [text for _ in range(2) for s in complete.run_batch(arguments, backend=backend) for text in s["answer"]]
    assert len(set(texts)) == 12


def test_the_engine_serves_its_own_batches_between_programs(engine: BatchEngine) -> None:
    backend = BatchBackend(engine)
    for _ in range(2):
        assert complete.run(text="A", options={"max_tokens": 2}, backend=backend)["answer"] is not None
        (completion,) = engine.batch_generate(["A"], {"max_new_tokens": 2})
        assert completion.error is None
