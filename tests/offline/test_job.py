"""A job on a runtime that answers in any order: every sample comes back to its request, or says why not."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from batchllm.errors import ConfigError, EngineDiedError, RowError
from batchllm.offline.fake_runtime import FakeJob, FakeRequest, FakeRuntime
from batchllm.offline.job import Job
from batchllm.offline.job_rows import UNLIMITED, JobRows
from batchllm.offline.jobs import Jobs
from batchllm.offline.runtime import Chat, RunRequests, RuntimeInfo
from batchllm.offline.stats import make_trace
from batchllm.offline.token_store import TokenStore
from batchllm.planner.planner import PlannedRun
from batchllm.request import ChatOptions, ChatPrompt, Completion, Request, SamplingParams
from batchllm.scheduler.counters import JobCounters
from batchllm.tokenizer import Tokenizer
from tests.sizes import sized

T = TypeVar("T")

INFO = RuntimeInfo(
    model_name="tiny",
    context_len=64,
    vocab_size=128,
    kv_capacity_tokens=48,
    kv_limit_tokens=48,
    num_unstored_tokens=1,
    page_size=1,
    random_seed=7,
    has_seeded_sampling=True,
    has_grammar=True,
)


class AsciiTokenizer(Tokenizer):
    """One token per character; chats go through a template of their own."""

    template = Environment(autoescape=False).from_string(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
        "{% if messages[0].role == 'tool' %}{{ 1 / 'refused' }}{% endif %}"
    )

    def __init__(self) -> None:
        super().__init__(None)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        start = [1] if add_special_tokens else []
        return [array("i", start + [ord(c) for c in text] if text != "~" else []) for text in texts]

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        prompts: list[ChatPrompt | RowError] = []
        for messages, _ in chats:
            try:
                (ids,) = self.encode([self.template.render(messages=messages)], add_special_tokens=False)
                prompts.append(ChatPrompt(ids=ids, settings=(("stop", ("|",)),)))
            except TypeError as error:
                prompts.append(RowError(str(error), code="chat_template"))
        return prompts

    def decode_token(self, token_id: int) -> str:
        return chr(token_id)


ASCII = AsciiTokenizer()


class ShufflingRuntime(FakeRuntime):
    """Answers what was submitted in random order and random batches; its text names prompt and seed."""

    def __init__(
        self,
        info: RuntimeInfo = INFO,
        order_seed: int = 0,
        tokenizer: Tokenizer | None = ASCII,
        abort_share: float = 0.0,
        dies_after: int | None = None,
    ) -> None:
        super().__init__(info, tokenizer)
        self.random = random.Random(order_seed)
        self.abort_share = abort_share
        self.dies_after = dies_after
        self.runs: list[PlannedRun] = []
        self.sent: list[FakeRequest] = []
        self.num_withdrawn = 0

    def submit(self, job_id: int, requests: RunRequests) -> None:
        super().submit(job_id, requests)
        self.runs.append(requests.run)
        self.sent += list(self.jobs[job_id].outstanding.values())[-len(requests.run) :]

    def withdraw(self, job_id: int) -> None:
        super().withdraw(job_id)
        self.num_withdrawn += len(self.jobs[job_id].withdrawn)

    async def before_answers(self, job: FakeJob) -> None:
        if self.dies_after is not None and self.num_answered >= self.dies_after:
            raise EngineDiedError("the scheduler is gone")

    def choose(self, job: FakeJob) -> list[FakeRequest]:
        outstanding = super().choose(job)
        self.random.shuffle(outstanding)
        return outstanding[: self.random.randint(1, len(outstanding))]

    def counters(self, job: FakeJob) -> JobCounters:
        return JobCounters(num_computed_prompt_tokens=10 * job.num_answered, num_retractions=3, peak_kv_tokens=40)

    def answer(self, request: FakeRequest) -> Completion:
        is_aborted = self.random.random() < self.abort_share
        return Completion(
            index=0,
            text=f"{bytes(request.prompt)!r} {request.seed}",
            output_ids=[1, 2, 3],
            finish_reason="abort" if is_aborted else "stop",
            prompt_tokens=len(request.prompt),
            cached_tokens=0,
            error="out of luck" if is_aborted else None,
        )


def _request(index: int, ids: Sequence[int] | None = (1, 2, 3), **fields: Any) -> Request:
    """Request fields, or those of its sampling parameters."""
    own = {n: fields.pop(n) for n in tuple(fields) if n not in SamplingParams.__dataclass_fields__}
    sampling = SamplingParams(**({"max_new_tokens": 8} | fields))
    return Request(row_id=str(index), index=index, input_ids=ids, sampling=sampling, **own)


class Loaded(Job):
    """A job of these requests, and those of them that cannot run."""

    def __init__(self, runtime: ShufflingRuntime, requests: Sequence[Request], **options: Any) -> None:
        self.rows = JobRows(runtime.info, runtime.tokenizer, TokenStore(None, 1 << 30))
        self.rejected: list[tuple[Request, RowError]] = []
        self.rejected += [(r, e) for r, e in zip(requests, self.rows.add(requests), strict=True) if e is not None]
        of_plan = {name: options.pop(name) for name in ("group_order", "max_run_requests") if name in options}
        super().__init__(Jobs(runtime, is_for_one=True, **of_plan), self.rows, **options)

    def completions(self, runtime: ShufflingRuntime) -> list[Completion]:
        """Run it; each with its index and sample."""
        return [
            msgspec.structs.replace(completion, index=int(self.rows.places(np.array(row))), sample=sample)
            for finished in runtime.iterate(self.run())
            for row, sample, completion in zip(finished.rows, finished.samples, finished.completions, strict=True)
        ]


def _run(runtime: ShufflingRuntime, requests: Sequence[Request]) -> tuple[Loaded, list[Completion]]:
    job = Loaded(runtime, requests)
    return job, job.completions(runtime)


def _code_of(request: Request, runtime: ShufflingRuntime | None = None) -> str | None:
    """Why it is rejected, if it is; what is rejected must never reach the runtime."""
    runtime = runtime or ShufflingRuntime()
    job, completions = _run(runtime, [request])
    if not job.rejected:
        assert len(completions) == request.sampling.n
        return None
    assert not completions
    assert not runtime.sent
    ((rejected, error),) = job.rejected
    assert rejected is request
    return error.code


_PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=40)


@given(_PROMPTS, st.data())
@settings(deadline=None, max_examples=sized(30, 60), database=None)
def test_every_sample_comes_back_once_to_the_request_that_asked(prompts: list[list[int]], data: st.DataObject) -> None:
    runtime = ShufflingRuntime(order_seed=data.draw(st.integers(0, 2**16)))
    requests = [_request(3 * i, ids, n=data.draw(st.integers(1, 3))) for i, ids in enumerate(prompts)]
    job, completions = _run(runtime, requests)
    wanted = [(r.index, sample) for r in requests for sample in range(r.sampling.n)]
    assert sorted((c.index, c.sample) for c in completions) == wanted
    for completion in completions:
        assert completion.text.startswith(repr(bytes(prompts[completion.index // 3])))
    assert job.rejected == []
    assert runtime.closed == [True]


def test_a_job_without_requests_ends_at_once() -> None:
    runtime = ShufflingRuntime()
    _, completions = _run(runtime, [])
    assert completions == []
    assert runtime.closed == []


def test_text_gets_special_tokens_and_a_chat_those_of_its_template_only() -> None:
    runtime = ShufflingRuntime()
    chat = [{"role": "user", "content": "hi"}]
    _run(runtime, [_request(0, None, prompt="ab"), _request(1, None, messages=chat)])
    assert sorted(bytes(sent.prompt) for sent in runtime.sent) == [b"\x01ab", b"u:hi|"]


def test_what_a_chat_s_template_and_the_model_need_is_sampled_with_unless_the_row_says_otherwise() -> None:
    """The template here needs a stop string; the model recommends a temperature."""
    runtime = ShufflingRuntime(info=replace(INFO, chat_sampling={"temperature": 0.5, "top_k": 3}))
    chat = [{"role": "user", "content": "hi"}]
    unset = ChatOptions(unset=("temperature",))
    own: dict[str, Any] = {"max_new_tokens": 4, "stop": ("x",), "temperature": 0.25}
    _run(
        runtime,
        [
            _request(0, None, messages=chat, chat=unset, **own),
            _request(1, None, messages=chat, **own),
            _request(2, None, prompt="hi", **own),
        ],
    )
    sent = sorted(((s.sampling.temperature, s.sampling.stop, s.sampling.top_k) for s in runtime.sent), reverse=True)
    assert sent == [(0.5, ("|", "x"), -1), (0.25, ("|", "x"), -1), (0.25, ("x",), -1)]


def test_each_prompt_of_a_row_of_several_has_its_samples_and_its_seeds() -> None:
    """They are numbered one prompt after the other; a seed that the row names is every prompt's."""
    runtime = ShufflingRuntime()
    sampling: dict[str, Any] = {"max_new_tokens": 4, "n": 2, "seed": 9}
    _, done = _run(runtime, [_request(0, None, prompts=("ab", "cde"), **sampling), _request(1, None, prompt="f")])
    prompts = sorted((bytes(sent.prompt), sent.seed) for sent in runtime.sent)
    assert [prompt for prompt, _ in prompts] == [b"\x01ab", b"\x01ab", b"\x01cde", b"\x01cde", b"\x01f"]
    seeds = [{seed for prompt, seed in prompts if prompt == wanted} for wanted in (b"\x01ab", b"\x01cde")]
    assert seeds[0] == seeds[1] and 9 in seeds[0] and len(seeds[0]) == 2
    assert {(c.index, c.sample): c.prompt_tokens for c in done} == {
        (0, 0): 3,
        (0, 1): 3,
        (0, 2): 4,
        (0, 3): 4,
        (1, 0): 2,
    }


