"""Programs in waves, on an engine below the seam that takes no time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import sglang as sgl
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.lang.backend.base_backend import BaseBackend

from batchllm.errors import ConfigError
from batchllm.lang.backend import BatchBackend
from batchllm.lang.bodies import Answers, Asked
from tests.lang.fake_server import REFUSED, FakeBackend, answer

PATIENT_S = 1000.0


class StockBackend(BaseBackend):
    """The same answers, one at a time: upstream's interpreter runs its programs."""

    def generate(self, s: Any, sampling_params: Any) -> Any:
        return self._answered(lambda answers: answers.generate(s, sampling_params))

    def select(self, s: Any, choices: list[str], temperature: float, choices_method: Any = None) -> Any:
        return self._answered(lambda answers: answers.select(s, choices, temperature, choices_method))

    def _answered(self, attempt: Any) -> Any:
        answers = Answers(self)
        while True:
            try:
                return attempt(answers)
            except Asked as asked:
                answers.add(answer(asked.body))


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    """A program that sleeps is waited for: what is sent depends on the programs alone."""
    backend = FakeBackend(num_turns=4, quiet_s=PATIENT_S)
    yield backend
    backend.close()


@sgl.function
def two_answers(s: Any, number: int) -> Any:
    s += f"Number {number}: "
    s += sgl.gen("first", max_tokens=8) + ", then " + sgl.gen("second", max_tokens=8)


@sgl.function
def thoughtful(s: Any, number: int) -> Any:
    """Reads its variables, forks, asks another program, chooses."""
    s += f"Number {number}: " + sgl.gen("first")
    if s["first"]:
        s += " and "
    forks = s.fork(3)
    for place, fork in enumerate(forks):
        fork += f"{place}:" + sgl.gen("opinion") + sgl.gen("reason")
    forks.join()
    s += two_answers.run(number=number, backend=s.stream_executor.backend)["second"]
    s += sgl.select("verdict", ["yes", "by no means"])
    return s["verdict"]


class Boom(Exception):
    pass


def _what_came(state: Any) -> tuple[Any, ...]:
    variables = state.stream_executor.variables
    return state.text(), dict(variables), state.ret_value, state.error(), state.messages()


# As upstream

OPS = st.deferred(lambda: st.lists(_OP, max_size=5))
_OP = st.one_of(
    st.just(("gen",)),
    st.just(("read",)),
    st.just(("select",)),
    st.just(("sleep",)),
    st.just(("nested",)),
    st.just(("role",)),
    st.just(("raise",)),
    st.tuples(st.just("fork"), st.integers(1, 3), st.sampled_from(["gather_variable", "concate_and_append"]), OPS),
)


def _follow(s: Any, ops: Any, backend: Any, names: Iterator[int]) -> None:
    last = None
    for op in ops:
        name = f"v{next(names)}"
        match op:
            case ("gen",):
                s += "Q:" + sgl.gen(name, max_tokens=4)
                last = name
            case ("read",) if last is not None:
                s += str(len(s[last])) + s[last][1]
            case ("select",):
                s += sgl.select(name, ["a", "bcd"])
                last = name
            case ("sleep",):
                time.sleep(0.001)
            case ("nested",):
                s += two_answers.run(number=len(ops), backend=backend)["second"]
            case ("role",):
                s += sgl.user("Well?")
                s += sgl.assistant(sgl.gen(name))
            case ("raise",):
                raise Boom
            case ("fork", size, mode, inner):
                forks = s.fork(size)
                for fork in forks.states:
                    _follow(fork, inner, backend, names)
                forks.join(mode)


@sgl.function
def follow(s: Any, ops: Any, nested_on: Any) -> Any:
    s += f"{len(ops)} "
    _follow(s, ops, nested_on, iter(range(10**6)))
    return len(ops)


