"""What a job needs of a runtime. ``batchllm.srt.engine`` is the real one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from batchllm.planner.run import PlannedRun
from batchllm.request import Completion, SamplingParams
from batchllm.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """Fixed numbers of a running engine.

    Attributes:
        model_name: What answers call the model.
        context_len: Most tokens of prompt and output together.
        vocab_size: Token ids are below this.
        kv_capacity_tokens: Slots of the KV pool.
        max_request_len: Most tokens of prompt and output together that the KV pool has room for.
        page_size: Tokens of a KV page.
        random_seed: Base of the seeds of requests that name none.
        has_seeded_sampling: False where the sampling backend takes no seed.
        has_grammar: False where structured output is switched off.
    """

    model_name: str
    context_len: int
    vocab_size: int
    kv_capacity_tokens: int
    max_request_len: int
    page_size: int
    random_seed: int
    has_seeded_sampling: bool
    has_grammar: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequests:
    """A run on its way to the scheduler, with how to sample each of its requests.

    Attributes:
        run: The run.
        sampling: Distinct sampling parameters.
        sampling_index: Which of ``sampling`` each request uses. Shape ``[num_requests]``.
        seeds: Sampling seeds. Shape ``[num_requests]``.
        namespaces: Of each request, or None where all are in the default one.
    """

    run: PlannedRun
    sampling: tuple[SamplingParams, ...]
    sampling_index: Sequence[int]
    seeds: Sequence[int]
    namespaces: list[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequests:
    """Requests that have finished, and what the job has cost so far.

    Attributes:
        positions: Plan positions.
        completions: One per position; their ``index`` and ``sample`` are still 0.
        num_computed_prompt_tokens: Prompt tokens of the job computed so far, counted in the scheduler.
        num_retractions: Of the job so far.
        peak_kv_tokens: Most slots in use at once so far.
    """

    positions: list[int]
    completions: list[Completion]
    num_computed_prompt_tokens: int
    num_retractions: int
    peak_kv_tokens: int


class Runtime(Protocol):
    """A running engine."""

    @property
    def info(self) -> RuntimeInfo: ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the engine runs on token ids only."""

    def open_job(self) -> int:
        """Begin a job; returns its number."""

    def submit(self, job_id: int, requests: RunRequests) -> None:
        """Send the next run of a job, in plan order."""

    async def receive(self, job_id: int) -> FinishedRequests:
        """Wait for the next finished requests of a job.

        Raises:
            EngineDiedError: None will come.
        """

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """An asynchronous generator as an ordinary iterator, driven on the runtime's event loop."""

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        """End a job; one that is not complete is aborted."""