def test_requests_of_other_namespaces_share_nothing() -> None:
    runtime = ShufflingRuntime()
    job, _ = _run(runtime, [_request(0), _request(1, namespace="b"), _request(2, namespace="b")])
    assert sorted(sent.namespace for sent in runtime.sent) == ["", "b", "b"]
    assert job.stats.num_optimal_prompt_tokens == 3 + 3 + 1


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(_request(0, [1] * 64), "prompt_too_long", id="prompt alone"),
        pytest.param(_request(0, [1] * 60), "prompt_too_long", id="prompt and output"),
        pytest.param(_request(0, [1] * 41), "never_fits_kv_pool", id="pool"),
        pytest.param(_request(0, [1] * 40), None, id="just fits the pool"),
        pytest.param(_request(0, [1, 128]), "token_id_out_of_range", id="not in the vocabulary"),
        pytest.param(_request(0, [1, -1]), "token_id_out_of_range", id="negative"),
        pytest.param(_request(0, [1, 127]), None, id="last of the vocabulary"),
        pytest.param(_request(0, []), "empty_prompt", id="no token ids"),
        pytest.param(_request(0, None, prompt="~"), "empty_prompt", id="text without tokens"),
        pytest.param(_request(0, None, messages=[{"role": "tool", "content": "x"}]), "chat_template", id="template"),
    ],
)
def test_a_request_that_can_never_run_is_rejected_by_name(request_: Request, code: str | None) -> None:
    assert _code_of(request_) == code


