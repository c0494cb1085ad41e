"""Every row of a job gets its one result: answered, failed, or refused, whatever dies or stops on the way."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import BadRow, Row, RowKind
from batchllm.errors import BatchLLMError, ConfigError, EngineDiedError, EngineError, WorkloadError
from batchllm.offline import recovery
from batchllm.offline.fake_runtime import FakeJob, FakeRequest, FakeRuntime
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.journal import Journal
from batchllm.offline.outputs import Outputs
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.runtime import RunRequests, RuntimeInfo
from batchllm.offline.stop import StopSignal
from batchllm.request import Completion, Request, SamplingParams, TokenLogprob
from batchllm.scheduler.counters import JobCounters
from batchllm.tokenizer import Tokenizer

T = TypeVar("T")

INFO = RuntimeInfo(
    model_name="tiny",
    context_len=64,
    vocab_size=1024,
    kv_capacity_tokens=64,
    kv_limit_tokens=64,
    num_unstored_tokens=1,
    page_size=1,
    random_seed=7,
    has_seeded_sampling=True,
    has_grammar=True,
)
ABORTED, ABORTED_ONCE, POISON, AT_FAULT = 999, 998, 997, 996
"""Last tokens of prompts that are aborted every time, the first time, and that kill the engine."""


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.0)


class AsciiTokenizer:
    """What a logprobs row needs of a Hugging Face tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class World:
    """What engines share that run one after the other.

    Attributes:
        num_started: Engines started.
        submitted: How often each prompt was submitted, by its last token.
        death_chance: That an engine dies when asked for answers, for no reason.
        fails_to_start: Engines, by number, that do not come up.
        start_error: Why not.
    """

    tokenizer: Tokenizer | None = field(default_factory=lambda: Tokenizer(AsciiTokenizer()))
    info: RuntimeInfo = INFO
    death_chance: float = 0.0
    fails_to_start: frozenset[int] = frozenset()
    start_error: BatchLLMError = field(default_factory=lambda: EngineError("no memory on the device"))
    on_receive: Callable[[int], None] = lambda num_answered: None
    num_started: int = 0
    num_answered: int = 0
    num_running: int = 0
    submitted: Counter[int] = field(default_factory=Counter)
    aborted_once: set[int] = field(default_factory=set)
    closed: list[bool] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(3))

    def start(self) -> LeisurelyRuntime:
        self.num_started += 1
        if self.num_started in self.fails_to_start:
            raise self.start_error
        assert self.num_running == 0, "two engines at once"
        self.num_running += 1
        return LeisurelyRuntime(self)


class LeisurelyRuntime(FakeRuntime):
    """Answers a few random requests at a time with their last token."""

    def __init__(self, world: World) -> None:
        super().__init__(world.info, world.tokenizer)
        self.world = world
        self.closed = world.closed
        self.is_alive = True
        self.chosen: list[FakeRequest] = []

    def submit(self, job_id: int, requests: RunRequests) -> None:
        assert self.is_alive
        super().submit(job_id, requests)
        sent = list(self.jobs[job_id].outstanding.values())[-len(requests.run) :]
        self.world.submitted.update(request.prompt[-1] for request in sent)

    async def before_answers(self, job: FakeJob) -> None:
        world = self.world
        world.on_receive(world.num_answered)
        outstanding = list(job.outstanding.values())
        self.chosen = world.random.sample(outstanding, min(3, len(outstanding)))
        dies = world.random.random() < world.death_chance
        if dies or any(request.prompt[-1] == POISON for request in self.chosen):
            self.is_alive = False
            raise EngineDiedError("the scheduler is gone")

    def choose(self, job: FakeJob) -> list[FakeRequest]:
        self.world.num_answered += len(self.chosen)
        return self.chosen

    def has_started(self, place: int) -> bool:
        return place < 2

    def counters(self, job: FakeJob) -> JobCounters:
        return JobCounters(num_computed_prompt_tokens=self.world.num_answered, peak_kv_tokens=1)

    def answer(self, request: FakeRequest) -> Completion:
        last_id = request.prompt[-1]
        is_first = last_id == ABORTED_ONCE and last_id not in self.world.aborted_once
        self.world.aborted_once.add(last_id)
        is_aborted = last_id in (ABORTED, AT_FAULT) or is_first
        return Completion(
            index=0,
            text=f"after {last_id}",
            output_ids=[65],
            finish_reason="abort" if is_aborted else "stop",
            prompt_tokens=4,
            cached_tokens=0,
            logprobs=(TokenLogprob(token_id=65, logprob=-0.5),),
            error="out of luck" if is_aborted else None,
            error_code="invalid_grammar" if last_id == AT_FAULT else None,
        )

    def shutdown(self) -> None:
        self.world.num_running = 0


