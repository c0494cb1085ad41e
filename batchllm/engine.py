"""`BatchEngine`: a batch of prompts in, completions out. Wires a runtime to jobs, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
import orjson

from batchllm.dataset.field_checks import json_bytes, show, task_name, token_ids
from batchllm.dataset.prompts import check_messages, check_text
from batchllm.dataset.sampling import expected_len, parse_sampling
from batchllm.dataset.scoring import checked, read_score
from batchllm.dataset.writers import check_writable
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError, RowError
from batchllm.host.runtime import HostedRuntime
from batchllm.offline.event_loop import aiterate_on
from batchllm.offline.job import FinishedSamples
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import single_job
from batchllm.offline.report import RunReport
from batchllm.offline.stats import make_trace
from batchllm.offline.token_store import TokenStore
from batchllm.planner import DEFAULT_GROUP_ORDER, GROUP_ORDERS, GroupOrder
from batchllm.request import Completion, Request, SamplingParams

Sampling = SamplingParams | Mapping[str, Any]
NO_SAMPLING: Mapping[str, Any] = {}
"""Stands for sampling parameters that were not given."""
T = TypeVar("T")
_IN_MEMORY = 1 << 60
"""Bytes: what the caller holds in memory as Python objects fits there as an array too."""


class BatchEngine:
    """Runs batches of prompts on one SGLang runtime, each globally planned.

    Use it as a context manager, or call `shutdown`. It may be used from any thread, and where an event loop runs.
    Batches that run at once are planned each by itself and share the engine: an earlier one comes first, a later one
    fills what it leaves. Ctrl-C ends the batch that it interrupts, and the engine goes on.

    Args:
        model_path: A Hugging Face model, a directory or a hub name; the embedded model when None.
        group_order: Order of sibling groups, one of `batchllm.planner.GROUP_ORDERS`.
        trace_path: Write what each forward step of the last batch was like to this file.
        **server_args: Any of SGLang's server arguments, e.g. ``max_total_tokens=8192``, and ours: ``kv_limit``,
            ``output_lengths``. With a ``log_level`` its processes print to standard error; else only errors are shown.

    Attributes:
        runtime: What the jobs run on.
        job_options: Keyword arguments of `batchllm.offline.jobs.single_job` for every batch.
        last_report: `RunReport` of the last batch that ran to its end, None before the first.

    Raises:
        ConfigError: An argument is wrong or not supported.
        EngineError: The runtime did not start.

    Example:
        >>> with BatchEngine() as engine:  # doctest: +SKIP
        ...     completions = engine.batch_generate(["a b", "a c"], {"max_new_tokens": 8})
    """

    def __init__(
        self,
        model_path: str | None = None,
        *,
        group_order: GroupOrder = DEFAULT_GROUP_ORDER,
        trace_path: str | os.PathLike[str] | None = None,
        **server_args: Any,
    ) -> None:
        if group_order not in GROUP_ORDERS:
            raise ConfigError(f"group_order must be one of {', '.join(GROUP_ORDERS)}, not {show(group_order)}")
        if trace_path is not None:
            check_writable(trace_path, "trace_path")
        self._trace_path = trace_path
        self.job_options: dict[str, Any] = {"group_order": group_order, "keep_steps": trace_path is not None}
        self.runtime = HostedRuntime(default_model_path() if model_path is None else model_path, **server_args)
        self.last_report: RunReport | None = None

    def batch_generate(
        self,
        prompts: Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling | None] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | None = None,
        messages: Sequence[Sequence[dict[str, Any]]] | None = None,
        expected_new_tokens: Sequence[int | None] | None = None,
        tasks: Sequence[str] | None = None,
        continuations: Sequence[str | Sequence[int] | None] | None = None,
        score_from: Sequence[int | None] | None = None,
    ) -> list[Completion]:
        """Answer every prompt.

        Args:
            prompts: Texts; or give ``input_ids`` or ``messages`` instead.
            sampling_params: One for all, or one per prompt, None for nothing; a dict takes SGLang's names.
            input_ids: Token ids.
            messages: Conversations, through the model's chat template.
            expected_new_tokens: Tokens that each answer will have, where known. Only scheduling depends on it.
            tasks: Name of the task of each prompt; answers of one task are expected to be of like length.
            continuations: What follows each prompt and is scored, text or token ids; None for nothing.
            score_from: The first token of each prompt that is scored; None for none. A prompt that is scored generates
                nothing unless its ``sampling_params`` say how much.

        Returns:
            Completions in input order, the ``n`` samples of a prompt side by side. A prompt that cannot run
            gets one whose ``finish_reason`` is ``"abort"`` and whose ``error`` says why.

        Raises:
            ConfigError: The arguments contradict each other.
            EngineDiedError: The runtime is gone.
        """
        completions = list(
            self.batch_generate_iter(
                prompts,
                sampling_params,
                input_ids=input_ids,
                messages=messages,
                expected_new_tokens=expected_new_tokens,
                tasks=tasks,
                continuations=continuations,
                score_from=score_from,
            )
        )
        return sorted(completions, key=lambda c: (c.index, c.sample))

    def batch_generate_iter(
        self,
        prompts: Sequence[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling | None] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | None = None,
        messages: Sequence[Sequence[dict[str, Any]]] | None = None,
        expected_new_tokens: Sequence[int | None] | None = None,
        tasks: Sequence[str] | None = None,
        continuations: Sequence[str | Sequence[int] | None] | None = None,
        score_from: Sequence[int | None] | None = None,
    ) -> Iterator[Completion]:
        """Like `batch_generate`, but yields each completion as it finishes. Dropping the iterator aborts the
        rest.
        """
        return self._generate(
            _inputs_of(
                prompts,
                sampling_params,
                input_ids=input_ids,
                messages=messages,
                expected_new_tokens=expected_new_tokens,
                tasks=tasks,
                continuations=continuations,
                score_from=score_from,
            )
        )

    async def abatch_generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        """Like `batch_generate`, for a caller on an event loop, which goes on meanwhile."""
        completions = [completion async for completion in self.abatch_generate_iter(*args, **kwargs)]
        return sorted(completions, key=lambda c: (c.index, c.sample))

    async def abatch_generate_iter(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Completion, None]:
        """Like `batch_generate_iter`, for a caller on an event loop, which goes on meanwhile."""
        inputs = _inputs_of(*args, **kwargs)
        batch = await asyncio.to_thread(_Batch, self.runtime, inputs, self.job_options)
        with closing(batch):
            for completion in batch.rejected:
                yield completion
            async with aclosing(aiterate_on(self.runtime.loop, batch.job.run())) as stream:
                async for finished in stream:
                    for completion in batch.take(finished):
                        yield completion
        self._end(batch)

    def _generate(self, inputs: _Inputs) -> Iterator[Completion]:
        with closing(_Batch(self.runtime, inputs, self.job_options)) as batch:
            yield from batch.rejected
            for finished in self.runtime.iterate(batch.job.run()):
                yield from batch.take(finished)
        self._end(batch)

    def _end(self, batch: _Batch) -> None:
        self.last_report = batch.report()
        if self._trace_path is not None:
            trace = make_trace("batch_generate", batch.job.steps or [], self.runtime.info, batch.started_at)
            trace.write(self._trace_path)

    def shutdown(self) -> None:
        """End all processes of the engine. Doing it twice does nothing."""
        self.runtime.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def batch_generate(
    prompts: Sequence[str] | None = None,
    sampling_params: Sampling | Sequence[Sampling | None] | None = None,
    *,
    input_ids: Sequence[Sequence[int]] | None = None,
    messages: Sequence[Sequence[dict[str, Any]]] | None = None,
    model_path: str | None = None,
    **server_args: Any,
) -> list[Completion]:
    """Start an engine, answer every prompt, and end it. See `BatchEngine` and
    `BatchEngine.batch_generate`.
    """
    with BatchEngine(model_path, **server_args) as engine:
        return engine.batch_generate(prompts, sampling_params, input_ids=input_ids, messages=messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What was given, an item per prompt each."""

    field: str
    values: Sequence[Any]
    sampling: Sequence[Sampling]
    expected: Sequence[int | None]
    tasks: Sequence[str]
    continuations: Sequence[str | Sequence[int] | None]
    score_from: Sequence[int | None]