@pytest.mark.parametrize(
    ("expected", "code"),
    [(0, "expected_new_tokens_out_of_range"), (62, "expected_new_tokens_out_of_range"), (61, None)],
)
def test_a_hint_that_no_answer_can_come_true_to_is_rejected(expected: int, code: str | None) -> None:
    """A prompt of 3 tokens leaves 61 of the context."""
    assert _code_of(msgspec.structs.replace(_request(0, [1, 2, 3]), expected_new_tokens=expected)) == code


def test_a_row_above_the_kv_limit_fails_alone_and_says_how_much_it_needs() -> None:
    """The pool could hold it."""
    runtime = ShufflingRuntime(info=replace(INFO, kv_limit_tokens=20))
    job, completions = _run(runtime, [_request(0, [1] * 12), _request(1, [1] * 13)])
    ((rejected, error),) = job.rejected
    assert (rejected.index, error.code, [c.index for c in completions]) == (1, "never_fits_kv_limit", [0])
    assert "up to 21 tokens" in error.message and "raise it to at least 21" in error.message


def test_what_is_known_of_output_lengths_travels_with_the_run() -> None:
    """A length nothing can change, a hint, a task; the rest is unknown."""
    requests = [
        _request(0, [1], ignore_eos=True),
        _request(1, [2], ignore_eos=True, stop=("x",)),
        msgspec.structs.replace(_request(2, [3]), expected_new_tokens=4, task="summary"),
        msgspec.structs.replace(_request(3, [4]), task="summary"),
        msgspec.structs.replace(_request(4, [5]), task="judge"),
    ]
    assert requests[0].sampling.max_new_tokens == 8
    runtime = ShufflingRuntime()
    Loaded(runtime, requests, group_order="input").completions(runtime)
    known = [n for run in runtime.runs for n in run.request_known_len.tolist()]
    tasks = [n for run in runtime.runs for n in run.request_task.tolist()]
    assert (known, tasks) == ([8, 0, 4, 0, 0], [-1, -1, 0, 0, 1])