def _row(index: int, ids: Sequence[int], kind: RowKind = "plain", name: str | None = None, **sampling: Any) -> Row:
    params = SamplingParams(**({"max_new_tokens": 4} | sampling))
    name = name or f"r{index}"
    request = Request(row_id=name, index=index, input_ids=ids, sampling=params)
    return Row(request=request, kind=kind, given_id=name, line=index + 1)


def _bad(index: int) -> BadRow:
    return BadRow(kind="plain", given_id=None, index=index, line=index + 1, code="invalid_json", message="no JSON")


@dataclass
class Ran:
    runner: Runner
    recorder: Recorder
    progress: Progress
    is_complete: bool
    lines: list[dict[str, Any]]
    order: list[Any]
    """Identifiers of the journal's lines, in the order in which they were recorded."""


def _run(
    rows: Iterable[Row | BadRow],
    folder: Path,
    world: World | None = None,
    *,
    max_failures: int | None = None,
    grace_s: float = 30.0,
    **options: Any,
) -> Ran:
    """One run of the job in a folder; called again, the next one."""
    world = world or World()
    job_folder = folder / "job"
    rows = list(rows)
    if Journal.exists(job_folder):
        journal = Journal.open(job_folder)
    else:
        journal = Journal.create(job_folder, fingerprint=Fingerprint({}), command={})
    out = folder / "out.jsonl"
    with (
        journal,
        Progress(None, show=False, stream=io.StringIO(), clock=lambda: 0.0) as progress,
        StopSignal(grace_s) as stop,
    ):
        outputs = Outputs(str(out), errors_path=None, order="input", journal=journal)
        recorder = Recorder(journal, outputs, progress, max_failures)
        runner = Runner(
            world.start,
            journal=journal,
            recorder=recorder,
            progress=progress,
            stop=stop,
            folder=folder,
            options=RunOptions(**options),
        )
        outputs.begin()
        try:
            is_complete = runner.run(iter(rows))
        finally:
            runner.close()
            assert world.num_running == 0
        order = [json.loads(line)["id"] for line in journal.results("finished")]
        if is_complete:
            outputs.finish()
    return Ran(runner, recorder, progress, is_complete, _lines(out) if is_complete else [], order)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _codes(lines: list[dict[str, Any]]) -> list[str | None]:
    return [line["error"]["code"] if "error" in line else None for line in lines]


def test_every_row_gets_one_line_with_its_own_answer_in_input_order(tmp_path: Path) -> None:
    ran = _run([_row(i, [1, 2, 3, i]) for i in range(50)], tmp_path)
    assert [line["id"] for line in ran.lines] == [f"r{i}" for i in range(50)]
    assert [line["text"] for line in ran.lines] == [f"after {i}" for i in range(50)]
    assert (ran.recorder.num_failed, ran.runner.num_rows) == (0, 50)


def test_a_row_of_many_samples_gets_its_one_line_once_all_are_there(tmp_path: Path) -> None:
    ran = _run([_row(i, [1, i], n=1 + i % 4) for i in range(20)], tmp_path)
    assert [len(line.get("choices", [0])) for line in ran.lines] == [1 + i % 4 for i in range(20)]
    for line in ran.lines:
        choices = line.get("choices", [])
        assert [choice["index"] for choice in choices] == list(range(len(choices)))


