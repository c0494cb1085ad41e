"""Jobs that come, go, stop and are given up while others run: each gets its own answers, once, in its turn."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import Row
from batchllm.errors import EngineDiedError
from batchllm.offline import job as job_module
from batchllm.offline import jobs as jobs_module
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.job import TICK_S, Job
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import Jobs, single_job
from batchllm.offline.joint_plan import JointPlan, Part
from batchllm.offline.journal import Journal
from batchllm.offline.outputs import Outputs
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.running_plan import divide
from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo
from batchllm.offline.stop import StopSignal
from batchllm.offline.token_store import TokenStore
from batchllm.planner import GroupOrder, plan_batch
from batchllm.request import Completion, Request, SamplingParams
from batchllm.scheduler.counters import JobCounters
from batchllm.scheduler.output_length import PredictionError
from batchllm.tokens import TokenTable
from batchllm.trace import STEP_DTYPE
from tests.sizes import sized

T = TypeVar("T")

INFO = RuntimeInfo(
    model_name="tiny",
    context_len=256,
    vocab_size=1 << 20,
    kv_capacity_tokens=256,
    kv_limit_tokens=256,
    num_unstored_tokens=1,
    page_size=1,
    random_seed=7,
    has_seeded_sampling=True,
    has_grammar=True,
)
_PROBE = (0,)
"""Prompt by which the jobs learn that what they withdrew is back."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it reached the engine."""

    job_id: int
    position: int
    prompt: tuple[int, ...]
    prefix: tuple[int, int]
    seed: int
    sampling: SamplingParams
    max_new_len: int
    namespace: str

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.seed} {self.namespace} {self.sampling.temperature} {self.max_new_len}"


