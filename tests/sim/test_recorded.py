"""The simulator takes the steps that the real engine took, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from batchllm.perf_model import CostModel, get_device, get_model
from batchllm.sim import SimResult, SimWorkload, simulate
from batchllm.tokens import TokenTable
from tests.recorded_steps import COLUMNS, ENGINES, Job, columns_of, read_jobs

_COST_MODEL = CostModel.with_defaults(get_device("A100-80GB"), get_model("Llama-3.1-8B"))
_JOBS = read_jobs()


def _simulate(job: Job, engine: str) -> SimResult:
    flags = ENGINES[engine]
    workload = SimWorkload.from_lengths(
        "recorded",
        TokenTable.from_lists([row.prompt for row in job.rows]),
        np.array(job.output_len, np.int64),
        max_new_len=np.array([row.max_new_len for row in job.rows], np.int64),
        known_len=np.array([row.expected_len for row in job.rows], np.int64),
    )
    return simulate(
        workload,
        cost_model=_COST_MODEL,
        kv_capacity_tokens=flags["max_total_tokens"],
        chunk_tokens=flags["chunked_prefill_size"],
        is_mixed="enable_mixed_chunk" in flags,
        has_overlap="overlap" in engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", _JOBS)
def test_every_step_is_the_engines(name: str, engine: str) -> None:
    """Requests, tokens, pins, free slots and retractions: the same decisions, and the same carried out of them."""
    recorded = _JOBS[name].steps[engine]
    simulated = columns_of(_simulate(_JOBS[name], engine).trace.steps)
    for number, (step, expected) in enumerate(zip(simulated, recorded, strict=False)):
        assert dict(zip(COLUMNS, step, strict=True)) == dict(zip(COLUMNS, expected, strict=True)), f"step {number}"
    assert len(simulated) == len(recorded)


def test_the_recorded_jobs_try_what_differs() -> None:
    """Prefixes are pinned, prompts are cut, rows decode beside them, the pool fills up, and requests are retracted."""
    steps = {name: np.concatenate([np.array(job.steps[e]) for e in ENGINES]) for name, job in _JOBS.items()}
    column = {name: COLUMNS.index(name) for name in COLUMNS}
    assert steps["known"][:, column["kv_pinned_tokens"]].max() > 0
    assert (steps["known"][:, column["num_running"]] > steps["known"][:, column["num_sampled"]]).any()
    assert (steps["known"][:, column["num_prefill_tokens"]] * steps["known"][:, column["num_decode_tokens"]]).any()
    assert steps["longer"][:, column["num_retracted"]].sum() > 0
    assert steps["longer"][:, column["kv_free_tokens"]].min() < 10
    assert sum(_JOBS["early"].output_len) < sum(row.expected_len for row in _JOBS["early"].rows)
