"""Claims about whole batches on the real runtime."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import signal
import sys
import threading
from contextlib import aclosing
from typing import Any

import pytest

from batchllm import BatchEngine, Completion
from batchllm.errors import ConfigError, EngineError
from tests.srt.live import live_answer, run

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def _ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


def _irregular(seed: int) -> list[list[int]]:
    """Prompts of a random tree of four levels: some end inside others, some are duplicates."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []

    def grow(prefix: list[int], level: int) -> None:
        for _ in range(rng.randint(1, 3) if level else 0):
            node = prefix + _ids(rng, rng.randint(1, 80))
            prompts.extend(node + _ids(rng, rng.randint(0, 20)) for _ in range(rng.randint(0, 3)))
            grow(node, level - 1)

    while len(prompts) < 40:
        grow(_ids(rng, rng.randint(0, 300)), 4)
    prompts += rng.sample(prompts, 6)
    rng.shuffle(prompts)
    return prompts


@pytest.mark.parametrize("seed", range(4))
def test_computes_exactly_the_optimum_in_a_small_pool(engine: BatchEngine, seed: int) -> None:
    """Every shared token is computed once, counted in the scheduler, though the pool holds a fraction of the
    batch.
    """
    prompts = _irregular(seed)
    completions = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    report = engine.last_report
    assert report is not None
    assert report.num_prompt_tokens == sum(map(len, prompts))
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens
    assert report.num_computed_prompt_tokens < report.num_prompt_tokens
    assert report.num_retractions == 0
    assert 0 < report.peak_kv_tokens <= report.kv_capacity_tokens
    assert sum(c.prompt_tokens - c.cached_tokens for c in completions) == report.num_computed_prompt_tokens


def test_outputs_equal_hugging_face(engine: BatchEngine) -> None:
    """Greedy float32 output is token for token that of ``transformers``; a difference needs a near tie."""
    import torch
    from transformers import AutoModelForCausalLM

    from batchllm.default_model import default_model_path

    prompts = _irregular(11)
    completions = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    model = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32)
    differing = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.output_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        top2 = logits.topk(2, dim=-1)
        for expected, got, gap in zip(
            top2.indices[:, 0].tolist(),
            completion.output_ids,
            (top2.values[:, 0] - top2.values[:, 1]).tolist(),
            strict=True,
        ):
            if expected != got:
                differing += 1
                assert gap < 1e-3
                break
    assert differing <= len(prompts) // 100


def test_completions_come_in_input_order(engine: BatchEngine) -> None:
    """Whatever order they ran in."""
    prompts = _irregular(3)
    completions = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    assert [c.index for c in completions] == list(range(len(prompts)))
    assert [c.prompt_tokens for c in completions] == [len(p) for p in prompts]


def test_iterator_yields_every_completion_once(engine: BatchEngine) -> None:
    """As they finish."""
    prompts = _irregular(4)
    seen = [c.index for c in engine.batch_generate_iter(input_ids=prompts, sampling_params=GREEDY)]
    assert sorted(seen) == list(range(len(prompts)))


def test_dropping_the_iterator_aborts_the_rest_and_frees_its_memory(engine: BatchEngine) -> None:
    """The next batch finds the whole pool: the idle memory check would end the engine otherwise."""
    prompts = _irregular(5)
    stream = engine.batch_generate_iter(input_ids=prompts, sampling_params=GREEDY)
    first = next(iter(stream))
    stream.close()
    again = engine.batch_generate(input_ids=[prompts[first.index]], sampling_params=GREEDY)
    assert list(again[0].output_ids) == list(first.output_ids)


