"""Jobs and requests outside any plan on one engine, as coroutines on its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from batchllm import BatchEngine
from batchllm.offline.event_loop import run_on
from batchllm.offline.job import Job
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import single_job
from batchllm.offline.token_store import TokenStore
from batchllm.request import Request, SamplingParams

T = TypeVar("T")
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def run(engine: BatchEngine, coroutine: Coroutine[Any, Any, T]) -> T:
    """Result of a coroutine on the engine's loop."""
    return run_on(engine.runtime.loop, coroutine)


def job_of(engine: BatchEngine, prompts: list[list[int]], max_new_tokens: int = 8) -> Job:
    """A greedy job."""
    sampling = SamplingParams(temperature=0, max_new_tokens=max_new_tokens, ignore_eos=True)
    rows = JobRows(engine.runtime.info, engine.runtime.tokenizer, TokenStore(None, 1 << 30))
    rows.add([Request(row_id=str(i), index=i, sampling=sampling, input_ids=p) for i, p in enumerate(prompts)])
    return single_job(engine.runtime, rows)


async def answers_of(job: Job, on_first: Callable[[], Any] | None = None) -> dict[int, list[int]]:
    """Output ids of each row; ``on_first`` is called when the job says something for the first time."""
    answers: dict[int, list[int]] = {}
    async for finished in job.run():
        for row, completion in zip(finished.rows, finished.completions, strict=True):
            answers[row] = list(completion.output_ids)
        if on_first is not None:
            on_first()
            on_first = None
    return answers


async def live_answer(engine: BatchEngine, prompt: list[int], **sampling: Any) -> dict[str, Any]:
    """What SGLang answers to a greedy request outside any plan."""
    return await live_request(engine, input_ids=prompt, sampling_params=GREEDY | sampling)


async def live_request(engine: BatchEngine, **fields: Any) -> dict[str, Any]:
    """What SGLang answers to a request of these fields."""
    (answer,) = [output async for output in engine.runtime.generate(**fields)]
    return answer


async def tell_manager(engine: BatchEngine, method: str, *args: Any, **kwargs: Any) -> Any:
    """Result of a method of SGLang's tokenizer manager."""
    return await asyncio.wrap_future(engine.runtime.call_soon("manager", method, *args, **kwargs))
