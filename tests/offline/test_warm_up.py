"""The step before a job: as large as the plan can ask for, or left out where it would cost too much."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import EngineDiedError, EngineError
from batchllm.offline.job import Job
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import single_job
from batchllm.offline.token_store import TokenStore
from batchllm.offline.warm_up import MAX_SHARE, largest_step, warm_up
from batchllm.planner import BatchPlan, plan_batch
from batchllm.request import Request, SamplingParams
from batchllm.tokens import TokenTable
from tests.offline.test_job import INFO, ShufflingRuntime

ENGINE = dataclasses.replace(
    INFO, context_len=500, kv_capacity_tokens=2000, kv_limit_tokens=2000, max_step_tokens=64, max_running=16
)


def _plan(num_rows: int, row_len: int) -> BatchPlan:
    tokens = np.random.Generator(np.random.PCG64(1)).integers(0, 100, (num_rows, row_len)).astype(np.int32)
    return plan_batch(TokenTable.from_lists(list(tokens)))


def _job(runtime: ShufflingRuntime, num_rows: int, row_len: int) -> Job:
    rows = JobRows(runtime.info, None, TokenStore(None, 1 << 30))
    rng = np.random.Generator(np.random.PCG64(2))
    sampling = SamplingParams(temperature=0, max_new_tokens=3)
    ids = [rng.integers(0, 100, row_len).tolist() for _ in range(num_rows)]
    rows.add([Request(row_id=str(i), index=i, sampling=sampling, input_ids=row) for i, row in enumerate(ids)])
    return single_job(runtime, rows)


async def _run(job: Job) -> int:
    return sum([len(finished.rows) async for finished in job.run()])


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 60),
    row_len=st.integers(1, 90),
    max_step=st.integers(1, 300),
    max_running=st.integers(1, 40),
    kv_limit=st.integers(8, 3000),
)
def test_the_step_is_one_that_the_engine_takes_and_costs_a_small_part_of_the_job(
    num_rows: int, row_len: int, max_step: int, max_running: int, kv_limit: int
) -> None:
    info = dataclasses.replace(ENGINE, max_step_tokens=max_step, max_running=max_running, kv_limit_tokens=kv_limit)
    plan = _plan(num_rows, row_len)
    step = largest_step(info, plan)
    if step is None:
        return
    assert step.num_tokens <= min(max_step, kv_limit)
    assert step.num_tokens <= MAX_SHARE * plan.optimal_prefill_tokens
    assert 1 <= step.num_rows <= step.num_tokens
    longest = -(-step.num_tokens // step.num_rows)
    assert longest + 2 <= info.context_len
    assert step.num_tokens + 2 * step.num_rows <= kv_limit


def test_a_large_job_runs_the_largest_step_first_and_counts_none_of_it() -> None:
    """As many prompt tokens as a step may have, of as many requests as may run; then the job, as ever."""
    runtime = ShufflingRuntime(info=ENGINE)
    job = _job(runtime, num_rows=200, row_len=40)
    assert asyncio.run(_run(job)) == 200
    first = [sent for sent in runtime.sent if sent.namespace]
    assert runtime.sent[: len(first)] == first
    assert len(first) == 16
    assert sum(len(sent.prompt) for sent in first) == 64
    assert job.stats.num_prompt_tokens == 200 * 40
    assert job.stats.start_s > 0


def test_a_small_job_runs_none() -> None:
    """Nor does one on an engine that does not say how large its steps are."""
    runtime = ShufflingRuntime(info=ENGINE)
    asyncio.run(_run(_job(runtime, num_rows=20, row_len=40)))
    assert not [sent for sent in runtime.sent if sent.namespace]
    assert largest_step(dataclasses.replace(ENGINE, max_step_tokens=None), _plan(200, 40)) is None


def test_an_engine_that_does_not_survive_it_is_not_one_that_died_on_the_way() -> None:
    """What cannot run its largest step is not started again and again; the error names the remedy."""
    runtime = ShufflingRuntime(info=ENGINE, dies_after=0)
    with pytest.raises(EngineError, match="--chunked-prefill-size") as raised:
        asyncio.run(_run(_job(runtime, num_rows=200, row_len=40)))
    assert not isinstance(raised.value, EngineDiedError)
    assert runtime.closed == [False]


def test_a_warm_up_closes_its_job() -> None:
    runtime = ShufflingRuntime(info=ENGINE)
    step = largest_step(ENGINE, _plan(200, 40))
    assert step is not None
    asyncio.run(warm_up(runtime, step))
    assert runtime.closed == [True]