@given(programs=st.lists(OPS, min_size=1, max_size=12), num_turns=st.integers(1, 5), num_threads=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_any_programs_end_and_give_what_upstream_gives(programs: Any, num_turns: int, num_threads: int) -> None:
    """One after the other, what each leaves or raises; a batch raises what its first failed program does."""
    stock = StockBackend()
    expected: list[Any] = []
    has_failed = False
    for ops in programs:
        try:
            expected.append(_what_came(follow.run(ops=ops, nested_on=stock, backend=stock)))
        except Boom:  # not kept: upstream's forks hold a thread until nothing refers to them
            has_failed = True
            break
    ours = FakeBackend(num_turns)
    arguments = [{"ops": ops, "nested_on": ours} for ops in programs]
    found = []
    try:
        for state in follow.run_batch(arguments, backend=ours, num_threads=num_threads, generator_style=True):
            found.append(_what_came(state))
    except Boom:
        assert has_failed
    else:
        assert not has_failed
    finally:
        ours.close()
    assert found == expected


def test_a_backend_of_another_kind_is_served_by_upstream() -> None:
    states = two_answers.run_batch([{"number": number} for number in range(5)], backend=StockBackend())
    assert all(state.stream_executor.use_thread for state in states)
    assert [len(state["second"]) for state in states] == [10] * 5


# Waves


def test_two_thousand_programs_of_two_requests_are_three_waves(backend: FakeBackend) -> None:
    """The second wave goes when half of the first is answered, the third when all else is."""
    states = two_answers.run_batch([{"number": number} for number in range(2000)], backend=backend)
    assert [len(wave) for wave in backend.sent] == [2000, 1000, 1000]
    assert len({state["second"] for state in states}) == 2000
    assert all(state.error() is None for state in states)


def test_two_thousand_programs_that_read_fork_nest_and_choose_all_end(backend: FakeBackend) -> None:
    """Each asks 1 + 6 + 2 + 2 times, and at most seven after another. No fork has a thread."""
    arguments = [{"number": number} for number in range(2000)]
    num_threads = set()
    for number, state in enumerate(thoughtful.run_batch(arguments, backend=backend, generator_style=True)):
        num_threads.add(threading.active_count() > 2060)
        assert state.text().startswith(f"Number {number}: <") and state.ret_value == "by no means"
        assert len(state["opinion"]) == 3
    assert backend.waves.num_sent == 2000 * 11
    assert backend.waves.num_waves <= 2 * 7 + 4
    assert num_threads == {False}


def test_programs_under_way_are_at_most_num_threads(backend: FakeBackend) -> None:
    two_answers.run_batch([{"number": number} for number in range(50)], backend=backend, num_threads=7)
    assert max(len(wave) for wave in backend.sent) == 7
    assert sum(len(wave) for wave in backend.sent) == 100


@pytest.mark.parametrize("num_threads", [0, -1, "many", 1.5])
def test_num_threads_that_is_none_is_refused_by_name(backend: FakeBackend, num_threads: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_threads .*give an integer from 1"):
        two_answers.run_batch([{"number": 1}], backend=backend, num_threads=num_threads)


def test_runs_that_are_started_before_one_is_read_are_one_wave(backend: FakeBackend) -> None:
    states = [two_answers.run(number=number, backend=backend) for number in range(20)]
    assert backend.sent == []
    assert len({state["first"] for state in states}) == 20
    assert len(backend.sent[0]) == 20


def test_runs_from_many_threads_all_end(backend: FakeBackend) -> None:
    """One of the threads that wait sends the waves; when it has what it wanted, another one does."""
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda number: thoughtful.run(number=number, backend=backend).text(), range(200)))
    assert len(set(texts)) == 200


def test_a_program_that_waits_for_another_one_does_not_stop_the_waves() -> None:
    backend = FakeBackend(quiet_s=0.01)
    has_answer = threading.Event()

    @sgl.function
    def waits(s: Any, number: int) -> Any:
        if number == 0:
            assert has_answer.wait(60)
        s += sgl.gen("x")
        if number == 1 and s["x"]:
            has_answer.set()

    states = waits.run_batch([{"number": number} for number in range(3)], backend=backend)
    assert all(state["x"] for state in states)
    backend.close()


def test_a_batch_inside_a_program_is_run_too(backend: FakeBackend) -> None:
    @sgl.function
    def outer(s: Any, number: int) -> Any:
        states = two_answers.run_batch([{"number": number}, {"number": -number}], backend=backend)
        s += "".join(state["second"] for state in states)

    states = outer.run_batch([{"number": number} for number in range(1, 5)], backend=backend)
    assert [len(state.text()) for state in states] == [20] * 4


# What goes wrong