def _inputs_of(
    prompts: Sequence[str] | None = None,
    sampling_params: Sampling | Sequence[Sampling | None] | None = None,
    *,
    input_ids: Sequence[Sequence[int]] | None = None,
    messages: Sequence[Sequence[dict[str, Any]]] | None = None,
    expected_new_tokens: Sequence[int | None] | None = None,
    tasks: Sequence[str] | None = None,
    continuations: Sequence[str | Sequence[int] | None] | None = None,
    score_from: Sequence[int | None] | None = None,
) -> _Inputs:
    fields: dict[str, Sequence[Any] | None] = {
        "prompt": prompts,
        "input_ids": input_ids,
        "messages": messages,
    }
    given = {name: values for name, values in fields.items() if values is not None}
    if len(given) != 1:
        raise ConfigError("give exactly one of prompts, input_ids and messages")
    ((field, values),) = given.items()
    values = _as_list("prompts" if field == "prompt" else field, values)
    return _Inputs(
        field=field,
        values=values,
        sampling=_spread(sampling_params, len(values)),
        expected=_per_prompt("expected_new_tokens", expected_new_tokens, len(values), None),
        tasks=_per_prompt("tasks", tasks, len(values), ""),
        continuations=_per_prompt("continuations", continuations, len(values), None),
        score_from=_per_prompt("score_from", score_from, len(values), None),
    )