def test_texts_and_messages_run_too(engine: BatchEngine) -> None:
    """A text prompt is tokenized, a conversation goes through the chat template."""
    texts = engine.batch_generate(["The sun rises in the", "The sun sets in the"], GREEDY)
    chats = engine.batch_generate(
        messages=[
            [{"role": "user", "content": "Hello"}],
            [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        ],
        sampling_params=GREEDY,
    )
    assert all(c.finish_reason == "length" and c.completion_tokens == 8 for c in texts + chats)
    assert list(chats[0].output_ids) == list(chats[1].output_ids)


def test_text_is_what_the_output_adds_to_the_prompt(engine: BatchEngine) -> None:
    """Decoded in one go, it equals the tokenizer's own decoding of the output."""
    from transformers import AutoTokenizer

    from batchllm.default_model import default_model_path

    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    prompt = "One, two, three"
    (completion,) = engine.batch_generate([prompt], {**GREEDY, "max_new_tokens": 24})
    ids = tokenizer(prompt)["input_ids"]
    whole = tokenizer.decode(ids + list(completion.output_ids), skip_special_tokens=True)
    assert whole == tokenizer.decode(ids, skip_special_tokens=True) + completion.text


def test_a_stop_string_ends_the_text_before_it(engine: BatchEngine) -> None:
    """And is reported as what stopped it."""
    prompt = "Once upon a time"
    (whole,) = engine.batch_generate([prompt], {**GREEDY, "max_new_tokens": 24})
    stop = whole.text[6:9]
    (cut,) = engine.batch_generate([prompt], {**GREEDY, "max_new_tokens": 24, "stop": [stop]})
    assert (cut.finish_reason, cut.matched_stop) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_a_stop_token_ends_the_output(engine: BatchEngine) -> None:
    """It is the last output id, and not part of the text."""
    prompt = _ids(random.Random(1), 20)
    (whole,) = engine.batch_generate(input_ids=[prompt], sampling_params=GREEDY)
    stop = whole.output_ids[3]
    (cut,) = engine.batch_generate(
        input_ids=[prompt], sampling_params={**GREEDY, "ignore_eos": False, "stop_token_ids": [stop]}
    )
    assert (cut.finish_reason, cut.matched_stop) == ("stop", stop)
    assert list(cut.output_ids) == list(whole.output_ids)[: list(whole.output_ids).index(stop) + 1]


def test_logprobs_are_those_of_the_model(engine: BatchEngine) -> None:
    """One per generated token, alternatives most likely first, the chosen token on top when greedy."""
    prompts = [_ids(random.Random(2), 40), _ids(random.Random(2), 40)[:30]]
    completions = engine.batch_generate(
        input_ids=prompts, sampling_params={**GREEDY, "logprobs": True, "top_logprobs": 3}
    )
    for completion in completions:
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == list(completion.output_ids)
        for entry in completion.logprobs:
            assert len(entry.top) == 3
            assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob, abs=1e-5))
            assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)


def test_n_samples_share_the_whole_prompt(engine: BatchEngine) -> None:
    """Four samples of one prompt compute it once, and one more token for each further sample."""
    prompt = _ids(random.Random(3), 100)
    completions = engine.batch_generate(
        input_ids=[prompt],
        sampling_params={"temperature": 1, "max_new_tokens": 8, "n": 4, "ignore_eos": True},
    )
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == 100 + 3
    assert [(c.index, c.sample) for c in completions] == [(0, s) for s in range(4)]
    assert len({tuple(c.output_ids) for c in completions}) == 4


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
def test_a_seed_repeats_the_sample_whatever_runs_beside_it(engine: BatchEngine, params: dict[str, Any]) -> None:
    """Same seed, prompt and parameters: same tokens, alone or in company; another seed: others."""
    prompt = _ids(random.Random(4), 50)
    sampling = {"temperature": 1.0, "max_new_tokens": 12, "seed": 5, "ignore_eos": True, **params}
    (alone,) = engine.batch_generate(input_ids=[prompt], sampling_params=sampling)
    company = engine.batch_generate(
        input_ids=[*_irregular(6), prompt, prompt],
        sampling_params=[GREEDY] * len(_irregular(6)) + [sampling, {**sampling, "seed": 6}],
    )
    assert list(company[-2].output_ids) == list(alone.output_ids)
    assert list(company[-1].output_ids) != list(alone.output_ids)


