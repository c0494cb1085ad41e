"""What a job needs of a runtime. `batchllm.host.runtime` and the server's are the real ones."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from batchllm.errors import RowError
from batchllm.planner.planner import PlannedRun
from batchllm.request import ChatOptions, ChatPrompt, Completion, Ranking, RankingPrompts, SamplingParams
from batchllm.scheduler.admission import max_total_len
from batchllm.scheduler.counters import JobCounters
from batchllm.trace.steps import StepArray

T = TypeVar("T")
Chat = tuple[Sequence[dict[str, Any]], ChatOptions | None]
"""Messages, and what the chat asks for beside them."""
Answer = tuple[dict[str, Any], Completion]
"""Fields of a chat's body (`RowHead.chat`), and an answer to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """Fixed numbers of a running engine.

    Attributes:
        model_name: What answers call the model.
        context_len: Most tokens of prompt and output together.
        vocab_size: Token ids are below this.
        kv_capacity_tokens: Slots of the KV pool.
        kv_limit_tokens: Slots of it that may be in use at once.
        num_unstored_tokens: Last tokens of an answer that need no slot.
        page_size: Tokens of a KV page.
        random_seed: Base of the seeds of requests that name none.
        has_seeded_sampling: False where the sampling backend takes no seed.
        has_grammar: False where structured output is switched off.
        has_tokenizer: False where the engine runs on token ids only.
        max_step_tokens: Most prompt tokens that a step computes; None where that is not known, or not limited.
        max_running: Most requests that run at once; None where that is not known.
        chat_sampling: What the model recommends for chats that say nothing, by names of `SamplingParams`.
        parses_answers: Answers to chats are looked through for reasoning or tool calls.
        adapters: Names of the LoRA adapters that are loaded; None where any name is taken.
        embeds: The model makes vectors of prompts, and does nothing else; None where rows of both kinds are taken.
        max_dimensions: Numbers of such a vector; None where it cannot be shortened.
        dimensions: The lengths that it may be shortened to; empty for any.
        num_engines: Engines that are to run a job together. The other numbers are those of the smallest of them.
        engines: Of each that runs now, by its number, ``kv_limit_tokens``: a mapping that changes as they come and go.
            None where there is one for good.
        live_url: Where it answers live requests by HTTP; None where it answers none, or is the server itself.
    """

    model_name: str
    context_len: int
    vocab_size: int
    kv_capacity_tokens: int
    kv_limit_tokens: int
    num_unstored_tokens: int
    page_size: int
    random_seed: int
    has_seeded_sampling: bool
    has_grammar: bool
    has_tokenizer: bool = True
    max_step_tokens: int | None = None
    max_running: int | None = None
    chat_sampling: Mapping[str, Any] = field(default_factory=dict)
    parses_answers: bool = False
    adapters: Collection[str] | None = ()
    embeds: bool | None = False
    max_dimensions: int | None = None
    dimensions: tuple[int, ...] = ()
    num_engines: int = 1
    engines: Mapping[int, int] | None = None
    live_url: str | None = None

    @property
    def engine_numbers(self) -> list[int]:
        """Numbers of the engines that run now; 0 where there is one for good."""
        return [0] if self.engines is None else list(self.engines)

    def max_request_len(self, kv_tokens: int) -> int:
        """Most tokens of prompt and output together that so many slots have room for."""
        return max_total_len(kv_tokens, self.page_size) + self.num_unstored_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequests:
    """A run on its way to the scheduler, with how to sample each of its requests.

    Attributes:
        run: The run.
        sampling: Distinct sampling parameters.
        sampling_index: Which of ``sampling`` each request uses. Shape ``[num_requests]``.
        seeds: Sampling seeds. Shape ``[num_requests]``.
        namespaces: Namespace of each request; None if all are in the default one.
        targets: Of each request the token that would follow its prompt, whose score ends its scores, -1 for none; None
            where none has one.
        engine: Number of the engine that runs it, where there are several.
    """

    run: PlannedRun
    sampling: tuple[SamplingParams, ...]
    sampling_index: Sequence[int]
    seeds: Sequence[int]
    namespaces: list[str] | None
    targets: list[int] | None = None
    engine: int = 0


@dataclass(frozen=True, slots=True)
class LostEngine:
    """One of several engines is gone, and the others go on: its requests in flight will have no answers.

    Attributes:
        number: Its number.
        reason: Why.
        is_clean: It was asked to end, so that none of its requests is to blame.
    """

    number: int
    reason: str
    is_clean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequests:
    """Requests that have finished, and what the job has cost so far.

    Attributes:
        positions: Plan positions.
        completions: One per position; their ``index`` and ``sample`` are still 0.
        counters: What the job has cost so far.
        steps: Forward steps since the last of these, ``start_s`` on the monotonic clock. `STEP_DTYPE` ``[num_steps]``.
        lost: An engine that is gone; None for none.
    """

    positions: list[int]
    completions: list[Completion]
    counters: JobCounters
    steps: StepArray
    lost: LostEngine | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Completions travel by columns, those with nothing but defaults left out: half the time of one by one."""
        return _from_columns, (self.positions, _columns(self.completions), self.counters, self.steps, self.lost)


_FIELDS = msgspec.structs.fields(Completion)


def _columns(completions: list[Completion]) -> dict[str, list[Any]]:
    columns = {}
    for field_ in _FIELDS:
        values = [getattr(completion, field_.name) for completion in completions]
        if field_.required or any(value is not field_.default for value in values):
            columns[field_.name] = values
    return columns


def _from_columns(
    positions: list[int],
    columns: dict[str, list[Any]],
    counters: JobCounters,
    steps: StepArray,
    lost: LostEngine | None,
) -> FinishedRequests:
    completions = [
        Completion(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
    ]
    return FinishedRequests(positions=positions, completions=completions, counters=counters, steps=steps, lost=lost)


class PromptTokenizer(Protocol):
    """Text and chats to token ids."""

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]: ...

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]: ...

    def encode_rankings(self, rankings: Sequence[Ranking]) -> list[RankingPrompts | RowError]: ...


class BulkTokenizer(PromptTokenizer, Protocol):
    """Text to token ids and back: `batchllm.srt.managers.chat_tokenizer.ChatTokenizer`, here or in another process."""

    def decode_token(self, token_id: int) -> bytes | str: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def parse_answers(self, answers: Sequence[Answer]) -> list[Completion]: ...


class Runtime(Protocol):
    """A running engine."""

    @property
    def info(self) -> RuntimeInfo: ...

    @property
    def tokenizer(self) -> BulkTokenizer | None:
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

    def withdraw(self, job_id: int) -> None:
        """Take back the requests of a job that have not started; each comes back as aborted."""

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        """End a job; one that is not complete is aborted."""

    def give_planned(self, share: float) -> None:
        """Let planned requests have this part of what they and live ones compete for, at least. From any thread."""

    def shutdown(self) -> None:
        """End all processes of the runtime; works on one that has died, and twice."""
