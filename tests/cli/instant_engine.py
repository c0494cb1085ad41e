"""The ``batchllm`` command on an engine that answers at once; everything above the runtime's seam is the real thing.

    python tests/cli/instant_engine.py run -i in.jsonl -o out.jsonl

The text of an answer is ``after`` and the last token of its prompt. A prompt that ends with `ABORTED` fails. The rest
is `Settings`; the program takes them from the environment, e.g. INSTANT_BATCH=5.

Knows the runtime's seam and the name of the function that starts an engine; not what a command makes of the answers.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np

from batchllm.default_model import default_model_path
from batchllm.errors import EngineDiedError, EngineError, RowError
from batchllm.offline.runtime import Chat, FinishedRequests, RunRequests, RuntimeInfo
from batchllm.request import ChatPrompt, Completion, TokenLogprob
from batchllm.scheduler.output_length import PredictionError
from batchllm.tokenizer import Tokenizer
from batchllm.trace.steps import STEP_DTYPE

T = TypeVar("T")
ABORTED = 999
CONTEXT_LEN = 2048
_PREFIX = "INSTANT_"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the engine does.

    Attributes:
        batch: Answers that come together; 0 for all that are asked for.
        delay_s: Seconds before each batch of answers.
        stuck_after: Answers after which no more come; 0 for never.
        log: Gets a line ``start`` with each engine, and the last token of each prompt that is submitted; "" for none.
        moment: When `do` and `fault` come: "start" before anything is asked, "answers" after `at` answers, "end" when
            the engine is no longer needed.
        at: Number of answers.
        do: A shell command, once in an engine; its parent is the driver.
        fault: Once, in the first engine: "death", "memory" that is not to be
            had, or a "clock" that is set, e.g. "clock-3600".
        fails: 1 if no engine starts.
    """

    batch: int = 0
    delay_s: float = 0.0
    stuck_after: int = 0
    log: str = ""
    moment: str = "answers"
    at: int = 0
    do: str = ""
    fault: str = ""
    fails: int = 0

    @classmethod
    def from_environment(cls) -> Settings:
        given: dict[str, Any] = {}
        for field in fields(cls):
            text = os.environ.get(_PREFIX + field.name.upper())
            if text is not None:
                given[field.name] = type(field.default)(text)
        return cls(**given)

    def to_environment(self) -> dict[str, str]:
        return {_PREFIX + field.name.upper(): str(getattr(self, field.name)) for field in fields(self)}


class LazyTokenizer:
    """The tokenizer of the embedded model, loaded when first asked: it takes seconds to import."""

    def __getattr__(self, name: str) -> Any:
        loaded = Tokenizer.from_model(default_model_path())
        self.__dict__.update(encode=loaded.encode, decode=loaded.decode, decode_token=loaded.decode_token)
        return getattr(loaded, name)

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        """Chats in a form of their own: what SGLang makes of them takes seconds to import (`test_chat_tokenizer`)."""
        texts = [json.dumps([messages, options and options.fields]) for messages, options in chats]
        return [ChatPrompt(ids=ids) for ids in self.encode(texts)]


TOKENIZER: Any = LazyTokenizer()