def test_unseeded_samples_differ(engine: BatchEngine) -> None:
    """Two requests for the same prompt are two draws."""
    prompt = _ids(random.Random(5), 30)
    sampling = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True}
    first, second = engine.batch_generate(input_ids=[prompt, prompt], sampling_params=sampling)
    assert list(first.output_ids) != list(second.output_ids)


def test_a_regex_constrains_the_output(engine: BatchEngine) -> None:
    """On CPU too."""
    (completion,) = engine.batch_generate(
        ["Give me a number:"], {"temperature": 1.0, "max_new_tokens": 16, "regex": "[0-9]{3}-[a-f]{2}"}
    )
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", completion.text)


def test_a_json_schema_constrains_the_output(engine: BatchEngine) -> None:
    """Every sample parses and satisfies it."""
    schema = json.dumps({"enum": ["red", "green", "very dark blue"]})
    completions = engine.batch_generate(
        ["What colour is the ball?"],
        {"temperature": 1.0, "max_new_tokens": 64, "json_schema": schema, "n": 4},
    )
    assert [c.finish_reason for c in completions] == ["stop"] * 4
    assert {json.loads(c.text) for c in completions} <= {"red", "green", "very dark blue"}


def test_a_grammar_that_does_not_compile_fails_its_own_row_only(engine: BatchEngine) -> None:
    """The rest of the batch is answered, those that share its prefix included."""
    prompts = ["The same beginning, then A", "The same beginning, then B", "The same beginning, then C"]
    bad = {**GREEDY, "json_schema": json.dumps({"type": "no such type"})}
    completions = engine.batch_generate(prompts, [GREEDY, bad, GREEDY])
    assert [c.finish_reason for c in completions] == ["length", "abort", "length"]
    assert completions[1].error_code == "invalid_grammar"
    assert completions[1].error is not None and completions[1].error.endswith('Unsupported type "no such type"')
    assert ".cc" not in completions[1].error


def test_a_grammar_takes_the_librarys_dialect_and_says_what_it_cannot(engine: BatchEngine) -> None:
    """Python's ``re`` refuses the first and takes the second."""
    params = [{**GREEDY, "regex": pattern} for pattern in ("(?<n>a)", "(?!x)[a-z]{3}")]
    named, ahead = engine.batch_generate(["A letter:"] * 2, params)
    assert (named.text, named.finish_reason) == ("a", "stop")
    assert ahead.error_code == "invalid_grammar"
    assert re.fullmatch(r"regex is refused by the grammar library: Regex parsing error .*", ahead.error or "")


@pytest.mark.parametrize("prompt", ["Once upon a time", "The"])
def test_stop_strings_count_only_behind_the_fewest_tokens(engine: BatchEngine, prompt: str) -> None:
    """Every answer has more tokens than that, and its text ends where the stop string begins."""
    sampling = {**GREEDY, "max_new_tokens": 24}
    (free,) = engine.batch_generate([prompt], sampling)
    stop = free.text[2]
    for least in (1, 6, 12):
        (early,) = engine.batch_generate([prompt], {**sampling, "max_new_tokens": least})
        (held,) = engine.batch_generate([prompt], {**sampling, "stop": stop, "min_new_tokens": least})
        at = free.text.find(stop, len(early.text))
        assert (held.text, held.finish_reason) == ((free.text, "length") if at < 0 else (free.text[:at], "stop"))
        assert len(held.output_ids) > least


def test_a_grammar_goes_on_for_as_long_as_it_can_and_says_where_it_could_not(engine: BatchEngine) -> None:
    """``min_new_tokens`` beside a grammar: held where other tokens are allowed, else the grammar's end wins."""
    sampling = {"temperature": 1.0, "max_new_tokens": 40, "min_new_tokens": 12}
    patterns = ("[a-z]+", "[a-z]{2}")
    open_end, closed = engine.batch_generate(["Word:"] * 2, [{**sampling, "regex": p} for p in patterns])
    assert len(open_end.output_ids) > 12 and open_end.note is None
    assert re.fullmatch("[a-z]{2}", closed.text) and closed.finish_reason == "stop"
    assert closed.note == f"the grammar allowed no more than {len(closed.output_ids) - 1} of at least 12 tokens"