class _Batch:
    """A batch on its way, and what has come of it.

    Attributes:
        rejected: Completions of prompts that cannot run.
        job: The others.
        started_at: When it began to run, on the monotonic clock.
    """

    def __init__(self, runtime: HostedRuntime, inputs: _Inputs, job_options: dict[str, Any]) -> None:
        self._started = time.perf_counter()
        self._info = runtime.info
        self._num_requests = len(inputs.values)
        self._store = TokenStore(None, _IN_MEMORY)
        self._rows = JobRows(runtime.info, runtime.tokenizer, self._store)
        requests, rejected = _make_requests(inputs)
        errors = zip(requests, self._rows.add(requests), strict=True)
        rejected += [(request.index, error) for request, error in errors if error is not None]
        tokenize_s = time.perf_counter() - self._started
        self.rejected = [_rejection(index, error) for index, error in rejected]
        self._failed = {index for index, _ in rejected}
        self.job = single_job(runtime, self._rows, **job_options)
        self.job.stats.tokenize_s = tokenize_s
        self.started_at = time.monotonic()

    def take(self, finished: FinishedSamples) -> Iterator[Completion]:
        """Completions of samples, each with the number of its prompt."""
        places = self._rows.places(np.array(finished.rows, np.int64)).tolist()
        for index, sample, completion in zip(places, finished.samples, finished.completions, strict=True):
            if completion.finish_reason == "abort":
                self._failed.add(index)
            yield msgspec.structs.replace(completion, index=index, sample=sample)

    def report(self) -> RunReport:
        """What it has cost."""
        return self.job.stats.report(
            self._info,
            num_requests=self._num_requests,
            num_failed=len(self._failed),
            elapsed_s=time.perf_counter() - self._started,
        )

    def close(self) -> None:
        """Give its memory back."""
        self._store.close()


def _as_list(name: str, values: Any) -> Any:
    """Values in an order, whatever holds them: a list, an array, a column of a table."""
    if hasattr(values, "to_pylist"):  # Arrow's, whose own scalars are no values
        values = values.to_pylist()
    is_one = isinstance(values, str | bytes | Mapping | Set) or getattr(values, "shape", None) == ()
    if is_one or not isinstance(values, Sized) or hasattr(values, "columns"):  # a table gives names of its columns
        raise ConfigError(f"{name} must be a list, or one column of a table, not {show(values)}")
    return values


def _per_prompt(name: str, values: Sequence[T] | None, num_prompts: int, default: T) -> Sequence[T]:
    if values is None:
        return [default] * num_prompts
    items: Sequence[T] = _as_list(name, values)
    if len(items) != num_prompts:
        raise ConfigError(f"{name} must have an item for each of the {num_prompts} prompts")
    return items


def _spread(sampling: Sampling | Sequence[Sampling | None] | None, num_prompts: int) -> Sequence[Sampling]:
    if isinstance(sampling, SamplingParams | Mapping):
        return [sampling] * num_prompts
    # A column of a table makes its values anew whenever it is read: they are held, and known by their identity.
    return [NO_SAMPLING if own is None else own for own in _per_prompt("sampling_params", sampling, num_prompts, None)]


def _make_requests(inputs: _Inputs) -> tuple[list[Request], list[tuple[int, RowError]]]:
    requests, rejected = [], []
    parsed: dict[int, SamplingParams] = {}  # one dict is often given for all
    columns = zip(inputs.values, inputs.sampling, inputs.expected, inputs.tasks, strict=True)
    scores = zip(inputs.score_from, inputs.continuations, strict=True)
    for index, ((value, params, expected, task), score) in enumerate(zip(columns, scores, strict=True)):
        try:
            if id(params) not in parsed:
                named = dataclasses.asdict(params) if isinstance(params, SamplingParams) else params
                parsed[id(params)] = parse_sampling(named, defaults=SamplingParams())
            sets_limit = isinstance(params, SamplingParams) or params.get("max_new_tokens") is not None
            sampling, first, continuation = _scored(parsed[id(params)], *score, sets_limit=sets_limit)
            request = Request(
                row_id=str(index),
                index=index,
                sampling=sampling,
                score_from=first,
                continuation=continuation,
                expected_new_tokens=expected_len(expected),
                task=task_name(task),
                may_lower_max_new_tokens=not sets_limit,
                **{inputs.field: _CHECKS[inputs.field](inputs.field, value)},
            )
            requests.append(request)
        except RowError as error:
            rejected.append((index, error))
    return requests, rejected


def _scored(
    sampling: SamplingParams, first: int | None, continuation: str | Sequence[int] | None, *, sets_limit: bool
) -> tuple[SamplingParams, int, str | Sequence[int] | None]:
    """How a prompt is sampled, its first token to score, and what follows it."""
    if first is None and continuation is None:
        return checked(sampling, sets_limit=sets_limit), 0, None
    return read_score(None if first is None else {"from": first}, continuation, sampling, sets_limit=sets_limit)


def _messages_of(name: str, value: Any) -> Any:
    # Another process reads them, which does not know classes of the user's own.
    return check_messages(orjson.loads(json_bytes(name, value)))


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": check_text,
    "input_ids": token_ids,
    "messages": _messages_of,
}


def _rejection(index: int, error: RowError) -> Completion:
    return Completion(
        index=index,
        text="",
        output_ids=(),
        finish_reason="abort",
        prompt_tokens=0,
        cached_tokens=0,
        error=error.message,
        error_code=error.code,
    )
