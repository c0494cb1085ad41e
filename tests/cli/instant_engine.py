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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from batchllm.default_model import default_model_path
from batchllm.errors import EngineDiedError, EngineError, RowError
from batchllm.offline.fake_runtime import FakeJob, FakeRequest, FakeRuntime
from batchllm.offline.runtime import Chat, RunRequests, RuntimeInfo
from batchllm.request import ChatPrompt, Completion, TokenLogprob
from batchllm.tokenizer import Tokenizer

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
        fault: Once, in the first engine: "death", "memory" that is not to be had, or a "clock" that is set, e.g.
            "clock-3600".
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


INFO = RuntimeInfo(
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


class InstantRuntime(FakeRuntime):
    """Answers requests in the order in which they were submitted, each with the token 65."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(INFO, TOKENIZER)
        self._settings = settings
        self._is_done_with_it = not (settings.do or settings.fault)
        self._log(["start"])
        if settings.fault != "death":  # whoever is dead is found so when it is asked
            self._meet("start", 0)

    def _log(self, lines: list[Any]) -> None:
        if self._settings.log:
            with open(self._settings.log, "a") as file:
                file.writelines(f"{line}\n" for line in lines)

    def _meet(self, moment: str, num_answered: int) -> None:
        """Do what the settings say for this moment."""
        settings = self._settings
        if self._is_done_with_it or moment != settings.moment:
            return
        if moment == "answers" and num_answered < settings.at:
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
        self._meet("start", 0)
        return super().open_job()

    def submit(self, job_id: int, requests: RunRequests) -> None:
        super().submit(job_id, requests)
        sent = list(self.jobs[job_id].outstanding.values())[-len(requests.run) :]
        self._log([request.prompt[-1] for request in sent])

    def num_answered_for(self, job: FakeJob) -> int:
        """Answers by which it is known when to do something else."""
        return self.num_answered

    async def before_answers(self, job: FakeJob) -> None:
        settings = self._settings
        await asyncio.sleep(settings.delay_s)
        self._meet("answers", self.num_answered_for(job))
        if settings.stuck_after and self.num_answered_for(job) >= settings.stuck_after and not job.withdrawn:
            await asyncio.sleep(3600)

    def choose(self, job: FakeJob) -> list[FakeRequest]:
        return super().choose(job)[: self._settings.batch or None]

    def has_started(self, place: int) -> bool:
        """The next batch runs already."""
        return place < self._settings.batch

    def answer(self, request: FakeRequest) -> Completion:
        prompt = request.prompt
        is_aborted = prompt[-1] == ABORTED
        return Completion(
            index=0,
            text=f"after {prompt[-1]}",
            output_ids=[65],
            finish_reason="abort" if is_aborted else "stop",
            prompt_tokens=len(prompt),
            cached_tokens=0,
            logprobs=(TokenLogprob(token_id=65, logprob=-0.5),),
            error="out of luck" if is_aborted else None,
        )

    def shutdown(self) -> None:
        self._meet("end", self.num_answered)


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
    run._held_template = lambda _: nullcontext()
    run._start_engine = engine_starter(settings)


def main(argv: list[str]) -> int:
    """The command; returns its exit status."""
    from batchllm.cli import command

    use_instant_engine(Settings.from_environment())
    return command(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