def test_dropping_a_batch_whose_grammar_is_still_compiled_leaves_the_engine_alive(engine: BatchEngine) -> None:
    """Whether the grammar then turns out good or not."""
    bad = {**GREEDY, "json_schema": json.dumps({"type": "nor such a type"})}
    stream = engine.batch_generate_iter(["One", "Two", "Three"], [GREEDY, bad, bad])
    stream.close()  # an iterator to the caller, a generator here
    stream = engine.batch_generate_iter(["One", "Two", "Three"], [{**GREEDY, "max_new_tokens": 1}, bad, bad])
    next(stream)
    stream.close()  # an iterator to the caller, a generator here
    (again,) = engine.batch_generate(["One"], GREEDY)
    assert again.finish_reason == "length"


def test_bad_prompts_fail_by_themselves_with_a_reason(engine: BatchEngine) -> None:
    """Nothing is lost, the rest runs."""
    capacity = engine.runtime.info.kv_capacity_tokens
    prompts: list[Any] = [[], [10] * 9000, [10] * capacity, [10, 99999], [10, 11, 12]]
    completions = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    assert [c.finish_reason for c in completions] == ["abort"] * 4 + ["length"]
    errors = [c.error or "" for c in completions]
    assert "empty" in errors[0]
    assert "context" in errors[1]
    assert "KV" in errors[2]
    assert "99999" in errors[3]


def _job(engine: BatchEngine, requests: list[Any]) -> Any:
    from batchllm.offline.job_rows import JobRows
    from batchllm.offline.jobs import single_job
    from batchllm.offline.token_store import TokenStore

    rows = JobRows(engine.runtime.info, engine.runtime.tokenizer, TokenStore(None, 1 << 30))
    assert rows.add(requests) == [None] * len(requests)
    return single_job(engine.runtime, rows)


def test_namespaces_do_not_share(engine: BatchEngine) -> None:
    """The same prompt in two namespaces is computed twice."""
    from batchllm.request import Request, SamplingParams

    prompt = _ids(random.Random(8), 64)
    sampling = SamplingParams(temperature=0, max_new_tokens=4)
    job = _job(
        engine,
        [
            Request(row_id=str(i), index=i, sampling=sampling, input_ids=prompt, namespace=name)
            for i, name in enumerate(["a", "b", "", "a"])
        ],
    )
    assert sum(len(finished.completions) for finished in engine.runtime.iterate(job.run())) == 4
    assert job.stats.num_computed_prompt_tokens == 64 * 3 + 1


def test_live_requests_run_beside_a_plan(engine: BatchEngine) -> None:
    """Requests outside the plan are answered while it runs, and both are right."""
    import asyncio

    from batchllm.request import Request, SamplingParams

    prompts = _irregular(9)
    live_prompts = [_ids(random.Random(100 + i), 30) for i in range(6)]
    expected_live = engine.batch_generate(input_ids=live_prompts, sampling_params=GREEDY)
    expected = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    sampling = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    job = _job(engine, [Request(row_id=str(i), index=i, sampling=sampling, input_ids=p) for i, p in enumerate(prompts)])

    async def plan() -> dict[int, list[int]]:
        return {
            row: list(completion.output_ids)
            async for finished in job.run()
            for row, completion in zip(finished.rows, finished.completions, strict=True)
        }

    async def live(prompt: list[int]) -> list[int]:
        return list((await live_answer(engine, prompt))["output_ids"])

    async def both() -> tuple[dict[int, list[int]], list[list[int]]]:
        done, *answers = await asyncio.gather(plan(), *map(live, live_prompts))
        return done, answers

    done, answers = run(engine, both())
    assert answers == [list(c.output_ids) for c in expected_live]
    assert done == {c.index: list(c.output_ids) for c in expected}
    # Live requests take slots that the plan had counted on: a planned request that is retracted computes its own tokens
    # again, and nothing else is computed twice.
    num_again = job.stats.num_computed_prompt_tokens - job.stats.num_optimal_prompt_tokens
    assert num_again <= job.stats.num_retractions * max(map(len, prompts))