def test_a_program_that_raises_takes_no_other_along(backend: FakeBackend) -> None:
    num_ended = []

    @sgl.function
    def may_raise(s: Any, number: int) -> Any:
        s += sgl.gen("x")
        if s["x"] and number == 3:
            raise Boom
        num_ended.append(number)

    arguments = [{"number": number} for number in range(20)]
    with pytest.raises(Boom):
        may_raise.run_batch(arguments, backend=backend, num_threads=4)
    assert sorted(num_ended) == [*range(3), *range(4, 20)]
    states = may_raise.run_batch(arguments, backend=backend, generator_style=True)
    assert [next(states)["x"] != "" for _ in range(3)] == [True] * 3
    with pytest.raises(Boom):
        next(states)


def test_a_refused_request_is_the_program_s_error_as_upstream_has_it(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    @sgl.function
    def may_be_refused(s: Any, text: str) -> Any:
        s += text
        s += sgl.gen("x") + sgl.gen("y")

    states = may_be_refused.run_batch([{"text": text} for text in ("a", REFUSED, "b")], backend=backend)
    assert [str(state.error()) for state in states] == ["None", "refused", "None"]
    assert states[0]["y"] and states[2]["y"]
    with pytest.raises(KeyError) as raised:
        states[1]["x"]
    assert raised.value.__cause__ is states[1].error()
    states[1].__iadd__("more")  # upstream would wait for ever now
    assert states[1].text() == REFUSED
    assert "refused" in caplog.text


def test_a_batch_that_is_dropped_lets_what_is_under_way_end_and_begins_no_more(backend: FakeBackend) -> None:
    arguments = [{"number": number} for number in range(100)]
    states = two_answers.run_batch(arguments, backend=backend, num_threads=5, generator_style=True)
    next(states)
    states.close()
    num_sent = backend.waves.num_sent
    assert num_sent < 200 and num_sent % 2 == 0
    assert two_answers.run(number=1, backend=backend)["second"]


# What is asked


def test_sampling_of_the_batch_and_of_the_request_is_what_is_asked(backend: FakeBackend) -> None:
    @sgl.function
    def asks(s: Any) -> Any:
        s += "Q" + sgl.gen("x", stop=["."], dtype=int, min_p=0.1, return_logprob=True)

    asks.run_batch([{}], backend=backend, temperature=0.5, max_new_tokens=3, stop="never used", frequency_penalty=0.25)
    ((body,),) = backend.sent
    sampling = body.pop("sampling_params")
    assert body == {"text": "Q", "return_logprob": True}
    assert sampling["stop"] == [".", " ", "\n"] and sampling["regex"] == r"[-+]?[0-9]+[ \n]*"
    wanted = {"temperature": 0.5, "max_new_tokens": 3, "min_p": 0.1, "frequency_penalty": 0.25, "n": 1, "top_k": -1}
    assert {name: sampling[name] for name in wanted} == wanted


def test_several_samples_are_a_list_and_the_text_goes_on_with_the_first(backend: FakeBackend) -> None:
    @sgl.function
    def samples(s: Any) -> Any:
        s += "Q" + sgl.gen("x", n=3) + "!"

    state = samples.run(backend=backend)
    assert len(set(state["x"])) == 3 and state.text() == f"Q{state['x'][0]}!"
    assert len(state.get_meta_info("x")) == 3


def test_what_forks_share_is_not_asked_for_by_itself(backend: FakeBackend) -> None:
    @sgl.function
    def forks(s: Any) -> Any:
        s += "Shared. "
        both = s.fork(2)
        both += lambda number: f"{number}" + sgl.gen("x")
        both.join()

    forks.run_batch([{}], backend=backend)
    assert [len(wave) for wave in backend.sent] == [2]


def test_a_fault_of_planning_reaches_everybody_who_asked() -> None:
    """Of whatever kind it is: they would wait for ever."""

    async def broken(bodies: Any) -> AsyncIterator[tuple[int, Any]]:
        yield 1, "the second"
        raise TypeError("a value of a kind that nobody has thought of")

    async def run() -> dict[int, Any]:
        backend = BatchBackend.__new__(BatchBackend)
        backend._tokenizer = SimpleNamespace(encode=lambda texts: [])
        backend.planned = SimpleNamespace(answer=broken)
        bodies = [{"text": "a", "sampling_params": {"max_new_tokens": 1}} for _ in range(3)]
        async with asyncio.timeout(10):
            return {index: answer async for index, answer in backend._answer(bodies)}

    answers = asyncio.run(run())
    assert answers[1] == "the second"
    assert [type(answers[index]) for index in (0, 2)] == [TypeError, TypeError]
