"""Every row of a file gets its one line: answered, failed in the engine, or refused before it ran."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from batchllm.dataset import JsonlSink, Row, RowKind
from batchllm.errors import ConfigError, EngineDiedError
from batchllm.offline.progress import Progress
from batchllm.offline.runner import Runner
from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo
from batchllm.request import Completion, Request, SamplingParams, TokenLogprob
from batchllm.scheduler.output_length import PredictionError
from batchllm.tokenizer import Tokenizer
from batchllm.trace import STEP_DTYPE

T = TypeVar("T")

INFO = RuntimeInfo(
    model_name="tiny",
    context_len=64,
    vocab_size=128,
    kv_capacity_tokens=64,
    kv_limit_tokens=64,
    num_unstored_tokens=1,
    page_size=1,
    random_seed=7,
    has_seeded_sampling=True,
    has_grammar=True,
)


class AsciiTokenizer:
    """What a logprobs row needs of a Hugging Face tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class LeisurelyRuntime:
    """Answers a few random requests at a time with their last token, and aborts those that end in 99."""

    tokenizer: Tokenizer | None = field(default_factory=lambda: Tokenizer(AsciiTokenizer()))
    info: RuntimeInfo = INFO
    dies_after: int | None = None
    closed: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(3)
        self.outstanding: dict[int, int] = {}
        self.last_of_prefix: dict[int, int] = {}
        self.num_answered = 0

    def open_job(self) -> int:
        return 0

    def submit(self, job_id: int, requests: RunRequests) -> None:
        run = requests.run
        start = 0
        for i, (first, last) in enumerate(zip(run.prefix_start_len, run.prefix_end_len, strict=True)):
            start += int(last - first)
            self.last_of_prefix[run.first_prefix + i] = int(run.prefix_tokens[start - 1])
        start = 0
        for i, private_len in enumerate(run.private_len.tolist()):
            start += private_len
            last_id = run.private_tokens[start - 1] if private_len else None
            self.outstanding[run.first_position + i] = (
                self.last_of_prefix[int(run.request_prefix[i])] if last_id is None else int(last_id)
            )

    async def receive(self, job_id: int) -> FinishedRequests:
        await asyncio.sleep(0)
        if self.dies_after is not None and self.num_answered >= self.dies_after:
            raise EngineDiedError("the scheduler is gone")
        positions = self.random.sample(list(self.outstanding), min(3, len(self.outstanding)))
        self.num_answered += len(positions)
        return FinishedRequests(
            positions=positions,
            completions=[self.answer(self.outstanding.pop(position)) for position in positions],
            num_computed_prompt_tokens=self.num_answered,
            num_retractions=0,
            peak_kv_tokens=1,
            prediction=PredictionError(),
            steps=np.zeros(1, STEP_DTYPE),
        )

    def answer(self, last_id: int) -> Completion:
        is_aborted = last_id == 99
        return Completion(
            index=0,
            text=f"after {last_id}",
            output_ids=[65],
            finish_reason="abort" if is_aborted else "stop",
            prompt_tokens=4,
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

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        self.closed.append(is_complete)


def _row(index: int, ids: Sequence[int], kind: RowKind = "plain", **sampling: Any) -> Row:
    params = SamplingParams(**({"max_new_tokens": 4} | sampling))
    request = Request(row_id=f"r{index}", index=index, input_ids=ids, sampling=params)
    return Row(request=request, kind=kind, given_id=f"r{index}", line=index + 1)


@dataclass
class _Ran:
    runner: Runner
    progress: Progress
    lines: list[dict[str, Any]]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(rows: Sequence[Row], folder: Path, runtime: LeisurelyRuntime | None = None) -> _Ran:
    runtime = runtime or LeisurelyRuntime()
    path = folder / "out.jsonl"
    progress = Progress(len(rows), show=False, stream=io.StringIO(), clock=lambda: 0.0)
    with JsonlSink(path) as sink:
        runner = Runner(runtime, sink, progress)
        runner.run(rows)
    return _Ran(runner, progress, _lines(path))


def test_every_row_gets_one_line_with_its_own_answer_in_input_order(tmp_path: Path) -> None:
    ran = _run([_row(i, [1, 2, 3, i]) for i in range(50)], tmp_path)
    assert [line["id"] for line in ran.lines] == [f"r{i}" for i in range(50)]
    assert [line["text"] for line in ran.lines] == [f"after {i}" for i in range(50)]
    assert ran.runner.failed == []


def test_a_row_of_many_samples_gets_its_one_line_once_all_are_there(tmp_path: Path) -> None:
    ran = _run([_row(i, [1, i], n=1 + i % 4) for i in range(20)], tmp_path)
    assert [len(line.get("choices", [0])) for line in ran.lines] == [1 + i % 4 for i in range(20)]
    for line in ran.lines:
        choices = line.get("choices", [])
        assert [choice["index"] for choice in choices] == list(range(len(choices)))


def test_an_aborted_row_gets_an_error_line_and_the_others_go_on(tmp_path: Path) -> None:
    ran = _run([_row(0, [5, 99]), _row(1, [5, 6])], tmp_path)
    assert ran.lines[0]["error"] == {"code": "aborted", "message": "out of luck", "line": 1, "param": None}
    assert ran.lines[1]["text"] == "after 6"
    assert [bad.index for bad in ran.runner.failed] == [0]


def test_a_row_of_which_every_sample_is_aborted_fails_once(tmp_path: Path) -> None:
    ran = _run([_row(0, [5, 99], n=4)], tmp_path)
    assert len(ran.lines) == len(ran.runner.failed) == 1


def test_an_aborted_openai_row_is_a_server_error(tmp_path: Path) -> None:
    (line,) = _run([_row(0, [99], "completions")], tmp_path).lines
    assert line["response"]["status_code"] == 500
    assert line["custom_id"] == "r0"


def test_a_row_that_can_never_run_gets_its_error_line(tmp_path: Path) -> None:
    ran = _run([_row(0, [1] * 80), _row(1, [2])], tmp_path)
    assert ran.lines[0]["error"]["code"] == "prompt_too_long"
    assert ran.lines[1]["text"] == "after 2"
    assert [bad.code for bad in ran.runner.failed] == ["prompt_too_long"]


def test_rows_that_failed_to_read_leave_gaps_and_get_their_own_lines(tmp_path: Path) -> None:
    """`Runner.run` sees only good rows; their indices are those of the file."""
    ran = _run([_row(3, [1]), _row(8, [2])], tmp_path)
    assert [line["id"] for line in ran.lines] == ["r3", "r8"]


def test_a_job_of_bad_rows_only_writes_them_and_ends(tmp_path: Path) -> None:
    ran = _run([_row(i, []) for i in range(3)], tmp_path)
    assert [line["error"]["code"] for line in ran.lines] == ["empty_prompt"] * 3


def test_every_row_is_counted_once_in_the_progress(tmp_path: Path) -> None:
    rows = [_row(0, [99], n=2), _row(1, []), _row(2, [5], n=3), _row(3, [6])]
    ran = _run(rows, tmp_path)
    assert "2 failed" in ran.progress.summary()
    assert ran.progress.summary().endswith("0:00 left")


def test_logprobs_of_openai_rows_are_decoded_by_the_tokenizer(tmp_path: Path) -> None:
    (line,) = _run([_row(0, [5], "completions", logprobs=True)], tmp_path).lines
    assert line["response"]["body"]["choices"][0]["logprobs"]["tokens"] == ["A"]
    assert line["response"]["body"]["model"] == "tiny"


def test_logprobs_of_openai_rows_without_a_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logprobs need a tokenizer"):
        _run([_row(0, [5], "completions", logprobs=True)], tmp_path, LeisurelyRuntime(tokenizer=None))


def test_an_engine_that_dies_leaves_what_was_answered_in_the_partial_file(tmp_path: Path) -> None:
    runtime = LeisurelyRuntime(dies_after=9)
    with pytest.raises(EngineDiedError) as caught:
        _run([_row(i, [1, i]) for i in range(40)], tmp_path, runtime)
    assert not (tmp_path / "out.jsonl").exists()
    written = Counter(line["id"] for line in _lines(tmp_path / "out.jsonl.partial"))
    assert len(written) == 9
    assert set(written.values()) == {1}
    assert runtime.closed == [False]
    assert "9 finished rows are kept" in "".join(caught.value.__notes__)


def test_a_job_that_ends_well_is_closed_as_complete(tmp_path: Path) -> None:
    runtime = LeisurelyRuntime()
    _run([_row(0, [1])], tmp_path, runtime)
    assert runtime.closed == [True]
