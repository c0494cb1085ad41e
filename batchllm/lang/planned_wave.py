"""A wave of prompts as one planned job.

Knows bodies of ``/generate``, and jobs; not programs, and not what runs the job.

INVARIANT: a body that cannot run is answered with why, and the others run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, closing
from typing import Any

import numpy as np

from batchllm.dataset.prompts import check_text
from batchllm.dataset.sampling import parse_sampling
from batchllm.errors import EngineError, RowError
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import single_job
from batchllm.offline.runtime import Runtime
from batchllm.offline.token_store import TokenStore
from batchllm.request import Completion, Request, SamplingParams

_IN_MEMORY = 1 << 60
"""Bytes: the texts of a wave are in memory already."""
_FIELDS = frozenset({"text", "sampling_params"})
_NOT_PLANNED = frozenset({"stop_regex", "spaces_between_special_tokens"})


def can_be_planned(body: dict[str, Any]) -> bool:
    """One text, an answer of at least a token, nothing of log probabilities or images, no ``stop_regex``."""
    sampling = body["sampling_params"]
    return (
        body.keys() == _FIELDS
        and isinstance(body["text"], str)
        and sampling.get("max_new_tokens") != 0
        and not sampling.get("stop_regex")
        and sampling.get("spaces_between_special_tokens", True)
    )


class PlannedWaves:
    """Answers bodies that `can_be_planned` on a runtime.

    Args:
        runtime: What runs them.
        job_options: Further keyword arguments of `single_job`.

    Attributes:
        num_prompt_tokens: Prompt tokens of everything answered so far.
        num_computed_prompt_tokens: Those of them that were computed, as counted in the scheduler.
        num_optimal_prompt_tokens: The fewest of them that any schedule would compute, each wave by itself.
    """

    def __init__(self, runtime: Runtime, job_options: dict[str, Any]) -> None:
        self._runtime = runtime
        self._job_options = job_options
        self._num_begun = 0
        self.num_prompt_tokens = 0
        self.num_computed_prompt_tokens = 0
        self.num_optimal_prompt_tokens = 0

    async def answer(self, bodies: Sequence[dict[str, Any]]) -> AsyncIterator[tuple[int, Any]]:
        """Run them as one job.

        Yields:
            Which body, and its answer as ``/generate`` gives it, or an exception: `RowError` where it was refused,
            `EngineError` where it was aborted.

        Raises:
            EngineDiedError: The runtime is gone.
        """
        requests: list[Request] = []
        for index, body in enumerate(bodies):
            try:
                requests.append(self._request(index, body))
            except RowError as refused:
                yield index, refused
        first_index = self._num_begun
        self._num_begun += len(bodies)
        rows = JobRows(self._runtime.info, self._runtime.tokenizer, TokenStore(None, _IN_MEMORY))
        with closing(rows.store):
            for request, error in zip(requests, rows.add(requests), strict=True):
                if error is not None:
                    yield request.index - first_index, error
            if not len(rows):
                return
            job = single_job(self._runtime, rows, **self._job_options)
            places = (rows.places(np.arange(len(rows))) - first_index).tolist()
            async with aclosing(job.run_rows()) as stream:
                async for finished in stream:
                    for row, completions in zip(finished.rows, finished.completions, strict=True):
                        yield places[row], _answer(completions)
            self.num_prompt_tokens += job.stats.num_prompt_tokens
            self.num_computed_prompt_tokens += job.stats.num_computed_prompt_tokens
            self.num_optimal_prompt_tokens += job.stats.num_optimal_prompt_tokens

    def _request(self, index: int, body: dict[str, Any]) -> Request:
        names = body["sampling_params"].items()
        mapping = {name: value for name, value in names if name not in _NOT_PLANNED}
        return Request(
            row_id=str(index),
            # Seeds come from the index: a prompt that is asked again must not draw the same again.
            index=self._num_begun + index,
            sampling=parse_sampling(mapping, defaults=SamplingParams()),
            prompt=check_text("text", body["text"]),
        )


def _answer(completions: Sequence[Any]) -> Any:
    answers = []
    for completion in completions:
        if completion.finish_reason == "abort":
            return EngineError(completion.error or "the request was aborted")
        answers.append({"text": completion.text, "meta_info": _meta_info(completion)})
    return answers[0] if len(answers) == 1 else answers


def _meta_info(completion: Completion) -> dict[str, Any]:
    """What ``/generate`` says beside the text."""
    reason: dict[str, Any] = {"type": completion.finish_reason}
    if completion.finish_reason == "length":
        reason["length"] = completion.completion_tokens
    else:
        reason["matched"] = completion.matched_stop
    return {
        "finish_reason": reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "cached_tokens": completion.cached_tokens,
    }