def test_a_job_that_stops_answers_what_runs_withdraws_the_rest_and_leaves_the_engine_clean(engine: BatchEngine) -> None:
    """What had started is answered as it would have been, nothing else is, and the next batch finds every slot free."""
    from batchllm.request import Request, SamplingParams

    prompts = _irregular(12)
    expected = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    sampling = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    job = _job(engine, [Request(row_id=str(i), index=i, sampling=sampling, input_ids=p) for i, p in enumerate(prompts)])
    answers: dict[int, list[int]] = {}
    for finished in engine.runtime.iterate(job.run()):
        for row, completion in zip(finished.rows, finished.completions, strict=True):
            assert completion.finish_reason != "abort"
            answers[row] = list(completion.output_ids)
        job.stop_admitting()
    assert 0 < len(answers) < len(prompts)
    assert job.rows_in_flight().tolist() == []
    assert all(ids == list(expected[row].output_ids) for row, ids in answers.items())
    again = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)
    assert [c.output_ids for c in again] == [c.output_ids for c in expected]
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"no_such_flag": 1}, "--no-such-flag"),
        ({"max_total_token": 1}, "--max-total-tokens"),
        ({"pp_size": 2}, "pipeline"),
        ({"dp_size": 2}, "take --replicas N: N engines that share one plan"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"enable_hierarchical_cache": True}, "hierarchical"),
        ({"disaggregation_mode": "prefill"}, "disaggregation"),
        ({"disable_radix_cache": True}, "prefix cache"),
        ({"radix_cache_backend": "lru"}, "--radix-cache-backend"),
        ({"model_path": "/no/such/model"}, "/no/such/model"),
        ({"model_path": ""}, "the name of the model is empty"),
        ({"kv_limit": 1}, "--kv-limit 1"),
        ({"kv_limit": 9000, "max_total_tokens": 8192}, "--max-total-tokens 8192"),
        ({"enable_mixed_chunk": True, "chunked_prefill_size": -1}, "--enable-mixed-chunk"),
        ({"max_tbt_ms": "0"}, "--max-tbt-ms 0"),
        ({"max_tbt_ms": "nan"}, "--max-tbt-ms nan"),
        ({"max_tbt_ms": "auto", "chunked_prefill_size": -1}, "--max-tbt-ms needs prompts in pieces"),
        ({"max_tbt_ms": "auto", "tp_size": 2}, "--max-tbt-ms: not with --tp-size"),
        ({"output_lengths": "guessed"}, "--output-lengths guessed"),
        ({"page_size": 16}, "--page-size 16"),
        ({"enable_strict_thinking": True}, "--enable-strict-thinking"),
    ],
)
def test_what_cannot_start_is_refused_by_name(engines: None, arguments: dict[str, Any], word: str) -> None:
    """Before a scheduler is started."""
    with pytest.raises(ConfigError, match=re.escape(word)):
        BatchEngine(**arguments)


def test_a_caller_on_an_event_loop_is_not_held_up(engine: BatchEngine) -> None:
    """Two batches at once, beside the caller's own timer; the answers are those of a caller that waits."""
    prompts = [[[7 + i % 5, 20 + i, 30 + batch] for i in range(40)] for batch in range(2)]
    greedy = {"temperature": 0, "max_new_tokens": 6}
    expected = [[c.output_ids for c in engine.batch_generate(input_ids=own, sampling_params=greedy)] for own in prompts]

    async def scenario() -> tuple[list[list[Completion]], int]:
        num_ticks = 0

        async def tick() -> None:
            nonlocal num_ticks
            while True:
                await asyncio.sleep(0.001)
                num_ticks += 1

        ticking = asyncio.create_task(tick())
        done = await asyncio.gather(*(engine.abatch_generate(input_ids=own, sampling_params=greedy) for own in prompts))
        ticking.cancel()
        return done, num_ticks

    done, num_ticks = asyncio.run(scenario())
    assert [[c.output_ids for c in own] for own in done] == expected
    assert num_ticks > 10