class InstantRuntime:
    """Answers requests in the order in which they were submitted, each with the token 65."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = TOKENIZER
        self.info = RuntimeInfo(
            model_name="instant",
            context_len=CONTEXT_LEN,
            vocab_size=4096,
            kv_capacity_tokens=65_536,
            kv_limit_tokens=65_536,
            num_unstored_tokens=1,
            page_size=1,
            random_seed=7,
            has_seeded_sampling=True,
            has_grammar=True,
        )
        self._settings = settings
        self._num_answered = 0
        self._is_done_with_it = not (settings.do or settings.fault)
        self._forget()
        self._log(["start"])
        if settings.fault != "death":  # whoever is dead is found so when it is asked
            self._meet("start")

    def _forget(self) -> None:
        self._last_ids: dict[int, int] = {}
        """Of each outstanding request, by its position in the plan."""
        self._prompt_lens: dict[int, int] = {}
        self._prefix_ends: dict[int, tuple[int, int]] = {}
        """Last token and length of each prefix, by its number."""
        self._withdrawn: list[int] = []
        self._num_computed = 0

    def _log(self, lines: list[Any]) -> None:
        if self._settings.log:
            with open(self._settings.log, "a") as file:
                file.writelines(f"{line}\n" for line in lines)

    def _meet(self, moment: str) -> None:
        """Do what the settings say for this moment."""
        settings = self._settings
        if self._is_done_with_it or moment != settings.moment:
            return
        if moment == "answers" and self._num_answered < settings.at:
            return
        self._is_done_with_it = True
        if settings.do:
            subprocess.run(settings.do, shell=True, check=False)
        if settings.fault == "memory":
            raise MemoryError
        if settings.fault == "death":
            raise EngineDiedError("it is dead")
        if settings.fault:
            set_clock(int(settings.fault.removeprefix("clock")))

    def open_job(self) -> int:
        self._forget()
        self._meet("start")
        return 0

    def submit(self, job_id: int, requests: RunRequests) -> None:
        run = requests.run
        ends = np.cumsum(run.prefix_end_len - run.prefix_start_len)
        for i, end in enumerate(ends.tolist()):
            self._prefix_ends[run.first_prefix + i] = (int(run.prefix_tokens[end - 1]), int(run.prefix_end_len[i]))
        ends = np.cumsum(run.private_len)
        for i, end in enumerate(ends.tolist()):
            position, private_len = run.first_position + i, int(run.private_len[i])
            last_id, shared_len = self._prefix_ends.get(int(run.request_prefix[i]), (0, 0))
            self._last_ids[position] = int(run.private_tokens[end - 1]) if private_len else last_id
            self._prompt_lens[position] = shared_len + private_len
        self._num_computed += len(run.private_tokens) + len(run.prefix_tokens)
        self._log(list(self._last_ids.values())[-len(run) :])

    async def receive(self, job_id: int) -> FinishedRequests:
        settings = self._settings
        await asyncio.sleep(settings.delay_s)
        self._meet("answers")
        if self._withdrawn:
            positions, self._withdrawn = self._withdrawn, []
            return self._finished(positions, is_withdrawn=True)
        if settings.stuck_after and self._num_answered >= settings.stuck_after:
            await asyncio.sleep(3600)
        positions = list(self._last_ids)[: settings.batch or None]
        self._num_answered += len(positions)
        return self._finished(positions)

    def _finished(self, positions: list[int], *, is_withdrawn: bool = False) -> FinishedRequests:
        return FinishedRequests(
            positions=positions,
            completions=[self._answer(position, is_withdrawn) for position in positions],
            num_computed_prompt_tokens=self._num_computed,
            num_retractions=0,
            peak_kv_tokens=1,
            prediction=PredictionError(),
            steps=np.zeros(1, STEP_DTYPE),
        )

    def _answer(self, position: int, is_withdrawn: bool) -> Completion:
        last_id = self._last_ids.pop(position)
        is_aborted = is_withdrawn or last_id == ABORTED
        return Completion(
            index=0,
            text=f"after {last_id}",
            output_ids=[65],
            finish_reason="abort" if is_aborted else "stop",
            prompt_tokens=self._prompt_lens.pop(position),
            cached_tokens=0,
            logprobs=(TokenLogprob(token_id=65, logprob=-0.5),),
            error="out of luck" if is_aborted else None,
        )

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(stream))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    def withdraw(self, job_id: int) -> None:
        """The next batch runs already; the others have not started."""
        self._withdrawn = list(self._last_ids)[self._settings.batch :]

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        pass

    def shutdown(self) -> None:
        self._meet("end")


def set_clock(by_s: int) -> None:
    """Set this process's clock on, or back."""
    real = time.time
    time.time = lambda: real() + by_s


def engine_starter(settings: Settings) -> Callable[..., InstantRuntime]:
    """What stands in for ``batchllm.cli.run._start_engine``."""

    num_started: list[int] = []

    def start(*_: Any) -> InstantRuntime:
        if settings.fails:
            raise EngineError("the engine did not start")
        now = settings if not num_started else replace(settings, fault="")
        num_started.append(1)
        return InstantRuntime(now)

    return start


def use_instant_engine(settings: Settings) -> None:
    """Have the command of this process run on it from now on."""
    from batchllm import cli
    from batchllm.cli import run

    cli.begin_engine = lambda _: nullcontext()
    run._start_engine = engine_starter(settings)


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    from batchllm.cli import command

    use_instant_engine(Settings.from_environment())
    return command(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