def test_bad_rows_get_their_error_lines_and_the_others_go_on(tmp_path: Path) -> None:
    """Unreadable, too long, aborted, of many samples aborted, without a prompt."""
    rows = [_bad(0), _row(1, [1] * 80), _row(2, [5, ABORTED]), _row(3, [6]), _row(4, [ABORTED], n=4), _row(5, [])]
    ran = _run(rows, tmp_path)
    assert _codes(ran.lines) == ["invalid_json", "prompt_too_long", "aborted", None, "aborted", "empty_prompt"]
    assert ran.lines[2]["error"] == {"code": "aborted", "message": "out of luck", "line": 3, "param": None}
    assert [bad.index for bad in sorted(ran.recorder.first_failed, key=lambda bad: bad.index)] == [0, 1, 2, 4, 5]
    assert ran.recorder.num_failed == 5


def test_a_row_with_the_id_of_an_earlier_one_fails_and_names_its_line(tmp_path: Path) -> None:
    ran = _run([_row(0, [1]), _row(1, [2], name="x"), _row(2, [3], name="x"), _row(3, [4], name="x")], tmp_path)
    assert _codes(ran.lines) == [None, None, "duplicate_id", "duplicate_id"]
    assert "line 2" in ran.lines[3]["error"]["message"]


def test_an_aborted_openai_row_is_a_server_error(tmp_path: Path) -> None:
    (line,) = _run([_row(0, [ABORTED], "completions")], tmp_path).lines
    assert line["response"]["status_code"] == 500
    assert line["custom_id"] == "r0"


def test_a_job_of_bad_rows_only_starts_no_engine(tmp_path: Path) -> None:
    world = World()
    ran = _run([_bad(i) for i in range(3)], tmp_path, world)
    assert _codes(ran.lines) == ["invalid_json"] * 3
    assert world.num_started == 0


def test_logprobs_of_openai_rows_are_decoded_by_the_tokenizer(tmp_path: Path) -> None:
    (line,) = _run([_row(0, [5], "completions", logprobs=True)], tmp_path).lines
    assert line["response"]["body"]["choices"][0]["logprobs"]["tokens"] == ["A"]
    assert line["response"]["body"]["model"] == "tiny"


def test_logprobs_of_openai_rows_without_a_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logprobs need a tokenizer"):
        _run([_row(0, [5], "completions", logprobs=True)], tmp_path, World(tokenizer=None))


def test_every_row_is_counted_once_in_the_progress(tmp_path: Path) -> None:
    rows = [_row(0, [ABORTED], n=2), _row(1, []), _row(2, [5], n=3), _row(3, [6])]
    ran = _run(rows, tmp_path)
    assert "2 failed" in ran.progress.summary()
    assert ran.progress.summary().endswith("0:00 left")


# Rows that fail


def test_a_row_that_fails_is_run_again_as_often_as_asked(tmp_path: Path) -> None:
    world = World()
    ran = _run([_row(0, [ABORTED_ONCE]), _row(1, [ABORTED]), _row(2, [5])], tmp_path, world, num_retries=2)
    assert _codes(ran.lines) == [None, "aborted", None]
    assert (world.submitted[ABORTED_ONCE], world.submitted[ABORTED], world.submitted[5]) == (2, 3, 1)


def test_a_row_that_is_at_fault_is_not_run_again(tmp_path: Path) -> None:
    world = World()
    ran = _run([_row(0, [AT_FAULT]), _row(1, [5])], tmp_path, world, num_retries=2)
    assert _codes(ran.lines) == ["invalid_grammar", None]
    assert world.submitted[AT_FAULT] == 1