def test_a_batch_that_is_cancelled_or_left_leaves_the_engine_as_it_was(engine: BatchEngine) -> None:
    """A caller on an event loop is cancelled, or breaks out of the loop: pins and window are free again."""
    prompts = [[9] * 300 + [20 + i] for i in range(200)]
    long = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}

    async def cancelled() -> None:
        task = asyncio.create_task(engine.abatch_generate(input_ids=prompts, sampling_params=long))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def left() -> None:
        async with aclosing(engine.abatch_generate_iter(input_ids=prompts, sampling_params=long)) as stream:
            async for _ in stream:
                break

    for scenario in (cancelled, left):
        asyncio.run(scenario())
        (answer,) = engine.batch_generate(input_ids=[[3] * 1400], sampling_params={"max_new_tokens": 50})  # of 1500
        assert answer.error is None
        report = engine.last_report
        assert report is not None and report.num_retractions == 0


def test_ctrl_c_ends_the_batch_that_it_interrupts_and_the_engine_goes_on(engine: BatchEngine) -> None:
    """At moments spread over a batch that ends long after: while it is prepared, while it runs, between answers."""
    prompts = [[9] * 300 + [20 + i % 200, 20 + i // 200] for i in range(2000)]
    long = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # An interrupt that strikes in Hypothesis's callback of the garbage collector is ignored there.
    callbacks, gc.callbacks[:] = gc.callbacks[:], []
    try:
        for delay_s in (0.001, 0.05, 0.2, 0.4, 0.6):
            timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                timer.start()  # in here: it may strike before the next line
                engine.batch_generate(input_ids=prompts, sampling_params=long)
            timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
        gc.callbacks[:] = callbacks
    (answer,) = engine.batch_generate(input_ids=[[3] * 1400], sampling_params={"max_new_tokens": 50})  # of 1500
    assert answer.error is None
    report = engine.last_report
    assert report is not None and report.num_retractions == 0


class Unknown(str):
    """One that the engine's process does not know, as those of a notebook."""


Unknown.__module__ = "__main__"


def test_texts_of_a_users_own_class_are_texts(engine: BatchEngine) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 4}
    chat = [{"role": Unknown("user"), "content": Unknown("hello")}]
    plain = [{"role": "user", "content": "hello"}]
    (own,), (text,) = (engine.batch_generate([kind("hello")], greedy) for kind in (Unknown, str))
    assert own.output_ids == text.output_ids
    (own,), (text,) = (engine.batch_generate(messages=[messages], sampling_params=greedy) for messages in (chat, plain))
    assert own.output_ids == text.output_ids


def test_what_the_engines_process_cannot_read_is_the_callers_fault_and_the_engine_lives(
    engine: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "Unknown", Unknown, raising=False)  # from where it can be sent
    with pytest.raises(TypeError, match="values of Python's own types"):
        engine.runtime.call("tokenizer", "encode", [Unknown("hello")])
    assert len(engine.batch_generate(["hello"], {"max_new_tokens": 2})) == 1


def test_a_fork_of_the_program_is_told_that_the_engine_is_not_its_own(engine: BatchEngine) -> None:
    """It has none of the threads, and would wait for ever; what it ends is not the engine."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ""
        try:
            for prompts in ({"prompts": ["a"]}, {"input_ids": [[5, 6]]}):
                try:
                    engine.batch_generate(**prompts)
                except EngineError as error:
                    said += f"{error}\n"
            engine.shutdown()
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    with os.fdopen(read) as stream:
        said = stream.read().splitlines()
    assert len(said) == 2
    assert all(f"the engine is process {os.getpid()}'s" in line for line in said)
    (answer,) = engine.batch_generate(input_ids=[[3] * 100], sampling_params={"max_new_tokens": 2})
    assert answer.error is None
