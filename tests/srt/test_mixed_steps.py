"""Mixed token batches on the real runtime, step by step and with overlap: what SGLang does not guard against by itself.

A chunk of 16 tokens and a pool of 700 slots: decoding rows fill the chunk, prompts are cut into many pieces, and
hints that are far too small fill the pool in the middle of a mixed step.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm import BatchEngine, Completion
from batchllm.offline.report import RunReport
from batchllm.trace import StepTrace
from tests.recorded_steps import read_jobs, run_rows
from tests.srt.live import GREEDY, answers_of, job_of, live_answer, run

pytestmark = pytest.mark.engine

_CHUNK, _POOL = 16, 700
_LONG = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module", params=["in turn", "overlap"])
def mixed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engines: None
) -> Iterator[BatchEngine]:
    with pytest.MonkeyPatch.context() as environment:
        if request.param == "overlap":
            environment.setenv("BATCHLLM_CPU_OVERLAP", "1")
        with BatchEngine(
            max_total_tokens=_POOL,
            chunked_prefill_size=_CHUNK,
            enable_mixed_chunk=True,
            trace_path=tmp_path_factory.mktemp("mixed") / "trace.json",
        ) as engine:
            assert engine.runtime.info.num_unstored_tokens == (request.param != "overlap")
            yield engine


@pytest.fixture(scope="module")
def not_mixed(engine: BatchEngine) -> Callable[..., list[Completion]]:
    """What the engine whose steps are not mixed answers; it is asked once for all engines whose steps are."""

    @functools.cache
    def answers(rows: str) -> list[Completion]:
        return engine.batch_generate(**json.loads(rows))

    return lambda **rows: answers(json.dumps(rows))


def _trace(engine: BatchEngine) -> StepTrace:
    assert engine._trace_path is not None
    return StepTrace.read(Path(engine._trace_path))


def _prompts(seed: int, num_groups: int, group_size: int, prefix_len: int, private_len: int) -> list[list[int]]:
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_groups):
        prefix = [rng.randint(10, 1500) for _ in range(prefix_len)]
        prompts += [prefix + [rng.randint(10, 1500) for _ in range(private_len)] for _ in range(group_size)]
    rng.shuffle(prompts)
    return prompts


def test_prefill_goes_on_where_decoding_rows_fill_the_chunk(mixed: BatchEngine) -> None:
    """Prompts of 5 chunks among more decoding rows than a chunk has tokens: SGLang alone would starve them, or
    go on with a prompt in pieces by a negative number of tokens.
    """
    prompts = _prompts(1, 30, 1, 4, 1) + _prompts(2, 2, 2, 60, 20)
    completions = mixed.batch_generate(input_ids=prompts, sampling_params=_LONG)
    report = mixed.last_report
    assert report is not None
    assert [c.finish_reason for c in completions] == ["length"] * len(prompts)
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens
    assert report.num_retractions == 0
    steps = _trace(mixed).steps
    full = steps["num_decode_tokens"] >= _CHUNK
    assert (full & (steps["num_prefill_tokens"] > 0)).any()


@pytest.mark.parametrize("name", read_jobs())
def test_steps_are_those_that_were_recorded(mixed: BatchEngine, name: str) -> None:
    """The simulator is held to the recording (`tests/sim/test_recorded.py`), so it must be what engines do today."""
    has_overlap = mixed.runtime.info.num_unstored_tokens == 0
    _check_steps(mixed, name, "mixed, overlap" if has_overlap else "mixed")


@pytest.mark.parametrize("name", read_jobs())
def test_steps_that_are_not_mixed_are_those_that_were_recorded(engine: BatchEngine, name: str) -> None:
    _check_steps(engine, name, "not mixed")


def _check_steps(engine: BatchEngine, name: str, kind: str) -> None:
    job = read_jobs()[name]
    outputs, steps = run_rows(engine, job.rows)
    assert [len(ids) for ids in outputs] == job.output_len
    assert steps == job.steps[kind]


def test_outputs_are_those_of_steps_that_are_not_mixed(mixed: BatchEngine, not_mixed: Any) -> None:
    rows = {"input_ids": _prompts(3, 4, 5, 50, 7), "sampling_params": _LONG}
    assert [c.output_ids for c in mixed.batch_generate(**rows)] == [c.output_ids for c in not_mixed(**rows)]


def test_a_pool_that_fills_up_in_mixed_steps_retracts_and_loses_nothing(mixed: BatchEngine, not_mixed: Any) -> None:
    """Every answer is said to have 12 tokens and has 40: too many start, and some have to start again."""
    prompts = _prompts(4, 120, 1, 2, 1)
    wanted = not_mixed(input_ids=prompts, sampling_params=_LONG)
    # A stop token that never comes makes the length a matter of opinion.
    sampling = _LONG | {"stop_token_ids": [1999]}
    completions = mixed.batch_generate(
        input_ids=prompts, sampling_params=sampling, expected_new_tokens=[12] * len(prompts)
    )
    report = mixed.last_report
    assert report is not None
    assert report.num_retractions > 0
    assert report.num_failed == 0
    assert [c.output_ids for c in completions] == [c.output_ids for c in wanted]


def test_known_lengths_are_never_retracted(mixed: BatchEngine) -> None:
    assert _run_known_lengths(mixed).num_retractions == 0


def test_known_lengths_are_never_retracted_and_fill_the_pool(engine: BatchEngine) -> None:
    """Where a chunk has room for all that could start: 16 tokens, most of them decoding rows', have not."""
    report = _run_known_lengths(engine)
    assert report.num_retractions == 0
    assert report.peak_kv_tokens > 0.9 * report.kv_capacity_tokens