@dataclass
class SteppingEngine:
    """An engine that runs several jobs: messages in order, requests in plan order, a few at once, ends at random.

    Attributes:
        num_slots: Requests that run at once.
        order_seed: Of the random ends.
        delays_aborts: What was withdrawn comes back later than what was withdrawn behind it.
        dies_after: Answers after which it dies.
        started: Requests in the order in which they have started.
        submitted_tokens: Tokens of runs that reached it, shared prefixes counted once.
        computed: Prompt tokens of each job that it has computed.
    """

    num_slots: int = 4
    order_seed: int = 0
    delays_aborts: bool = False
    dies_after: int | None = None
    info: RuntimeInfo = INFO
    tokenizer: None = None
    started: list[Sent] = field(default_factory=list)
    submitted: list[Sent] = field(default_factory=list)
    submitted_tokens: int = 0
    computed: Counter[int] = field(default_factory=Counter)
    num_answered: int = 0
    num_jobs: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.order_seed)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.inbox: deque[Callable[[], None]] = deque()
        self.queues: dict[int, asyncio.Queue[FinishedRequests | EngineDiedError]] = {}
        self.waiting: list[Sent] = []
        self.running: list[Sent] = []
        self.late: list[Sent] = []
        self.prefix_tokens: dict[tuple[int, int], tuple[int, ...]] = {}
        self.prefix_parent: dict[tuple[int, int], tuple[int, int]] = {}
        self.is_computed: set[tuple[int, int]] = set()

    # The seam

    def open_job(self) -> int:
        job_id, self.num_jobs = self.num_jobs, self.num_jobs + 1
        self.queues[job_id] = asyncio.Queue()
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        assert job_id in self.queues
        self.inbox.append(lambda: self._take(job_id, requests))

    async def receive(self, job_id: int) -> FinishedRequests:
        output = await self.queues[job_id].get()
        if isinstance(output, EngineDiedError):
            raise output
        return output

    def withdraw(self, job_id: int) -> None:
        assert job_id in self.queues
        self.inbox.append(lambda: self._abort_waiting(job_id))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        del self.queues[job_id]
        if is_complete:
            assert not any(sent.job_id == job_id for sent in self.waiting + self.running), "closed with work left"
        self.inbox.append(lambda: self._drop(job_id))

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        assert self.loop is not None
        try:
            while True:
                try:
                    yield self._on_loop(anext(stream))
                except StopAsyncIteration:
                    return
        finally:
            self._on_loop(stream.aclose())

    def _on_loop(self, coroutine: Any) -> Any:
        async def awaited() -> Any:
            return await coroutine

        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result()

    def shutdown(self) -> None:
        """It serves others too."""

    # What it does

    async def serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)
            if self.random.random() < 0.8:
                self.step()

    def step(self) -> None:
        while self.inbox:
            self.inbox.popleft()()
        while self.waiting and len(self.running) < self.num_slots:
            self._start(self.waiting.pop(0))
        ended = [sent for sent in self.running if self.random.random() < 0.5]
        self.running = [sent for sent in self.running if sent not in ended]
        self.random.shuffle(ended)
        for job_id in dict.fromkeys(sent.job_id for sent in ended):
            self._answer(job_id, [sent for sent in ended if sent.job_id == job_id], "stop")
        if self.late and self.random.random() < 0.2:
            late, self.late = self.late, []
            for sent in late:
                self._answer(sent.job_id, [sent], "abort")
        if self.dies_after is not None and self.num_answered >= self.dies_after:
            for queue in self.queues.values():
                queue.put_nowait(EngineDiedError("the scheduler is gone"))
            self.dies_after = None
            self.inbox.clear()
            self.waiting.clear()
            self.running.clear()

    def _take(self, job_id: int, requests: RunRequests) -> None:
        run = requests.run
        start = 0
        for i, (first, last) in enumerate(zip(run.prefix_start_len, run.prefix_end_len, strict=True)):
            own = tuple(run.prefix_tokens[start : start + last - first].tolist())
            parent = job_id, int(run.prefix_parent[i])
            self.prefix_parent[job_id, run.first_prefix + i] = parent
            self.prefix_tokens[job_id, run.first_prefix + i] = self.prefix_tokens.get(parent, ()) + own
            start += last - first
        self.submitted_tokens += len(run.prefix_tokens) + len(run.private_tokens)
        start = 0
        for i, private_len in enumerate(run.private_len.tolist()):
            prefix = job_id, int(run.request_prefix[i])
            private = tuple(run.private_tokens[start : start + private_len].tolist())
            sent = Sent(
                job_id=job_id,
                position=run.first_position + i,
                prompt=self.prefix_tokens.get(prefix, ()) + private,
                prefix=prefix,
                seed=requests.seeds[i],
                sampling=requests.sampling[requests.sampling_index[i]],
                max_new_len=int(run.request_max_new_len[i]),
                namespace=requests.namespaces[i] if requests.namespaces else "",
            )
            start += private_len
            self.submitted.append(sent)
            self.waiting.append(sent)
        self.waiting.sort(key=lambda sent: (sent.job_id, sent.position))

    def _start(self, sent: Sent) -> None:
        self.started.append(sent)
        num_tokens, prefix = len(sent.prompt), sent.prefix
        while prefix[1] >= 0 and prefix not in self.is_computed:
            self.is_computed.add(prefix)
            prefix = self.prefix_parent[prefix]
        self.computed[sent.job_id] += num_tokens - len(self.prefix_tokens.get(prefix, ()))
        self.running.append(sent)

    def _abort_waiting(self, job_id: int) -> None:
        withdrawn = [sent for sent in self.waiting if sent.job_id == job_id]
        self.waiting = [sent for sent in self.waiting if sent.job_id != job_id]
        if self.delays_aborts and any(sent.prompt != _PROBE for sent in withdrawn):
            self.late += withdrawn
            return
        for sent in withdrawn:
            self._answer(job_id, [sent], "abort")

    def _drop(self, job_id: int) -> None:
        for requests in (self.waiting, self.running, self.late):
            requests[:] = [sent for sent in requests if sent.job_id != job_id]

    def _answer(self, job_id: int, ended: list[Sent], reason: str) -> None:
        self.num_answered += len(ended) if reason == "stop" else 0
        if job_id not in self.queues:
            return
        self.queues[job_id].put_nowait(
            FinishedRequests(
                positions=[sent.position for sent in ended],
                completions=[_completion(sent, reason) for sent in ended],
                counters=JobCounters(
                    num_computed_prompt_tokens=self.computed[job_id],
                    num_retractions=self.computed[job_id] // 10,
                    peak_kv_tokens=40,
                    prediction=PredictionError(num_requests=self.computed[job_id]),
                ),
                steps=np.zeros(1, STEP_DTYPE),
            )
        )


