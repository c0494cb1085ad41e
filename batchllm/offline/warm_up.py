"""The largest step that a plan can ask for, run once before the job: what cannot run fails in the first seconds.

Memory that is missing, a graph that cannot be captured, a kernel that does not fit would otherwise end the job when the
first full step comes. Skipped where it would cost more than `MAX_SHARE` of the job's own prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from batchllm.errors import EngineDiedError, EngineError
from batchllm.offline.runtime import RunRequests, Runtime, RuntimeInfo
from batchllm.planner import BatchPlan, plan_batch
from batchllm.planner.planner import RunCutter
from batchllm.request import SamplingParams
from batchllm.tokens import TokenTable

MAX_SHARE = 0.02
"""Part of the prompt tokens of a job that the warm-up may compute beside them."""
_NAMESPACE = "batchllm warm-up"
_NUM_STEPS = 2  # one that computes prompts, one that decodes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The size of a step.

    Attributes:
        num_tokens: Prompt tokens that it computes.
        num_rows: Requests that it computes them for, and that decode in the next step.
    """

    num_tokens: int
    num_rows: int


def largest_step(info: RuntimeInfo, plan: BatchPlan) -> StepShape | None:
    """The largest step that a plan can ask of an engine; None where it is not worth trying.

    Args:
        info: Numbers of the engine.
        plan: The plan of the job.
    """
    if info.max_step_tokens is None or info.max_running is None:
        return None
    num_tokens = min(info.max_step_tokens, info.kv_limit_tokens // 2, plan.optimal_prefill_tokens)
    if info.num_engines * num_tokens > MAX_SHARE * plan.optimal_prefill_tokens:
        return None
    num_rows = min(info.max_running, plan.num_requests, num_tokens, info.kv_limit_tokens // 4)
    num_rows = max(num_rows, -(-num_tokens // (info.context_len - _NUM_STEPS)))
    return StepShape(num_tokens=num_tokens, num_rows=num_rows) if num_rows >= 1 else None


async def warm_up(runtime: Runtime, shape: StepShape) -> None:
    """Run a step of this size in every engine, and, unless it embeds, one in which all its requests decode.

    Raises:
        EngineError: The engine does not survive it.
    """
    engines = runtime.info.engine_numbers
    num_rows = shape.num_rows * len(engines)
    job_id = runtime.open_job()
    num_finished = 0
    try:
        requests = _requests(runtime.info, shape)
        for engine in engines:
            runtime.submit(job_id, replace(requests, engine=engine))
        while num_finished < num_rows:
            finished = await runtime.receive(job_id)
            if finished.lost is not None:
                raise EngineDiedError(finished.lost.reason)
            num_finished += len(finished.positions)
    except EngineDiedError as death:
        raise EngineError(
            f"the engine cannot run the largest step of this job, {shape.num_tokens} prompt tokens of {shape.num_rows} "
            f"rows: lower --chunked-prefill-size, --max-running-requests or --max-total-tokens ({death})"
        ) from death
    finally:
        runtime.close_job(job_id, is_complete=num_finished == num_rows)


def _requests(info: RuntimeInfo, shape: StepShape) -> RunRequests:
    """Prompts of made-up tokens, as long as each other, that share nothing."""
    tokens = np.random.Generator(np.random.PCG64(0)).integers(0, info.vocab_size, shape.num_tokens).astype(np.int32)
    offsets = np.linspace(0, shape.num_tokens, shape.num_rows + 1).astype(np.int64)
    table = TokenTable(tokens=tokens, offsets=offsets)
    namespaces = np.arange(shape.num_rows, dtype=np.int64)
    plan = plan_batch(table, page_size=info.page_size, namespaces=namespaces)
    num_steps = 1 if info.embeds else _NUM_STEPS
    lens = np.full(shape.num_rows, num_steps, np.int32)
    embeds = info.embeds is True
    return RunRequests(
        run=RunCutter(plan, table, lens, lens).cut(0, shape.num_rows),
        sampling=(SamplingParams(max_new_tokens=num_steps, temperature=0, ignore_eos=True, embed=embeds),),
        sampling_index=[0] * shape.num_rows,
        seeds=[0] * shape.num_rows,
        namespaces=[_NAMESPACE] * shape.num_rows,
    )
