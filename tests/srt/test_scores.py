"""Claims about scored prompts on the real runtime: the numbers of the model, at the optimum."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from batchllm import BatchEngine, Completion
from batchllm.default_model import default_model_path
from tests.srt.live import live_request, run

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4


def _ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


@cache
def _model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32)


def _expected(ids: Sequence[int], start: int) -> tuple[list[float | None], list[int]]:
    """Log probabilities that ``transformers`` gives the tokens from ``start`` on, and the likeliest in their places."""
    import torch

    with torch.no_grad():
        logprobs = torch.log_softmax(_model()(torch.tensor([list(ids)])).logits[0].double(), dim=-1)
    values: list[float | None] = [None if i == 0 else float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))]
    return values, logprobs.argmax(dim=-1).tolist()[max(start - 1, 0) : -1]


def _check(completion: Completion, ids: Sequence[int], start: int, num_alternatives: int = 0) -> None:
    score = completion.prompt_score
    assert score is not None
    assert (score.start, score.token_ids) == (start, list(ids[start:]))
    values, likeliest = _expected(ids, start)
    assert score.logprobs == [None if v is None else pytest.approx(v, abs=TOLERANCE) for v in values]
    scored = [top for value, top in zip(values, score.top, strict=True) if value is not None]
    assert [len(top) for top in scored] == [num_alternatives] * len(scored)
    if num_alternatives:
        assert [top[0][0] for top in scored] == likeliest
    assert completion.prompt_tokens == len(ids)


def test_continuations_of_contexts_are_scored_at_the_optimum(engine: BatchEngine) -> None:
    """Contexts of two levels, longer than a piece of a prompt; only what is behind a context's last token but one is
    computed for each row.
    """
    rng = random.Random(1)
    block = _ids(rng, 400)
    contexts = [block + _ids(rng, 30) for _ in range(4)]
    following = [_ids(rng, length) for length in (1, 1, 2, 7)]
    asked = [(context, tokens) for context in contexts for tokens in following]
    completions = engine.batch_generate(
        input_ids=[context for context, _ in asked],
        continuations=[tokens for _, tokens in asked],
        sampling_params={"prompt_logprobs": 1, "max_new_tokens": 0},
    )
    for (context, tokens), completion in zip(asked, completions, strict=True):
        _check(completion, context + tokens, len(context), 1)
        assert (completion.text, list(completion.output_ids), completion.finish_reason) == ("", [], "length")
    report = engine.last_report
    assert report is not None
    # The block, each context but its last token, and of each row that token and all but the last it scores.
    least = 400 + 4 * 29 + sum(len(tokens) for _, tokens in asked)
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens == least
    assert sum(c.prompt_tokens - 1 - c.cached_tokens for c in completions) == least


def test_rows_that_score_and_rows_that_generate_share_a_plan(engine: BatchEngine) -> None:
    """What they generate is what they generate alone, and both are at the optimum."""
    rng = random.Random(2)
    context = _ids(rng, 150)
    prompts = [context + _ids(rng, 20) for _ in range(12)]
    sampling = [
        {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True, **({"prompt_logprobs": 2} if i % 3 == 1 else {})}
        for i in range(12)
    ]
    starts = [None if i % 3 == 0 else 150 for i in range(12)]
    for i in range(2, 12, 3):
        del sampling[i]["max_new_tokens"]
    completions = engine.batch_generate(input_ids=prompts, sampling_params=sampling, score_from=starts)
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens
    alone = engine.batch_generate(
        input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
    )
    for i, completion in enumerate(completions):
        if i % 3 == 0:
            assert completion.prompt_score is None
        else:
            _check(completion, prompts[i], 150, 2 if i % 3 == 1 else 0)
        assert list(completion.output_ids) == ([] if i % 3 == 2 else list(alone[i].output_ids))


@pytest.mark.parametrize("start", [0, 1, 2, 298, 299])
def test_a_prompt_is_scored_from_any_of_its_tokens(engine: BatchEngine, start: int) -> None:
    """With and without an answer behind it, cut in pieces; beside a prompt that shares it."""
    ids = _ids(random.Random(3), 300)
    sampling = [{"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}, {}, {"max_new_tokens": 1}]
    completions = engine.batch_generate(input_ids=[ids] * 3, sampling_params=sampling, score_from=[start, start, None])
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens
    _check(completions[0], ids, start)
    _check(completions[1], ids, start)
    assert [len(c.output_ids) for c in completions] == [3, 0, 1]


def test_scores_beside_rows_that_draw_are_those_of_the_model(engine: BatchEngine) -> None:
    """A row's temperature, bias and penalties are for what it generates."""
    rng = random.Random(4)
    prompts = [_ids(rng, 40) for _ in range(6)]
    drawn = {"temperature": 2.0, "max_new_tokens": 4, "seed": 1, "logit_bias": {"5": 9.0}, "frequency_penalty": 1.0}
    completions = engine.batch_generate(
        input_ids=prompts,
        sampling_params=[drawn if i % 2 else {} for i in range(6)],
        score_from=[7] * 6,
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        _check(completion, prompt, 7)


def test_a_text_and_its_continuation_are_one_prompt(engine: BatchEngine) -> None:
    """The boundary is found on tokens; where these merge, the answer says which was used."""
    tokenizer = engine.runtime.tokenizer
    assert tokenizer is not None
    context, following = "The answer to the question is", [" yes, it", " no", "land"]
    completions = engine.batch_generate([context] * 3, continuations=following)
    (context_ids,) = tokenizer.encode([context])
    for text, completion in zip(following, completions, strict=True):
        (ids,) = tokenizer.encode([context + text])
        score = completion.prompt_score
        assert score is not None
        _check(completion, list(ids), score.start)
        assert list(ids[: score.start]) == list(context_ids[: score.start])
        if score.start == len(context_ids):
            assert completion.note is None
        else:
            assert completion.note is not None
            assert f"from token {score.start} on" in completion.note


def test_labels_behind_prompts_are_as_likely_as_the_model_says_beside_rows_that_draw(engine: BatchEngine) -> None:
    """Nothing is generated behind them; the prompts share as those of other rows do, and equal ones too."""
    rng = random.Random(7)
    query, labels = _ids(rng, 120), [9, 1200, 7]
    prompts = [query + _ids(rng, 6) for _ in range(5)]
    prompts.append(prompts[0])
    drawn = {"temperature": 2.0, "max_new_tokens": 4, "seed": 1, "frequency_penalty": 1.0}
    completions = engine.batch_generate(
        input_ids=prompts, sampling_params=[{"label_token_ids": labels}] * 4 + [drawn, {"label_token_ids": labels}]
    )
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens == 120 + 5 * 6 + 1
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion.index == 4:
            assert (completion.label_logprobs, len(completion.output_ids)) == (None, 4)
            continue
        values = [_expected([*prompt, label], len(prompt))[0][0] for label in labels]
        assert completion.label_logprobs == pytest.approx(values, abs=TOLERANCE)
        assert (list(completion.output_ids), completion.finish_reason) == ([], "length")


def test_what_cannot_be_scored_fails_by_itself_with_a_reason(engine: BatchEngine) -> None:
    completions = engine.batch_generate(
        input_ids=[[11, 12, 13]] * 9,
        score_from=[3, 0, 1, None, 0, None, None, 1, 2],
        continuations=[None, None, [14], [], *[None] * 5],
        sampling_params=[
            *({}, {"n": 2}, {}, {}, {"lora_path": "x"}, {"label_token_ids": [1], "max_new_tokens": 2}),
            *({"label_token_ids": [4096]}, {"max_new_tokens": 0}, {}),
        ],
    )
    errors = [completion.error or "" for completion in completions if completion.finish_reason == "abort"]
    assert "score.from is 3, and the prompt has 3 tokens" in errors[0]
    assert "set n to 1" in errors[1]
    assert "give one of them" in errors[2]
    assert "continuation is empty" in errors[3]
    assert "the adapter 'x'" in errors[4]
    assert "label_token_ids" in errors[5] and "label_token_ids has 4096" in errors[6]
    assert [completion.prompt_score is not None for completion in completions] == [False] * 7 + [True] * 2
    (unscored, single) = engine.batch_generate(
        input_ids=[[11, 12], [11]], score_from=[None, 0], sampling_params={"max_new_tokens": 0}
    )
    assert "max_new_tokens must be an integer from 1" in (unscored.error or "")
    assert "the prompt has one token" in (single.error or "")


def test_as_many_tokens_can_be_scored_as_the_context_holds_and_one_more(engine: BatchEngine) -> None:
    """The last one is not computed."""
    room = min(
        engine.runtime.info.context_len, engine.runtime.info.max_request_len(engine.runtime.info.kv_limit_tokens)
    )
    ids = _ids(random.Random(5), room)
    whole, longer = engine.batch_generate(input_ids=[ids, [*ids, 17]], score_from=[room - 3, room - 3])
    assert whole.prompt_score is not None
    assert (longer.prompt_score is not None) == (room == engine.runtime.info.context_len)


def test_a_live_request_reads_what_is_in_front_of_its_scores(engine: BatchEngine) -> None:
    rng = random.Random(6)
    ids = _ids(rng, 120)
    fields = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 99}
    first = run(engine, live_request(engine, input_ids=ids, **fields))
    second = run(engine, live_request(engine, input_ids=ids, **fields))
    assert second["meta_info"]["cached_tokens"] == 99
    for answer in (first, second):
        values = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]
        assert values[1:] == [pytest.approx(value, abs=TOLERANCE) for value in _expected(ids, 100)[0]]
