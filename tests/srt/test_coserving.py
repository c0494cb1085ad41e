"""Claims about live requests beside a job where ``--max-tbt-ms`` bounds the steps, on the real runtime.

How much a step carries is up to the machine; whatever that was, everybody's answers are what they are alone.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

from batchllm import BatchEngine
from batchllm.offline.job import Job
from tests.srt.live import GREEDY, answers_of, job_of, live_answer, live_request, run, tell_manager

pytestmark = pytest.mark.engine

_POOL = 2500


@pytest.fixture(scope="module", params=["in turn", "overlap"])
def bounded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engines: None
) -> Iterator[BatchEngine]:
    with pytest.MonkeyPatch.context() as environment:
        if request.param == "overlap":
            environment.setenv("BATCHLLM_CPU_OVERLAP", "1")
        with BatchEngine(
            max_total_tokens=_POOL,
            chunked_prefill_size=512,
            random_seed=7,
            max_tbt_ms="auto",
            trace_path=tmp_path_factory.mktemp("bounded") / "trace.json",
        ) as engine:
            yield engine


def _ids(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


def _groups(seed: int, num_groups: int, group_size: int, shared_len: int, private_len: int) -> list[list[int]]:
    return [
        _ids(seed * 1000 + group, shared_len) + _ids(seed * 1000 + 500 + group * group_size + i, private_len)
        for group in range(num_groups)
        for i in range(group_size)
    ]


@pytest.fixture(scope="module")
def alone() -> Callable[..., list[list[int]]]:
    """What each prompt is answered while nobody live is there. One engine is asked, for both."""
    known: dict[str, list[list[int]]] = {}

    def answers(engine: BatchEngine, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
        key = json.dumps([prompts, sampling])
        if key not in known:
            completions = engine.batch_generate(input_ids=prompts, sampling_params=GREEDY | sampling)
            known[key] = [list(completion.output_ids) for completion in completions]
        return known[key]

    return answers


def _beside(
    engine: BatchEngine, job: Job, prompts: list[list[int]], gap_s: float = 0.03, **sampling: Any
) -> tuple[dict[int, list[int]], list[list[int]]]:
    """Answers of a job, and of live requests that come one after the other once it runs."""

    async def both() -> tuple[dict[int, list[int]], list[list[int]]]:
        began = asyncio.Event()
        rows = asyncio.ensure_future(answers_of(job, began.set))
        await began.wait()
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.ensure_future(live_answer(engine, prompt, **sampling)))
            await asyncio.sleep(gap_s)
        answers = await asyncio.gather(*tasks)
        return await rows, [list(answer["output_ids"]) for answer in answers]

    return run(engine, both())


def test_everybody_is_answered_as_alone_and_the_plan_computes_no_token_twice(bounded: BatchEngine, alone: Any) -> None:
    """Live prompts of one piece and of many, planned rows that sit out steps, prefixes that are being computed."""
    prompts = _groups(1, num_groups=8, group_size=30, shared_len=150, private_len=6)
    live = [_ids(9000 + i, random.Random(i).choice([5, 60, 700])) for i in range(25)]
    expected, wanted = alone(bounded, prompts, max_new_tokens=24), alone(bounded, live, max_new_tokens=12)
    job = job_of(bounded, prompts, 24)
    rows, answers = _beside(bounded, job, live, max_new_tokens=12)
    assert [rows[i] for i in range(len(prompts))] == expected
    assert answers == wanted


def test_planned_rows_sit_out_steps_while_live_ones_decode_in_each(bounded: BatchEngine, alone: Any) -> None:
    """Five steps' time is soon less than a hundred rows need: fewer decode than hold KV, and all of them end."""
    prompts = _groups(2, num_groups=1, group_size=300, shared_len=40, private_len=3)
    expected = alone(bounded, prompts, max_new_tokens=30)
    job = job_of(bounded, prompts, 30)
    rows, answers = _beside(bounded, job, [_ids(1, 10)] * 4, gap_s=0.2, max_new_tokens=60)
    assert [rows[i] for i in range(len(prompts))] == expected
    assert len(set(map(tuple, answers))) == 1