def _completion(sent: Sent, reason: str) -> Completion:
    return Completion(
        index=0,
        text=sent.text,
        output_ids=[1, 2, 3],
        finish_reason=reason,
        prompt_tokens=len(sent.prompt),
        cached_tokens=0,
        error="withdrawn" if reason == "abort" else None,
    )


def _on(engine: SteppingEngine, scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario while the engine steps. In the end it has nothing left to do, and no job is open."""

    async def both() -> T:
        serving = asyncio.create_task(engine.serve())
        try:
            async with asyncio.timeout(60):
                result = await scenario
                while engine.inbox or engine.queues:  # a plan in the making gives up when it finds nobody left
                    await asyncio.sleep(0)
        finally:
            serving.cancel()
        assert (engine.queues, engine.waiting, engine.running, engine.late) == ({}, [], [], [])
        return result

    return asyncio.run(both())


def _rows(requests: Sequence[Request], max_memory_bytes: int = 1 << 30) -> JobRows:
    rows = JobRows(INFO, None, TokenStore(None, max_memory_bytes))
    assert rows.add(requests) == [None] * len(requests)
    return rows


def _questions(job: int, num_rows: int, num_documents: int, **fields: Any) -> list[Request]:
    """Each about one of the documents that all jobs ask of, in turn; its last two tokens name job and row."""
    own = {name: fields.pop(name) for name in tuple(fields) if name not in SamplingParams.__dataclass_fields__}
    sampling = {"max_new_tokens": 4} | fields
    return [
        Request(
            row_id=str(i),
            index=i,
            input_ids=[10 + i % num_documents] * 6 + [100 + job, 1000 + i],
            sampling=SamplingParams(**sampling),
            **own,
        )
        for i in range(num_rows)
    ]


Answers = list[tuple[int, int, str]]
"""Row, sample and text of each."""


async def _collect(job: Job, answers: Answers, act: Callable[[], bool] = lambda: False) -> None:
    """Run it; ``act`` is called at every message, and says whether to drop the job."""
    stream = job.run()
    try:
        async for finished in stream:
            texts = [completion.text for completion in finished.completions]
            answers += zip(finished.rows, finished.samples, texts, strict=True)
            if act():
                break
    finally:
        await stream.aclose()


def _expected(requests: Sequence[Request], rows: JobRows) -> Answers:
    """What each sample's request must have been, whoever else runs."""
    return [
        (
            row,
            sample,
            f"{tuple(request.input_ids or ())} {rows.sample_seed(row, sample) if request.sampling.temperature else 0} "
            f"{request.namespace} {request.sampling.temperature} {request.sampling.max_new_tokens}",
        )
        for row, request in enumerate(requests)
        for sample in range(request.sampling.n)
    ]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Planning kernels are compiled before an event loop waits for them, which takes much longer."""
    joint = Jobs(SteppingEngine())
    for names in (("a", "b"), ("", "")):
        jobs = [Job(joint, _rows(_questions(i, 300, 1, namespace=names[i]))) for i in range(2)]
        for num_jobs in (1, 2):
            JointPlan([job.part() for job in jobs[:num_jobs]], INFO, "balanced").cutter.cut(0, 256)


@dataclass(frozen=True)
class _Plot:
    """What one job does.

    Attributes:
        joins_after_s: When it comes.
        ending: "stop", "give up" and "drop" after so many answers; "run" to the end.
    """

    num_rows: int
    num_documents: int
    num_samples: int
    temperature: float
    namespace: str
    spills: bool
    joins_after_s: float
    ending: str
    num_answers: int


_plots = st.builds(
    _Plot,
    num_rows=st.integers(0, 120),
    num_documents=st.integers(1, 9),
    num_samples=st.sampled_from([1, 1, 3]),
    temperature=st.sampled_from([0.5, 1.0]),
    namespace=st.sampled_from(["", "", "a", "b"]),
    spills=st.booleans(),
    joins_after_s=st.sampled_from([0.0, 0.0, 0.002, 0.01, 0.03, 0.06]),
    ending=st.sampled_from(["run", "run", "run", "stop", "give up", "drop"]),
    num_answers=st.integers(0, 60),
)


@given(st.lists(_plots, min_size=1, max_size=5), st.integers(0, 2**16), st.integers(1, 12), st.booleans())
@settings(deadline=None, max_examples=sized(30, 60), database=None)
def test_whoever_comes_and_goes_each_job_gets_its_own_answers_once(
    plots: list[_Plot], order_seed: int, num_slots: int, delays_aborts: bool
) -> None:
    """All of them, or after a stop those that had started. Nothing starts twice, and shares add up."""
    engine = SteppingEngine(order_seed=order_seed, num_slots=num_slots, delays_aborts=delays_aborts)
    joint = Jobs(engine)
    jobs: list[Job] = []
    all_rows: list[JobRows] = []
    expected: list[Answers] = []
    answers: list[Answers] = [[] for _ in plots]

    async def play(number: int, plot: _Plot) -> None:
        await asyncio.sleep(plot.joins_after_s)
        job = jobs[number]

        def act() -> bool:
            if len(answers[number]) >= plot.num_answers and plot.ending != "run":
                if plot.ending == "stop":
                    job.stop_admitting()
                elif plot.ending == "give up":
                    job.give_up()
                return plot.ending == "drop"
            return False

        await _collect(job, answers[number], act)

    async def play_all() -> None:
        await asyncio.gather(*(play(number, plot) for number, plot in enumerate(plots)))

    for number, plot in enumerate(plots):
        requests = _questions(
            number,
            plot.num_rows,
            plot.num_documents,
            n=plot.num_samples,
            temperature=plot.temperature,
            namespace=plot.namespace,
        )
        rows = _rows(requests, 64 if plot.spills else 1 << 30)
        all_rows.append(rows)
        jobs.append(joint.make_job(engine, rows))
        expected.append(_expected(requests, rows))
    _on(engine, play_all())
    for rows in all_rows:
        rows.store.close()
    started = Counter(sent.text for sent in engine.started if sent.prompt != _PROBE)
    assert max(started.values(), default=1) == 1
    for plot, own, wanted, job in zip(plots, answers, expected, jobs, strict=True):
        assert len(set(own)) == len(own)
        assert set(own) <= set(wanted)
        if plot.ending == "run":
            assert sorted(own) == sorted(wanted)
        if plot.ending == "stop":
            assert set(own) == {sample for sample in wanted if sample[2] in started}
        if plot.ending in ("run", "stop"):
            assert job.rows_in_flight().tolist() == []
            assert job.stats.num_prompt_tokens == 8 * len(own)
    _check_shares(joint, jobs)


def _check_shares(joint: Jobs, jobs: Sequence[Job]) -> None:
    for name in (
        "num_prompt_tokens",
        "num_optimal_prompt_tokens",
        "num_computed_prompt_tokens",
        "num_output_tokens",
        "num_retractions",
    ):
        assert sum(getattr(job.stats, name) for job in jobs) == getattr(joint.stats, name), name
    assert sum(job.stats.prediction.num_requests for job in jobs) == joint.stats.prediction.num_requests


async def _run_all(jobs: Sequence[Job]) -> list[Answers]:
    answers: list[Answers] = [[] for _ in jobs]
    await asyncio.gather(*(_collect(job, own) for job, own in zip(jobs, answers, strict=True)))
    return answers


def test_jobs_that_come_together_cost_what_all_their_rows_cost_in_one_plan() -> None:
    """A document that both ask of is submitted, and computed, once."""
    engine = SteppingEngine(num_slots=16)
    joint = Jobs(engine)
    requests = [_questions(0, 90, 9), _questions(1, 90, 9)]
    jobs = [joint.make_job(engine, _rows(own)) for own in requests]
    _on(engine, _run_all(jobs))
    prompts = [list(request.input_ids or ()) for own in requests for request in own]
    optimum = plan_batch(TokenTable.from_lists(prompts)).optimal_prefill_tokens
    assert (joint.num_plans, joint.num_lost_tokens) == (1, 0)
    assert engine.submitted_tokens == optimum
    assert (joint.stats.num_computed_prompt_tokens, joint.stats.num_optimal_prompt_tokens) == (optimum, optimum)
    _check_shares(joint, jobs)
    for job in jobs:  # neither pays for the other's document alone
        assert abs(job.stats.num_computed_prompt_tokens - optimum / 2) < optimum / 4


def test_each_job_knows_the_prefixes_that_save_it_most() -> None:
    """Of the plan with others': its own rows, by their place in its input, as if it were alone."""
    engine = SteppingEngine(num_slots=16)
    joint = Jobs(engine)
    jobs = [joint.make_job(engine, _rows(own)) for own in (_questions(0, 12, 2), _questions(1, 30, 1))]
    assert [len(job.largest_prefixes) for job in jobs] == [0, 0]
    _on(engine, _run_all(jobs))
    found = [
        [(p.saved_tokens, p.num_consumers, p.own_len, p.end_len, p.level, p.example_row) for p in job.largest_prefixes]
        for job in jobs
    ]
    # Both ask of the first document; what each adds to it is its own.
    assert found[0] == [(35, 6, 7, 7, 1, 1), (30, 6, 6, 6, 1, 0), (5, 6, 1, 7, 2, 0)]
    assert found[1] == [(174, 30, 6, 6, 1, 0), (29, 30, 1, 7, 2, 0)]


def test_a_job_alone_is_planned_as_it_would_be_without_the_others() -> None:
    engines = [SteppingEngine(), SteppingEngine()]
    requests = _questions(0, 100, 7)
    _on(engines[0], _run_all([single_job(engines[0], _rows(requests))]))
    _on(engines[1], _run_all([Jobs(engines[1]).make_job(engines[1], _rows(requests))]))
    sent = [[(one.position, one.text) for one in engine.submitted] for engine in engines]
    assert sent[0] == sent[1]


def test_a_small_job_that_joins_a_large_one_is_done_long_before_it() -> None:
    """Two pools' worth of the large one may come first, what is on its way, and as much as the small one is."""
    engine = SteppingEngine(num_slots=16)
    joint = Jobs(engine)
    large, small = (joint.make_job(engine, _rows(_questions(i, n, 40))) for i, n in ((0, 5000), (1, 50)))
    answers: list[Answers] = [[], []]

    async def join_later() -> None:
        while len(answers[0]) < 300:
            await asyncio.sleep(0)
        await _collect(small, answers[1])
        assert len(answers[0]) < 5000

    async def both() -> None:
        await asyncio.gather(_collect(large, answers[0]), join_later())

    _on(engine, both())
    assert [len(own) for own in answers] == [5000, 50]
    assert joint.num_plans == 2
    jobs_started = [sent.prompt[-2] - 100 for sent in engine.started if sent.job_id == engine.started[-1].job_id]
    last_of_small = max(i for i, job in enumerate(jobs_started) if job == 1)
    assert last_of_small + 1 < 50 + 2 * INFO.kv_limit_tokens // 5 + 50
    assert len(jobs_started) > 2000


def test_equal_jobs_finish_together_wherever_their_rows_stand_in_the_order() -> None:
    """Each asks of documents of its own; none gets further ahead than quantum and window allow."""
    engine = SteppingEngine(num_slots=16)
    joint = Jobs(engine)
    jobs = [joint.make_job(engine, _rows(_questions(i, 800, 1, namespace=str(i)))) for i in range(3)]
    answers: list[Answers] = [[] for _ in jobs]
    spreads: list[int] = []

    def act() -> bool:
        counts = [len(own) for own in answers]
        if max(counts) < 800:
            spreads.append(max(counts) - min(counts))
        return False

    async def run_all() -> None:
        await asyncio.gather(*(_collect(job, own, act) for job, own in zip(jobs, answers, strict=True)))

    _on(engine, run_all())
    assert [len(own) for own in answers] == [800] * 3
    assert 0 < max(spreads) < 300


def test_after_a_stop_the_others_go_on_and_what_runs_of_it_is_answered() -> None:
    engine = SteppingEngine()
    joint = Jobs(engine)
    requests = [_questions(0, 300, 5), _questions(1, 300, 5)]
    jobs = [joint.make_job(engine, _rows(own)) for own in requests]
    answers: list[Answers] = [[], []]

    def stop() -> bool:
        if answers[0]:
            jobs[0].stop_admitting()
        return False

    async def both() -> None:
        await asyncio.gather(_collect(jobs[0], answers[0], stop), _collect(jobs[1], answers[1]))

    _on(engine, both())
    assert 0 < len(answers[0]) < 100
    assert len(answers[1]) == 300
    assert joint.num_plans == 2
    assert jobs[0].rows_in_flight().tolist() == []


def test_rows_of_a_job_that_stops_while_they_are_planned_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SteppingEngine()
    joint = Jobs(engine)
    jobs = [joint.make_job(engine, _rows(_questions(i, 50, 5))) for i in range(2)]

    def plan(parts: Sequence[Part], info: RuntimeInfo, group_order: GroupOrder) -> JointPlan:
        if len(parts) == 2:
            jobs[0].stop_admitting()
            while jobs[0] in joint._jobs:  # it looks every `TICK_S`
                time.sleep(TICK_S)
        return JointPlan(parts, info, group_order)

    monkeypatch.setattr(jobs_module, "JointPlan", plan)
    assert [len(own) for own in _on(engine, _run_all(jobs))] == [0, 50]
    assert joint.num_plans >= 2
    assert {sent.prompt[-2] for sent in engine.started} == {101}


def test_a_namespace_is_the_same_one_in_every_job_that_names_it_and_no_other() -> None:
    """Two jobs share in "b", the first name that one of them has met and the second of the other; not with "a"."""
    engine = SteppingEngine()
    joint = Jobs(engine)
    in_b = [_questions(i, 40, 4, namespace="b") for i in range(2)]
    in_a = [
        msgspec.structs.replace(request, index=40 + request.index, input_ids=[90, *(request.input_ids or ())])
        for request in _questions(1, 40, 4, namespace="a")
    ]
    requests = [in_b[0], in_a + in_b[1]]
    jobs = [joint.make_job(engine, _rows(own)) for own in requests]
    answers = _on(engine, _run_all(jobs))
    for own, wanted in zip(answers, requests, strict=True):
        assert sorted(own) == sorted(_expected(wanted, _rows(wanted)))
    assert joint.num_plans == 1
    flat = [request for own in requests for request in own]
    numbers = {"": 0, "a": 1, "b": 2}
    optimum = plan_batch(
        TokenTable.from_lists([list(request.input_ids or ()) for request in flat]),
        namespaces=np.array([numbers[request.namespace] for request in flat]),
    ).optimal_prefill_tokens
    assert joint.num_lost_tokens == 0
    assert joint.stats.num_computed_prompt_tokens == optimum


def test_rows_of_an_adapter_share_across_jobs_and_run_together() -> None:
    """The same prompt behind another adapter, or in another namespace of the same one, has other KV."""
    info = replace(INFO, adapters=("x", "y"))
    engine = SteppingEngine()
    engine.info = info
    joint = Jobs(engine)
    kinds: list[dict[str, Any]] = [{}, {"lora_path": "x"}, {"lora_path": "y"}, {"lora_path": "x", "namespace": "n"}]
    requests = [
        [
            msgspec.structs.replace(request, index=40 * i + request.index)
            for i, kind in enumerate(kinds)
            for request in _questions(job, 40, 4, **kind)
        ]
        for job in range(2)
    ]

    def rows(own: Sequence[Request]) -> JobRows:
        made = JobRows(info, None, TokenStore(None, 1 << 30))
        assert made.add(own) == [None] * len(own)
        return made

    _on(engine, _run_all([joint.make_job(engine, rows(own)) for own in requests]))
    assert joint.num_plans == 1
    flat = [request for own in requests for request in own]
    numbers = {(None, ""): 0, ("x", ""): 1, ("y", ""): 2, ("x", "n"): 3}
    optimum = plan_batch(
        TokenTable.from_lists([list(request.input_ids or ()) for request in flat]),
        namespaces=np.array([numbers[request.sampling.lora_path, request.namespace] for request in flat]),
    ).optimal_prefill_tokens
    assert joint.stats.num_computed_prompt_tokens - joint.num_lost_tokens == optimum


def test_jobs_hear_that_the_engine_died_and_which_rows_were_in_flight() -> None:
    """And can run again on the one that takes its place."""
    engine = SteppingEngine(dies_after=40)
    joint = Jobs(engine)
    requests = [_questions(0, 100, 5), _questions(1, 100, 5)]
    all_rows = [_rows(own) for own in requests]
    jobs = [joint.make_job(engine, rows) for rows in all_rows]
    answers: list[Answers] = [[], []]

    async def both() -> list[BaseException | None]:
        errors = await asyncio.gather(
            *(_collect(job, own) for job, own in zip(jobs, answers, strict=True)), return_exceptions=True
        )
        for number, rows in enumerate(all_rows):
            done = [row for row, _, _ in answers[number]]
            in_flight = jobs[number].rows_in_flight()
            assert len(in_flight)
            assert not set(in_flight.tolist()) & set(done)
            left = np.setdiff1d(np.arange(100), done)
            await _collect(joint.make_job(engine, rows, subset=left), answers[number])
        return errors

    errors = _on(engine, both())
    assert [str(error) for error in errors] == ["the scheduler is gone"] * 2
    assert all(isinstance(error, EngineDiedError) for error in errors)
    for own, wanted, rows in zip(answers, requests, all_rows, strict=True):
        assert sorted(own) == sorted(_expected(wanted, rows))


def test_rows_that_may_run_a_few_at_a_time_run_while_no_others_do() -> None:
    """An engine that dies then says something of them only; jobs that wait for that take turns."""

    class Watching(SteppingEngine):
        def step(self) -> None:
            super().step()
            jobs = [sent.prompt[-2] for sent in self.waiting + self.running]
            suspects = [job for job in jobs if job in (101, 102)]
            assert len(suspects) <= 3
            assert not suspects or len(set(jobs)) == 1

    engine = Watching()
    joint = Jobs(engine)
    requests = [_questions(0, 300, 5), _questions(1, 40, 5), _questions(2, 40, 5)]
    jobs = [joint.make_job(engine, _rows(requests[0]))]
    jobs += [joint.make_job(engine, _rows(own), max_in_flight=3) for own in requests[1:]]
    answers = _on(engine, _run_all(jobs))
    for own, wanted in zip(answers, requests, strict=True):
        assert sorted(own) == sorted(_expected(wanted, _rows(wanted)))


def test_nothing_more_is_submitted_while_results_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that waits for its disk must not fill the memory. One that leaves holds up nobody."""
    monkeypatch.setattr(job_module, "_MAX_UNREAD", 10)
    engine = SteppingEngine()
    joint = Jobs(engine)
    window = 200  # what the feeder has in flight of rows this small; without the bound some 500 are unread
    requests = [_questions(i, 600, 4) for i in range(3)]
    slow, other, leaving = (joint.make_job(engine, _rows(own)) for own in requests)
    most_unread = 0

    async def take_slowly(answers: Answers) -> None:
        nonlocal most_unread
        stream = slow.run()
        async for finished in stream:
            texts = [completion.text for completion in finished.completions]
            answers += zip(finished.rows, finished.samples, texts, strict=True)
            most_unread = max(most_unread, slow._num_unread)
            for _ in range(20):
                await asyncio.sleep(0)

    async def leave_behind() -> None:
        stream = leaving.run()
        await anext(stream)
        for _ in range(500):
            await asyncio.sleep(0)
        await stream.aclose()

    async def scenario() -> tuple[Answers, Answers]:
        ours: Answers = []
        others: Answers = []
        await asyncio.gather(take_slowly(ours), _collect(other, others), leave_behind())
        return ours, others

    ours, others = _on(engine, scenario())
    assert sorted(ours) == sorted(_expected(requests[0], _rows(requests[0])))
    assert sorted(others) == sorted(_expected(requests[1], _rows(requests[1])))
    assert most_unread <= 10 + window


def test_a_mistake_in_planning_is_every_job_s_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them waits for ever."""
    engine = SteppingEngine()
    joint = Jobs(engine)
    monkeypatch.setattr(engine, "open_job", lambda: 1 // 0)

    async def both() -> list[Any]:
        jobs = [joint.make_job(engine, _rows(_questions(i, 10, 5))) for i in range(2)]
        return await asyncio.gather(*(_collect(job, []) for job in jobs), return_exceptions=True)

    assert [type(error) for error in _on(engine, both())] == [ZeroDivisionError] * 2


def test_forward_steps_are_kept_of_all_that_ran_while_a_job_did() -> None:
    engine = SteppingEngine()
    joint = Jobs(engine)
    kept = joint.make_job(engine, _rows(_questions(0, 50, 5)), keep_steps=True)
    other = joint.make_job(engine, _rows(_questions(1, 50, 5)))
    _on(engine, _run_all([kept, other]))
    assert (kept.steps is not None and len(kept.steps) > 0, other.steps) == (True, None)


def test_another_runtime_is_refused() -> None:
    with pytest.raises(ValueError, match="one runtime"):
        Jobs(SteppingEngine()).make_job(SteppingEngine(), _rows([]))


@given(st.integers(0, 10**9), st.lists(st.integers(1, 10**6), min_size=1, max_size=9))
def test_shares_add_up_and_are_as_the_weights_are(total: int, weights: list[int]) -> None:
    shares = divide(total, weights)
    assert sum(shares) == total
    assert all(abs(s - total * w / sum(weights)) <= 1 for s, w in zip(shares, weights, strict=True))


# With runners, each in its thread


@dataclass
class _Server:
    """An engine, its event loop in a thread, and jobs that are planned together on it."""

    engine: SteppingEngine
    folder: Path

    def __post_init__(self) -> None:
        self.joint = Jobs(self.engine)
        self.is_up = threading.Event()
        self.is_over: asyncio.Event | None = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        assert self.is_up.wait(10)

    async def _serve(self) -> None:
        self.is_over = asyncio.Event()
        serving = asyncio.create_task(self.engine.serve())
        await asyncio.sleep(0.01)
        self.is_up.set()
        await self.is_over.wait()
        serving.cancel()

    def close(self) -> None:
        assert self.engine.loop is not None and self.is_over is not None
        self.engine.loop.call_soon_threadsafe(self.is_over.set)
        self.thread.join()

    def run(self, number: int, requests: Sequence[Request], stop: StopSignal) -> list[dict[str, Any]]:
        """One run of job ``number``; its lines, if it is complete now."""
        folder = self.folder / str(number)
        folder.mkdir(exist_ok=True)
        job_folder, out = folder / "job", folder / "out.jsonl"
        begun = Journal.exists(job_folder)
        with (
            Journal.open(job_folder)
            if begun
            else Journal.create(job_folder, fingerprint=Fingerprint({}), command={}) as journal,
            Progress(None, show=False, stream=io.StringIO(), clock=lambda: 0.0) as progress,
        ):
            outputs = Outputs(str(out), errors_path=None, order="input", journal=journal)
            runner = Runner(
                lambda: self.engine,
                journal=journal,
                recorder=Recorder(journal, outputs, progress, None),
                progress=progress,
                stop=stop,
                folder=folder,
                options=RunOptions(),
                make_job=self.joint.make_job,
            )
            outputs.begin()
            rows = [
                Row(request=request, kind="plain", given_id=request.row_id, line=request.index + 1)
                for request in requests
            ]
            is_complete = runner.run(iter(rows))
            runner.close()
            if not is_complete:
                return []
            outputs.finish()
        return [json.loads(line) for line in out.read_text().splitlines()]


def test_runners_in_threads_share_a_plan_and_one_that_is_stopped_goes_on_later(tmp_path: Path) -> None:
    """Every row of every job has its one line in the end, and none has started twice."""
    engine = SteppingEngine(num_slots=8)
    server = _Server(engine, tmp_path)
    jobs = [_questions(number, 400, 20) for number in range(4)]
    stops = [StopSignal(60.0) for _ in jobs]
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            runs = [pool.submit(server.run, i, jobs[i], stops[i]) for i in range(len(jobs))]
            while engine.num_answered < 200:
                stops[1].ask("CANCEL") if engine.num_answered > 100 and not stops[1].is_set else None
            lines = [run.result() for run in runs]
        if not lines[1]:  # else the machine was so busy that it ended before it was stopped
            assert len(engine.started) < 1600
            lines[1] = server.run(1, jobs[1], StopSignal(60.0))
    finally:
        server.close()
    for requests, own in zip(jobs, lines, strict=True):
        assert [line["text"] for line in own] == [text for _, _, text in _expected(requests, _rows(requests))]
    assert len({sent.text for sent in engine.started}) == len(engine.started)