def test_without_retries_a_row_fails_the_first_time(tmp_path: Path) -> None:
    world = World()
    assert _codes(_run([_row(0, [ABORTED_ONCE])], tmp_path, world).lines) == ["aborted"]
    assert world.submitted[ABORTED_ONCE] == 1


def test_one_failure_too_many_stops_the_job_and_keeps_what_is_done(tmp_path: Path) -> None:
    rows = [_bad(0), _bad(1), *(_row(i, [i, ABORTED if i % 2 else i]) for i in range(2, 60))]
    assert _run(rows, tmp_path / "enough", max_failures=31).is_complete
    with pytest.raises(WorkloadError, match=r"--max-failures 3: 4 rows have failed.*line \d+: out of luck"):
        _run(rows, tmp_path, max_failures=3)
    with Journal.open(tmp_path / "job") as journal:
        assert len(journal.failed()) == 4
    with pytest.raises(WorkloadError, match="--max-failures 4: 5 rows"):
        _run(rows, tmp_path, max_failures=4)


# Engines that die


def test_an_engine_that_dies_is_replaced_and_no_answer_is_asked_for_twice(tmp_path: Path) -> None:
    """What had been answered is not submitted again, and what had not been is."""
    world = World(death_chance=0.04)
    ran = _run([_row(i, [7, i]) for i in range(300)], tmp_path, world)
    assert world.num_started > 3
    assert [line["id"] for line in ran.lines] == [f"r{i}" for i in range(300)]
    assert ran.order == list(dict.fromkeys(ran.order))
    assert world.num_answered == 300
    assert ran.runner.restarts.num_deaths == world.num_started - 1


def test_a_row_that_kills_the_engine_is_found_and_the_rest_is_answered(tmp_path: Path) -> None:
    world = World()
    rows = [_row(i, [i % 9, POISON if i == 77 else i]) for i in range(200)]
    ran = _run(rows, tmp_path, world)
    assert _codes(ran.lines) == ["engine_died" if i == 77 else None for i in range(200)]
    assert "the scheduler is gone" in ran.lines[77]["error"]["message"]
    assert world.num_started <= 6


@pytest.mark.parametrize("error", [EngineError("no memory"), ConfigError("--ray-address: nothing is reached there")])
def test_an_engine_that_does_not_come_back_at_once_is_tried_again(tmp_path: Path, error: BatchLLMError) -> None:
    """Also where it is its place that is not there: it was, when the job began."""
    world = World(fails_to_start=frozenset({2, 3}), start_error=error)
    rows = [_row(i, [POISON if i == 3 else i]) for i in range(20)]
    assert _codes(_run(rows, tmp_path, world).lines).count("engine_died") == 1


def test_an_engine_that_never_starts_is_not_tried_again(tmp_path: Path) -> None:
    """Before it has run once it is a wrong flag or model rather than bad luck."""
    world = World(fails_to_start=frozenset(range(99)))
    with pytest.raises(EngineError, match="no memory"):
        _run([_row(0, [1])], tmp_path, world)
    assert world.num_started == 1


def test_engines_that_die_without_a_result_end_the_job_which_can_go_on(tmp_path: Path) -> None:
    rows = [_row(i, [i]) for i in range(30)]
    with pytest.raises(EngineDiedError, match="times in a row"):
        _run(rows, tmp_path, World(death_chance=1.0))
    assert len(_run(rows, tmp_path).lines) == 30


def test_samples_of_an_unfinished_row_are_drawn_again_after_a_death(tmp_path: Path) -> None:
    ran = _run([_row(i, [7, i], n=5) for i in range(40)], tmp_path, World(death_chance=0.02))
    assert [[choice["index"] for choice in line["choices"]] for line in ran.lines] == [[0, 1, 2, 3, 4]] * 40


# Jobs that stop and go on