def _run_known_lengths(engine: BatchEngine) -> RunReport:
    prompts = _prompts(5, 160, 1, 3, 1)
    sampling = [_LONG | {"max_new_tokens": 5 + 7 * (i % 6)} for i in range(len(prompts))]
    engine.batch_generate(input_ids=prompts, sampling_params=sampling)
    assert engine.last_report is not None
    return engine.last_report


def test_the_trace_adds_up(mixed: BatchEngine) -> None:
    prompts = _prompts(6, 4, 6, 40, 9)
    mixed.batch_generate(input_ids=prompts, sampling_params=_LONG)
    report, trace = mixed.last_report, _trace(mixed)
    assert report is not None
    steps = trace.steps
    assert steps["num_prefill_tokens"].sum() == report.num_computed_prompt_tokens
    # The first token of an answer comes of its prefill.
    assert steps["num_decode_tokens"].sum() == report.num_output_tokens - len(prompts)
    in_use = steps["kv_pinned_tokens"] + steps["kv_private_tokens"]
    assert (in_use + steps["kv_free_tokens"] == trace.kv_capacity_tokens).all()
    assert in_use.max() == report.peak_kv_tokens
    assert steps["num_open_prefixes"].max() > 0
    assert steps["start_s"][0] >= 0
    assert trace.elapsed_s <= report.elapsed_s


def test_rows_with_log_probabilities_run_among_others(mixed: BatchEngine, not_mixed: Any) -> None:
    """Their steps are not mixed, so what decodes stands still for one; then it goes on from where it was."""
    prompts = _prompts(7, 30, 1, 5, 9)
    sampling = [_LONG | ({"max_new_tokens": 1, "logprobs": True} if i % 2 else {}) for i in range(len(prompts))]
    rows = {"input_ids": prompts, "sampling_params": sampling}
    answers = [mixed.batch_generate(**rows), not_mixed(**rows)]
    assert [c.output_ids for c in answers[0]] == [c.output_ids for c in answers[1]]
    assert all((c.logprobs is not None) == bool(i % 2) for i, c in enumerate(answers[0]))


def test_planned_rows_start_when_a_live_request_has_given_back_its_room(mixed: BatchEngine) -> None:
    """With overlap its slots are taken a step longer than anything runs in them; nobody else may come by."""
    prompts = _prompts(8, 1, 12, 300, 5)
    live_prompt = _prompts(9, 1, 1, 600, 20)[0]
    expected = [list(c.output_ids) for c in mixed.batch_generate(input_ids=prompts, sampling_params=GREEDY)]
    job = job_of(mixed, prompts)

    async def both() -> dict[int, list[int]]:
        live = asyncio.ensure_future(live_answer(mixed, live_prompt))
        await asyncio.sleep(0)  # it has sent its request before the job does
        answers = await answers_of(job)
        await live
        return answers

    assert run(mixed, both()) == dict(enumerate(expected))