def test_each_message_carries_at_most_as_many_requests_as_it_may() -> None:
    runtime = ShufflingRuntime()
    Loaded(runtime, [_request(i, [i + 1]) for i in range(5)], max_run_requests=1).completions(runtime)
    assert [len(run) for run in runtime.runs] == [1] * 5


def test_a_trace_begins_with_the_job() -> None:
    runtime = ShufflingRuntime()
    job = Loaded(runtime, [_request(0)], keep_steps=True)
    job.completions(runtime)
    trace = make_trace("x", job.steps or [], runtime.info, started_at=5.0)
    assert (trace.kv_capacity_tokens, trace.kv_limit_tokens) == (48, 48)
    assert trace.steps["start_s"].tolist() == [0.0]  # its runtime's clock stood at 0


def test_a_seed_is_refused_where_sampling_takes_none() -> None:
    runtime = ShufflingRuntime(info=replace(INFO, has_seeded_sampling=False))
    assert _code_of(_request(0, seed=1), runtime) == "seed_not_supported"
    assert _code_of(_request(0), runtime) is None


@pytest.mark.parametrize("name", ["json_schema", "regex"])
def test_structured_output_is_refused_where_it_is_switched_off(name: str) -> None:
    runtime = ShufflingRuntime(info=replace(INFO, has_grammar=False))
    fields: dict[str, Any] = {name: "{}"}
    request = _request(0, **fields)
    assert _code_of(request, runtime) == "grammar_not_supported"
    assert _code_of(request) is None


def test_rejected_requests_do_not_stop_the_others() -> None:
    requests = [_request(0, []), _request(1), _request(2, [999]), _request(3, [5])]
    job, completions = _run(ShufflingRuntime(), requests)
    assert sorted(c.index for c in completions) == [1, 3]
    assert [(r.index, error.code) for r, error in job.rejected] == [
        (0, "empty_prompt"),
        (2, "token_id_out_of_range"),
    ]


def test_text_without_a_tokenizer_is_the_job_s_mistake_not_the_row_s() -> None:
    with pytest.raises(ConfigError, match="--skip-tokenizer-init"):
        Loaded(ShufflingRuntime(tokenizer=None), [_request(0, None, prompt="ab")])


def test_a_default_output_limit_is_lowered_to_what_the_prompt_leaves() -> None:
    runtime = ShufflingRuntime()
    long = _request(0, [1] * 40, max_new_tokens=30, may_lower_max_new_tokens=True)
    short = _request(1, [2] * 10, max_new_tokens=30, may_lower_max_new_tokens=True)
    _run(runtime, [long, short])
    assert sorted((len(sent.prompt), sent.max_new_len) for sent in runtime.sent) == [(10, 30), (40, 8)]


def test_an_output_limit_that_was_asked_for_is_not_lowered() -> None:
    assert _code_of(_request(0, [1] * 40, max_new_tokens=30)) == "prompt_too_long"