def test_a_live_request_takes_kv_from_planned_rows_and_they_are_answered_all_the_same(
    bounded: BatchEngine, alone: Any
) -> None:
    """The pool is full of rows with long outputs; prompts of half of it come, one after the other."""
    prompts = _groups(3, num_groups=1, group_size=60, shared_len=30, private_len=3)
    live = _ids(5, _POOL // 2)
    expected, (wanted,) = alone(bounded, prompts, max_new_tokens=120), alone(bounded, [live])
    job = job_of(bounded, prompts, 120)

    async def both() -> tuple[dict[int, list[int]], list[Any]]:
        rows = asyncio.ensure_future(answers_of(job))
        answers = [await live_answer(bounded, live) for _ in range(6)]
        assert not rows.done()
        return await rows, answers

    rows, answers = run(bounded, both())
    assert [rows[i] for i in range(len(prompts))] == expected
    assert all(list(answer["output_ids"]) == wanted for answer in answers)
    assert job.stats.num_retractions > 0
    assert job.stats.num_recomputed_for_live > 0


def test_rows_with_penalties_log_probabilities_and_least_lengths_are_answered_as_alone(bounded: BatchEngine) -> None:
    """Such rows decode in each step, or make the step one without prompts.

    Not the rows with penalties where steps overlap: SGLang counts a token there a step late or two, as it comes.
    """
    prompts = _groups(4, num_groups=2, group_size=30, shared_len=60, private_len=4)
    kinds: list[dict[str, Any]] = [{"frequency_penalty": 0.5}, {"min_new_tokens": 5, "ignore_eos": False}, {}]
    params = [GREEDY | {"max_new_tokens": 20} | kinds[i % 3] for i in range(len(prompts))]
    expected = [list(c.output_ids) for c in bounded.batch_generate(input_ids=prompts, sampling_params=params)]

    async def with_logprobs() -> list[dict[str, Any]]:
        fields = {"sampling_params": GREEDY | {"max_new_tokens": 30}, "return_logprob": True}
        return await asyncio.gather(*(live_request(bounded, input_ids=_ids(70 + i, 20), **fields) for i in range(5)))

    alone = run(bounded, with_logprobs())

    async def both() -> tuple[list[list[int]], list[dict[str, Any]]]:
        rows = asyncio.ensure_future(
            asyncio.to_thread(bounded.batch_generate, input_ids=prompts, sampling_params=params)
        )
        await asyncio.sleep(0.1)
        answers = await asyncio.to_thread(run, bounded, with_logprobs())
        return [list(c.output_ids) for c in await rows], answers

    rows, answers = asyncio.run(both())
    is_overlap = bounded.runtime.info.num_unstored_tokens == 0
    checked = [i for i in range(len(prompts)) if not is_overlap or i % 3]
    assert [rows[i] for i in checked] == [expected[i] for i in checked]
    assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in alone]


def test_clients_that_go_away_and_a_pause_leave_the_whole_pool(bounded: BatchEngine, alone: Any) -> None:
    """In the queue, in pieces, decoding; and with all KV taken back while rows sit out."""
    prompts = _groups(5, num_groups=2, group_size=60, shared_len=80, private_len=3)
    expected = alone(bounded, prompts, max_new_tokens=40)
    job = job_of(bounded, prompts, 40)

    async def trouble() -> dict[int, list[int]]:
        rows = asyncio.ensure_future(answers_of(job))
        for i in range(12):
            task = asyncio.ensure_future(live_answer(bounded, _ids(600 + i, [10, 900][i % 2]), max_new_tokens=200))
            await asyncio.sleep(0.05)
            task.cancel()
            if i == 6:
                await tell_manager(bounded, "send", PauseGenerationReqInput(mode="retract"))
                await tell_manager(bounded, "send", ContinueGenerationReqInput(torch_empty_cache=False))
        return await rows

    rows = run(bounded, trouble())
    assert [rows[i] for i in range(len(prompts))] == expected
    (answer,) = bounded.batch_generate(input_ids=[_ids(8, _POOL - 100)], sampling_params=GREEDY)
    assert len(answer.output_ids) == 8
