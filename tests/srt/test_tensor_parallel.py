"""Claims about an engine of two ranks on one CPU, in processes of their own, beside one that has one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from batchllm import BatchEngine
from batchllm.errors import ConfigError, EngineDiedError
from batchllm.srt.server_args import make_server_args
from tests.shared_memory import left_behind, ownerless
from tests.srt.conftest import KV_POOL
from tests.srt.live import answers_of, job_of, live_answer, run, tell_manager

_SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
_GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def _start(**server_args: Any) -> BatchEngine:
    return BatchEngine(tp_size=2, max_total_tokens=KV_POOL, chunked_prefill_size=256, random_seed=7, **server_args)


@pytest.fixture(scope="module")
def ranks(engines: None) -> Iterator[BatchEngine]:
    """What `engine` is, on two ranks."""
    with _start() as engine:
        yield engine


def _processes(engine: BatchEngine) -> list[psutil.Process]:
    host = psutil.Process(engine.runtime.host_pid)
    return [host, *host.children(recursive=True)]


def _schedulers(engine: BatchEngine) -> list[psutil.Process]:
    """By rank; the name of each ends in it."""
    found = {" ".join(process.cmdline()): process for process in _processes(engine)}
    return [found[name] for name in sorted(found) if "scheduler" in name]


def _prompts(num_groups: int, group_size: int) -> list[list[int]]:
    rng = random.Random(1)
    prompts = []
    for _ in range(num_groups):
        prefix = [rng.randint(10, 1500) for _ in range(300)]
        prompts += [prefix + [rng.randint(10, 1500) for _ in range(7)] for _ in range(group_size)]
    rng.shuffle(prompts)
    return prompts


@pytest.mark.engine
def test_two_ranks_answer_what_one_does_at_the_optimum(engine: BatchEngine, ranks: BatchEngine) -> None:
    """60 rows that share prefixes longer than a piece of a prompt: greedy, drawn, by a grammar; and their log
    probabilities."""
    prompts = _prompts(6, 10)
    forms: list[dict[str, Any]] = [
        _GREEDY,
        {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True, "top_p": 0.9, "logprobs": True},
        {"temperature": 0, "max_new_tokens": 16, "json_schema": _SCHEMA},
        {"temperature": 0.5, "max_new_tokens": 12, "n": 2, "frequency_penalty": 0.5},
    ]
    sampling = [forms[i % len(forms)] for i in range(len(prompts))]
    one, two = (e.batch_generate(input_ids=prompts, sampling_params=sampling) for e in (engine, ranks))
    assert len(two) == 75
    assert [c.output_ids for c in two] == [c.output_ids for c in one]
    assert [c.text for c in two] == [c.text for c in one]
    for a, b in zip(one, two, strict=True):
        assert (a.logprobs is None) == (b.logprobs is None)
        if a.logprobs is not None and b.logprobs is not None:
            values = [[token.logprob for token in logprobs] for logprobs in (a.logprobs, b.logprobs)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
    report = ranks.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens < sum(map(len, prompts)) / 4


@pytest.mark.engine
def test_scored_prompts_are_those_of_one_rank(engine: BatchEngine, ranks: BatchEngine) -> None:
    prompts = _prompts(2, 6)
    one, two = (e.batch_generate(input_ids=prompts, score_from=[290] * 12) for e in (engine, ranks))
    for a, b in zip(one, two, strict=True):
        assert a.prompt_score is not None and b.prompt_score is not None
        assert a.prompt_score.logprobs == pytest.approx(b.prompt_score.logprobs, abs=1e-4)
    report = ranks.last_report
    assert report is not None and report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens


@pytest.mark.engine
def test_a_pool_that_fills_up_retracts_the_same_rows_on_both_ranks(engine: BatchEngine, ranks: BatchEngine) -> None:
    """Answers are said to be far shorter than they are."""
    prompts = [[10 + i, 20 + i % 7] for i in range(60)]
    sampling = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True, "stop_token_ids": [1999]}
    rows = {"input_ids": prompts, "sampling_params": sampling, "expected_new_tokens": [8] * len(prompts)}
    one, two = (e.batch_generate(**rows) for e in (engine, ranks))
    assert [c.output_ids for c in two] == [c.output_ids for c in one]
    assert ranks.last_report is not None and ranks.last_report.num_retractions > 0


@pytest.mark.engine
def test_live_and_control_requests_run_beside_a_batch(ranks: BatchEngine) -> None:
    """A live request is answered as when it is alone, one that is aborted ends, and what asks for an idle engine is
    refused until the batch has ended."""
    prompts, live = _prompts(6, 10), [7] * 40

    async def beside() -> tuple[Any, ...]:
        alone = await live_answer(ranks, live)
        answers = await answers_of(job_of(ranks, prompts))
        said: list[Any] = []

        async def ask() -> None:
            said.append(await live_answer(ranks, live))
            said.append((await tell_manager(ranks, "flush_cache")).success)
            said.append(await tell_manager(ranks, "get_internal_state"))

        asking: list[asyncio.Task[None]] = []
        again = await answers_of(job_of(ranks, prompts, 60), lambda: asking.append(asyncio.ensure_future(ask())))
        await asking[0]
        return alone, answers, again, said, (await tell_manager(ranks, "flush_cache")).success

    alone, answers, again, said, is_flushed = run(ranks, beside())
    assert said[0]["output_ids"] == alone["output_ids"]
    assert said[1] is False and len(said[2]) == 1
    assert is_flushed
    assert {row: ids[:8] for row, ids in again.items()} == answers


@pytest.mark.engine
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_an_engine_that_loses_a_rank_ends(rank: int, engines: None) -> None:
    """In mid-batch, whichever rank it is: the batch raises, and no process or shared memory stays behind."""
    shared_memory = ownerless()
    engine = _start()
    processes = _processes(engine)
    try:
        sampling = {"max_new_tokens": 64, "ignore_eos": True}
        stream = engine.batch_generate_iter(input_ids=_prompts(6, 10), sampling_params=sampling)
        next(stream)
        schedulers = _schedulers(engine)
        assert len(schedulers) == 2
        schedulers[rank].kill()
        with pytest.raises(EngineDiedError):
            list(stream)
    finally:
        engine.shutdown()
    assert not psutil.wait_procs(processes, timeout=20)[1]
    assert not left_behind(shared_memory)


def test_a_bound_on_steps_is_refused(model_folder: str) -> None:
    with pytest.raises(ConfigError, match="--max-tbt-ms: not with --tp-size, whose ranks would have to agree on times"):
        make_server_args(model_folder, tp_size=2, max_tbt_ms="auto")


def test_heads_that_ranks_cannot_share_are_refused(model_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"--tp-size 3: .* heads"):
        make_server_args(model_folder, tp_size=3)


@pytest.fixture
def model_folder() -> str:
    from batchllm.default_model import default_model_path

    return default_model_path()
