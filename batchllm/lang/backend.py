"""`BatchBackend`: frontend programs on a `BatchEngine`.

Knows the engine and SGLang's own request path inside it. Must not know how programs are run.

What a program asks is planned, wave by wave; log probabilities (`select` needs those of prompts), images and
``stop_regex`` take SGLang's own path, on the same engine.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import get_chat_template, get_chat_template_by_model_path

from batchllm.engine import BatchEngine
from batchllm.errors import ConfigError, EngineError
from batchllm.lang.bodies import Answers, Asked, Body, generate_body
from batchllm.lang.driver import WaveDriver
from batchllm.lang.planned_wave import PlannedWaves, can_be_planned
from batchllm.lang.programs import RunsInWaves
from batchllm.lang.waves import MAX_WAVE, Ask, Parked, Waves


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """A body whose answer is wanted in pieces; ``on_piece`` takes each as ``/generate`` streams it. At the end there is
    None, or an exception.
    """

    body: Body
    on_piece: Callable[[Any], None]


class BatchBackend(RunsInWaves, BaseBackend):
    """A backend of `sglang.lang` over an engine of this process.

    While a program is under way the engine must not be used otherwise. A program goes on while somebody waits for it:
    for a variable, for its text, for its batch.

    Args:
        engine: Runs the requests.
        chat_template_name: A name in `sglang.lang.chat_template`; None for SGLang's choice by the model path.
        max_wave: Most requests that are planned together.

    Raises:
        ConfigError: The engine has no tokenizer.

    Example:
        >>> sgl.set_default_backend(BatchBackend(engine))  # doctest: +SKIP
        >>> states = program.run_batch([{"question": "Why?"}, {"question": "How?"}])  # doctest: +SKIP
    """

    def __init__(self, engine: BatchEngine, chat_template_name: str | None = None, *, max_wave: int = MAX_WAVE) -> None:
        super().__init__()
        if engine.runtime.tokenizer is None:
            raise ConfigError("skip_tokenizer_init: programs are text and need a tokenizer; drop it")
        self._runtime = engine.runtime
        self._tokenizer = engine.runtime.tokenizer
        self._model_path = engine.runtime.model_path
        self.chat_template = (
            get_chat_template(chat_template_name)
            if chat_template_name
            else get_chat_template_by_model_path(self._model_path)
        )
        self.planned = PlannedWaves(engine.runtime, engine.job_options)
        self.waves = Waves(max_wave)
        WaveDriver(self.waves, engine.runtime.loop, self._answer)

    def get_model_name(self) -> str:
        return str(self._model_path)

    def flush_cache(self) -> None:
        self._runtime.call("engine", "flush_cache")

    def get_server_info(self) -> Any:
        return self._runtime.call("engine", "get_server_info")

    # What upstream's own executor calls: where a program streams

    def generate(self, s: Any, sampling_params: Any) -> Any:
        answers = Answers(self)
        return self._until_answered(answers, lambda: answers.generate(s, sampling_params))

    def select(self, s: Any, choices: list[str], temperature: float, choices_method: Any = None) -> Any:
        answers = Answers(self)
        return self._until_answered(answers, lambda: answers.select(s, choices, temperature, choices_method))

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[tuple[str, Any]]:
        received = _Received(self.waves)
        body = generate_body(s, sampling_params) | {"stream": True}
        self.waves.add(Ask(_Stream(body, received.add), received.add))
        text_len = 0
        while (output := received.next()) is not None:
            piece = output["text"][text_len:]
            text_len += len(piece)
            yield piece, output["meta_info"]

    def _until_answered(self, answers: Answers, attempt: Callable[[], Any]) -> Any:
        while True:
            try:
                return attempt()
            except Asked as asked:
                received = _Received(self.waves)
                self.waves.add(Ask(asked.body, received.add))
                answers.add(received.next())

    # How waves are answered

    async def _answer(self, bodies: Sequence[Any]) -> AsyncIterator[tuple[int, Any]]:
        """Answers for `WaveDriver`: what can be planned as one job, and beside it all the rest."""
        planned, counted, others = [], [], []
        for index, body in enumerate(bodies):
            if isinstance(body, _Stream):
                others.append(index)
            elif _asks_for_prompt_len(body):
                counted.append(index)
            elif can_be_planned(body):
                planned.append(index)
            else:
                others.append(index)
        prompts = self._tokenizer.encode([bodies[index]["text"] for index in counted])
        for index, prompt in zip(counted, prompts, strict=True):
            yield index, {"text": "", "meta_info": {"prompt_tokens": len(prompt)}}
        # Prompts that share a beginning side by side: the cache still has it when the next one comes.
        others.sort(key=lambda index: _first_text(bodies[index]))
        answers: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._answer_planned(planned, bodies, answers))]
        tasks += [asyncio.ensure_future(self._answer_directly(index, bodies[index], answers)) for index in others]
        try:
            for _ in range(len(planned) + len(others)):
                yield await answers.get()
        finally:
            for task in tasks:
                task.cancel()

    async def _answer_planned(
        self, planned: list[int], bodies: Sequence[Any], answers: asyncio.Queue[tuple[int, Any]]
    ) -> None:
        missing = set(planned)
        failure: Exception = EngineError("the engine gave no answer")
        try:
            async for place, answer in self.planned.answer([bodies[index] for index in planned]):
                missing.remove(planned[place])
                answers.put_nowait((planned[place], answer))
        except Exception as error:  # whatever it is, the programs would wait for ever if they did not hear of it
            failure = error
        for index in missing:
            answers.put_nowait((index, failure))

    async def _answer_directly(self, index: int, body: Any, answers: asyncio.Queue[tuple[int, Any]]) -> None:
        """Through SGLang's own request path."""
        answer: Any = None
        try:
            answer = await self._request(body)
        except Exception as error:  # SGLang refuses with many kinds; the program that asked shall see it
            answer = error
        answers.put_nowait((index, answer))

    async def _request(self, body: Any) -> Any:
        fields = body.body if isinstance(body, _Stream) else body
        output = None
        async for output in self._runtime.generate(**fields):
            if isinstance(body, _Stream):
                body.on_piece(output)
        return None if isinstance(body, _Stream) else output


class _Received:
    """What one thread waits for, in the order it came."""

    def __init__(self, waves: Waves) -> None:
        self._waves = waves
        self._items: deque[Any] = deque()
        self._waiters: list[Parked] = []

    def add(self, item: Any) -> None:
        with self._waves.lock:
            self._items.append(item)
            self._waves.wake(self._waiters)

    def next(self) -> Any:
        """Wait for the next; raises it, where it is an exception."""
        self._waves.wait_for(self._waiters, lambda: bool(self._items))
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


def _asks_for_prompt_len(body: Body) -> bool:
    """The first request of upstream's ``select``, which has the server compute the prompt too."""
    return body.keys() == {"text", "sampling_params"} and body["sampling_params"] == {"max_new_tokens": 0}


def _first_text(body: Any) -> str:
    text = (body.body if isinstance(body, _Stream) else body).get("text", "")
    return str(text[0] if isinstance(text, list) else text)