def test_requests_with_like_parameters_share_them() -> None:
    requests = [_request(i, [i + 1], seed=i, n=1 + i % 2, temperature=0.5 * (i % 2)) for i in range(6)]
    assert len(Loaded(ShufflingRuntime(), requests).rows.kinds) == 2


def test_each_sample_is_sampled_as_its_request_says() -> None:
    runtime = ShufflingRuntime()
    _run(runtime, [_request(i, [i + 1], temperature=i / 4, max_new_tokens=i + 1) for i in range(8)])
    for sent in runtime.sent:
        index = sent.prompt[0] - 1
        assert (sent.sampling.temperature, sent.max_new_len) == (index / 4, index + 1)


def _seeds(requests: Sequence[Request], order_seed: int = 0, info: RuntimeInfo = INFO) -> dict[Any, str]:
    _, completions = _run(ShufflingRuntime(order_seed=order_seed, info=info), requests)
    return {(c.index, c.sample): c.text.rsplit(" ", 1)[1] for c in completions}


def test_samples_get_seeds_of_their_own() -> None:
    assert len(set(_seeds([_request(0, n=6), _request(1, n=6), _request(2, n=3, seed=4)]).values())) == 15


def test_the_first_sample_uses_the_seed_given() -> None:
    assert _seeds([_request(0, n=3, seed=41)])[0, 0] == "41"


def test_seeds_are_the_same_in_every_run_and_whatever_runs_beside() -> None:
    requests = [_request(i, [1, 2, i], n=2, seed=None if i % 2 else i) for i in range(8)]
    seeds = _seeds(requests)
    assert _seeds(requests, order_seed=9) == seeds
    assert _seeds(requests[3:4]) == {key: seeds[key] for key in [(3, 0), (3, 1)]}


def test_seeds_that_a_row_leaves_open_depend_on_the_job_s() -> None:
    other = replace(INFO, random_seed=8)
    free, given_seed = _request(0), _request(1, n=2, seed=5)
    before, after = _seeds([free, given_seed]), _seeds([free, given_seed], info=other)
    assert before[0, 0] != after[0, 0]
    assert (before[1, 0], before[1, 1]) == (after[1, 0], after[1, 1])


def test_seeds_fit_a_signed_64_bit_integer() -> None:
    assert all(0 <= int(seed) <= np.iinfo(np.int64).max for seed in _seeds([_request(0, n=40)]).values())


def test_an_aborted_request_comes_back_with_its_reason() -> None:
    _, completions = _run(ShufflingRuntime(abort_share=1.0), [_request(0), _request(1)])
    assert [(c.finish_reason, c.error) for c in completions] == [("abort", "out of luck")] * 2


def test_dropping_the_iterator_closes_the_job_as_not_complete() -> None:
    runtime = ShufflingRuntime()
    job = Loaded(runtime, [_request(i, [1] * 30 + [i]) for i in range(60)])
    stream = runtime.iterate(job.run())
    next(stream)
    stream.close()
    assert runtime.closed == [False]


def test_an_engine_that_dies_closes_the_job_as_not_complete_and_says_so() -> None:
    runtime = ShufflingRuntime(dies_after=1)
    with pytest.raises(EngineDiedError, match="the scheduler is gone"):
        _run(runtime, [_request(i, [i, i]) for i in range(100)])
    assert runtime.closed == [False]


def test_the_job_counts_what_came_back() -> None:
    runtime = ShufflingRuntime()
    job, _ = _run(runtime, [_request(0), _request(1), _request(2, [9])])
    report = job.stats.report(INFO, num_requests=4, num_failed=1, elapsed_s=2.0)
    assert (report.num_requests, report.num_succeeded, report.num_failed) == (4, 3, 1)
    assert (report.num_prompt_tokens, report.num_optimal_prompt_tokens) == (7, 5)
    assert (report.num_computed_prompt_tokens, report.num_output_tokens) == (30, 9)
    assert (report.num_retractions, report.peak_kv_tokens, report.kv_capacity_tokens) == (3, 40, 48)