def test_a_stopped_job_finishes_what_runs_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    rows = [_row(i, [i // 10, i]) for i in range(200)]
    signals = iter([True])
    world = World(
        on_receive=lambda num: os.kill(os.getpid(), signal.SIGTERM) if num >= 60 and next(signals, 0) else None
    )
    ran = _run(rows, tmp_path, world)
    assert not ran.is_complete
    assert 60 <= len(ran.order) < 200
    assert world.closed == [False]
    num_submitted = world.submitted.total()
    world.on_receive = lambda num: None
    again = _run(rows, tmp_path, world)
    assert again.order[: len(ran.order)] == ran.order
    assert sorted(again.order) == sorted(f"r{i}" for i in range(200))
    assert world.submitted.total() - num_submitted == 200 - len(ran.order)


def test_a_signal_that_ends_the_engine_too_starts_no_other(tmp_path: Path) -> None:
    """As one that a service manager sends to all processes of the job."""

    def on_receive(num: int) -> None:
        if num >= 60:
            os.kill(os.getpid(), signal.SIGTERM)
            raise EngineDiedError("the scheduler is gone")

    rows = [_row(i, [i // 10, i]) for i in range(200)]
    world = World(on_receive=on_receive)
    ran = _run(rows, tmp_path, world)
    assert not ran.is_complete
    assert world.num_started == 1
    world.on_receive = lambda num: None
    assert sorted(_run(rows, tmp_path, world).order) == sorted(f"r{i}" for i in range(200))


def test_a_signal_that_comes_with_the_last_answer_stops_nothing(tmp_path: Path) -> None:
    signals = iter([True])
    world = World(on_receive=lambda num: os.kill(os.getpid(), signal.SIGTERM) if next(signals, 0) else None)
    ran = _run([_row(i, [i]) for i in range(3)], tmp_path, world)
    assert ran.is_complete
    assert len(ran.lines) == 3


def test_what_runs_longer_than_the_grace_is_given_up(tmp_path: Path) -> None:
    rows = [_row(i, [i]) for i in range(60)]
    signals = iter([True])
    world = World(on_receive=lambda num: os.kill(os.getpid(), signal.SIGINT) if num >= 9 and next(signals, 0) else None)
    ran = _run(rows, tmp_path, world, grace_s=0.0)
    assert not ran.is_complete
    assert len(ran.order) < 15


def test_a_second_signal_ends_at_once_and_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    rows = [_row(i, [i]) for i in range(60)]
    signals = iter([True] * 2)
    world = World(
        on_receive=lambda num: os.kill(os.getpid(), signal.SIGINT) if num >= 30 and next(signals, 0) else None
    )
    ran = _run(rows, tmp_path, world, grace_s=1000.0)
    assert not ran.is_complete
    assert 30 <= len(ran.order) < 40
    world.on_receive = lambda num: None
    assert len(_run(rows, tmp_path, world).lines) == 60
    assert set(world.submitted.values()) <= {1, 2}


def test_a_job_that_is_done_starts_no_engine(tmp_path: Path) -> None:
    rows = [_row(i, [i, ABORTED if i == 4 else i]) for i in range(20)]
    first = _run(rows, tmp_path)
    world = World()
    again = _run(rows, tmp_path, world)
    assert (again.lines, again.recorder.num_failed) == (first.lines, 1)
    assert world.num_started == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_rows=st.integers(1, 120), death_chance=st.sampled_from([0.0, 0.05]))
def test_whatever_happens_each_row_has_one_result_in_the_end(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_rows: int, death_chance: float
) -> None:
    """Stops at random moments, engines that die, rows that kill, fail, repeat an id, or cannot be read."""
    rng = random.Random(seed)
    rows: list[Row | BadRow] = []
    for i in range(num_rows):
        last = rng.choice([i, i, i, i, i, i, i, ABORTED, ABORTED_ONCE] + [POISON] * (rng.random() < 0.2))
        name = f"r{rng.randrange(i + 1)}" if rng.random() < 0.1 else f"r{i}"
        rows.append(_bad(i) if rng.random() < 0.1 else _row(i, [i % 7, last], name=name, n=rng.choice([1, 1, 2])))
    folder = tmp_path_factory.mktemp("job")
    world = World(death_chance=death_chance, random=random.Random(seed))
    order: list[Any] = []
    num_prompt_tokens = num_output_tokens = 0
    is_counted = True
    for _ in range(30):
        stop_at = world.num_answered + rng.randrange(60)
        signals = iter([True])

        def on_receive(num: int, stop_at: int = stop_at, signals: Iterator[bool] = signals) -> None:
            if num >= stop_at and next(signals, False):
                os.kill(os.getpid(), signal.SIGTERM)

        world.on_receive = on_receive
        try:
            ran = _run(rows, folder, world, num_retries=rng.randrange(2))
        except EngineDiedError:
            is_counted = False  # what it had counted is not told
            continue
        assert ran.order[: len(order)] == order, "a recorded result was touched"
        order = ran.order
        report = ran.runner.stats.report(ran.runner.info, num_requests=num_rows, num_failed=0, elapsed_s=1.0)
        assert 0.0 <= report.reuse <= report.optimal_reuse < 1.0
        num_prompt_tokens += report.num_prompt_tokens
        num_output_tokens += report.num_output_tokens
        if ran.is_complete:
            break
    assert ran.is_complete
    assert len(ran.order) == len(ran.lines) == num_rows
    if is_counted:  # rows, not attempts
        sampled = [
            row.request
            for row, line in zip(rows, ran.lines, strict=True)
            if isinstance(row, Row) and ("error" not in line or line["error"]["code"] == "aborted")
        ]
        num_samples = sum(request.sampling.n for request in sampled)
        assert (num_prompt_tokens, num_output_tokens) == (4 * num_samples, num_samples)


# Rows that are run once for many


def test_doubles_are_run_once_and_answered_all(tmp_path: Path) -> None:
    rows = [_row(i, [i % 5], temperature=0.0) for i in range(40)] + [_row(40, [3], temperature=1.0)]
    world = World()
    ran = _run(rows, tmp_path, world, shares_answers=True)
    assert [line["text"] for line in ran.lines] == [f"after {i % 5}" for i in range(40)] + ["after 3"]
    assert [world.submitted[i] for i in range(5)] == [1, 1, 1, 2, 1]


def test_doubles_of_a_row_that_fails_fail_by_their_own_names(tmp_path: Path) -> None:
    ran = _run([_row(i, [ABORTED], temperature=0.0) for i in range(3)], tmp_path, shares_answers=True)
    assert [(line["id"], line["error"]["line"]) for line in ran.lines] == [("r0", 1), ("r1", 2), ("r2", 3)]


def test_doubles_of_a_row_that_fails_fail_in_their_own_formats_with_their_own_columns(tmp_path: Path) -> None:
    rows = [
        msgspec.structs.replace(_row(i, [ABORTED], kind=kind, temperature=0.0), carried={"n": i})
        for i, kind in enumerate(("plain", "completions", "plain"))
    ]
    first, second, third = _run(rows, tmp_path, shares_answers=True).lines
    assert [line["carried"] for line in (first, second, third)] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert (second["custom_id"], second["response"]["body"]["error"]["code"]) == ("r1", "aborted")


# Jobs larger than memory


def test_a_job_whose_tokens_do_not_fit_is_run_in_shards(tmp_path: Path) -> None:
    """Every row once; what it costs in reuse is said."""
    rows = [_row(i, [i % 3, i % 3, i % 3, i]) for i in range(300)]
    world = World()
    ran = _run(rows, tmp_path, world, max_token_bytes=300 * 4)
    assert [line["text"] for line in ran.lines] == [f"after {i}" for i in range(300)]
    assert len(world.closed) >= 4
    assert set(world.submitted.values()) == {1}
    whole = _run(rows, tmp_path / "whole")
    assert ran.runner.stats.num_optimal_prompt_tokens - ran.runner.num_lost_tokens == (
        whole.runner.stats.num_optimal_prompt_tokens
    )