def test_a_job_longer_than_one_slice_of_the_tokenizer_is_in_order() -> None:
    _, completions = _run(ShufflingRuntime(), [_request(i, None, prompt=f"{i:05}") for i in range(1500)])
    assert all(f"{c.index:05}" in c.text for c in completions)
    assert len(completions) == 1500


def test_rejections_carry_a_sentence_and_the_field_at_fault() -> None:
    job, _ = _run(ShufflingRuntime(), [_request(0, [1, 999])])
    error = job.rejected[0][1]
    assert isinstance(error, RowError)
    assert error.param == "input_ids"
    assert "input_ids[1] is 999" in error.message


def test_a_job_that_stops_answers_what_runs_and_no_more() -> None:
    """Nothing is submitted after the stop, and what was withdrawn is neither answered nor failed."""
    runtime = ShufflingRuntime()
    job = Loaded(runtime, [_request(i, [i, 1]) for i in range(100)], max_in_flight=10)
    answered: list[int] = []
    for finished in runtime.iterate(job.run()):
        answered += finished.rows
        if not job.is_stopping:
            num_submitted = len(runtime.sent)
            job.stop_admitting()
    assert len(runtime.sent) == num_submitted < 100
    assert len(answered) == num_submitted - runtime.num_withdrawn
    assert runtime.num_withdrawn
    assert len(set(answered)) == len(answered)
    assert runtime.closed == [False]


def test_a_job_that_gives_up_ends_with_requests_in_flight() -> None:
    runtime = ShufflingRuntime()
    job = Loaded(runtime, [_request(i, [i, 1]) for i in range(100)], max_in_flight=50)
    answered = set()
    for finished in runtime.iterate(job.run()):
        answered.update(finished.rows)
        job.give_up()
    in_flight = job.rows_in_flight().tolist()
    assert len(in_flight) == len(runtime.sent) - runtime.num_answered > 0
    assert not answered & set(in_flight)
    assert runtime.closed == [False]


@given(st.integers(1, 20), st.integers(0, 2**16))
@settings(deadline=None, max_examples=30, database=None)
def test_never_more_in_flight_than_allowed(limit: int, order_seed: int) -> None:
    class Watching(ShufflingRuntime):
        def submit(self, job_id: int, requests: RunRequests) -> None:
            super().submit(job_id, requests)
            assert len(self.jobs[job_id].outstanding) <= limit

    runtime = Watching(order_seed=order_seed)
    job = Loaded(runtime, [_request(i, [i % 5, i % 3, i]) for i in range(60)], max_in_flight=limit)
    assert len(job.completions(runtime)) == 60


def test_a_subset_runs_only_its_rows_with_the_seeds_of_the_whole() -> None:
    requests = [_request(i, [1, 2, i], n=1 + i % 3) for i in range(12)]
    whole = _seeds(requests)
    runtime = ShufflingRuntime()
    job = Loaded(runtime, requests, subset=np.array([3, 5, 10]))
    found = {(c.index, c.sample): c.text.rsplit(" ", 1)[1] for c in job.completions(runtime)}
    assert found == {key: seed for key, seed in whole.items() if key[0] in (3, 5, 10)}


def test_stop_strings_fail_their_row_on_an_engine_without_a_tokenizer() -> None:
    """The scheduler could not look for them."""
    rows = JobRows(replace(UNLIMITED, has_tokenizer=False), None, TokenStore(None, 1 << 20))
    sampling = (SamplingParams(stop=("a",)), SamplingParams(min_new_tokens=1), SamplingParams(stop_token_ids=(5,)))
    requests = [Request(row_id=str(i), index=i, sampling=s, input_ids=[1, 2]) for i, s in enumerate(sampling)]
    assert [error and error.param for error in rows.add(requests)] == ["stop", "min_new_tokens", None]


def test_stop_token_beyond_the_vocabulary_fails_its_row() -> None:
    rows = JobRows(replace(UNLIMITED, vocab_size=100), None, TokenStore(None, 1 << 20))
    requests = [
        Request(row_id=str(i), index=i, sampling=SamplingParams(stop_token_ids=(i,)), input_ids=[1]) for i in (99, 100)
    ]
    assert [error and error.code for error in rows.add(requests)] == [None, "token_id_out_of_range"]
