"""What is given to `BatchEngine.batch_generate` from Python may be of any type: what is wrong with a prompt is its own
fault, and what goes to the engine is of types that the engine's process knows.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import math
import pickle
from typing import Any

import numpy as np
import pytest

from batchllm.dataset.field_checks import show
from batchllm.dataset.sampling import SGLANG_FIELDS
from batchllm.engine import _inputs_of, _make_requests
from batchllm.errors import ConfigError, RowError
from batchllm.host import messages
from batchllm.request import Request


class Text(str):
    """A text of a class that only this process knows."""


class Role(str, enum.Enum):  # noqa: UP042 - what most programs have
    USER = "user"


class Number(enum.IntEnum):
    SEVEN = 7


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


NESTED: list[Any] = []
for _ in range(5_000):
    NESTED = [NESTED]
ITSELF: list[Any] = []
ITSELF.append(ITSELF)

VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 2**31, 2**63, 2**64, 10**5_000, -(10**5_000)),
    *(0.0, 1.5, math.nan, math.inf, 1e308, 5e-324),
    *("", "a", "\ud800", "a\0b", Text("x"), Role.USER, Number.SEVEN, b"bytes", bytearray(b"x"), memoryview(b"x")),
    *([], [1], ["a"], [None], [[]], [10**5_000], [True], [2**31], [Unshowable()], (), (1, 2), ("a",), range(3)),
    *({}, {"a": 1}, {1: 2}, {"1": 10**5_000}, {10**5_000: 1}, {"1": math.nan}, {None: 1}, {1}, frozenset({1})),
    *(np.float32(1.5), np.float64("nan"), np.int64(3), np.array([1, 2]), np.array(3), np.array([]), np.bool_(True)),
    *(decimal.Decimal(1), complex(1, 2), datetime.datetime(2026, 1, 1), object(), Unshowable(), NESTED, ITSELF, int),
    *(collections.UserDict(a=1), iter([1]), '{"type":', '{"a":1e999}', "[1]", {"type": Unshowable()}),
]


def _made(**given: Any) -> list[Request]:
    """The requests that are made of two prompts, the second of which is to be answered whatever the first is."""
    requests, rejected = _make_requests(_inputs_of(**given))
    assert all(isinstance(error, RowError) and str(error) for _, error in rejected)
    assert [request.index for request in requests][-1] == 1
    assert len(requests) + len(rejected) == 2
    for request in requests:  # by another process, which has no class of ours
        assert b"test_hostile_inputs" not in pickle.dumps(request)
    return requests


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_one_prompt_of_any_type_is_answered_or_refused_by_itself(value: Any) -> None:
    _made(prompts=[value, "good"])
    _made(input_ids=[value, [5, 6]])
    _made(messages=[value, [{"role": "user", "content": "good"}]])
    for field in ("role", "content", "name", "tool_calls", "annotations", "unknown"):
        message = {"role": "user", "content": "x"} | {field: value}
        _made(messages=[[message], [{"role": "user", "content": "good"}]])
    for part in (value, {"type": "text", "text": value}, {"type": value, "text": "x"}):
        message = {"role": "user", "content": [part]}
        _made(messages=[[message], [{"role": "user", "content": "good"}]])


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_one_prompts_settings_of_any_type_hold_or_are_refused_by_themselves(value: Any) -> None:
    for name in (*SGLANG_FIELDS, "unknown"):
        _made(prompts=["a", "good"], sampling_params=[{name: value}, {}])
    _made(prompts=["a", "good"], sampling_params=[value, {}])
    _made(prompts=["a", "good"], expected_new_tokens=[value, None])
    _made(prompts=["a", "good"], tasks=[value, ""])
    _made(prompts=["a", "good"], continuations=[value, None])
    _made(prompts=["a", "good"], score_from=[value, None])


@pytest.mark.parametrize("name", [10**5_000, None, 1.5, b"x", ("a",)], ids=lambda value: type(value).__name__)
def test_names_of_any_type_are_refused(name: Any) -> None:
    _made(prompts=["a", "good"], sampling_params=[{name: 1}, {}])
    _made(messages=[[{"role": "user", "content": "x", name: 1}], [{"role": "user", "content": "good"}]])


@pytest.mark.parametrize("argument", ["prompts", "input_ids", "messages", "sampling_params", "tasks", "continuations"])
@pytest.mark.parametrize("value", [5, 1.5, object(), iter(["a"]), 10**5_000, b"a", {"a"}], ids=lambda v: str(type(v)))
def test_an_argument_that_is_no_list_is_named(argument: str, value: Any) -> None:
    given = (
        {argument: value} if argument in ("prompts", "input_ids", "messages") else {"prompts": ["a"], argument: value}
    )
    with pytest.raises(ConfigError, match=argument):
        _inputs_of(**given)


@pytest.mark.parametrize("argument", ["prompts", "input_ids", "messages", "tasks", "continuations", "score_from"])
@pytest.mark.parametrize("value", ["a", {"a": 1}], ids=lambda v: type(v).__name__)
def test_a_text_or_a_dict_is_no_list_of_prompts(argument: str, value: Any) -> None:
    test_an_argument_that_is_no_list_is_named(argument, value)


def test_a_column_that_makes_its_values_anew_gives_each_prompt_its_own_settings() -> None:
    """Columns of `datasets` do so: where one dict was the next one may be, and is not the same."""

    class Column(collections.UserList[int]):
        def __getitem__(self, item: Any) -> Any:
            return {"max_new_tokens": self.data[item]}

    lengths = list(range(1, 101))
    requests, _ = _make_requests(_inputs_of(["a"] * 100, Column(lengths)))
    assert [request.sampling.max_new_tokens for request in requests] == lengths


def test_texts_of_a_users_own_class_go_to_the_engine_as_texts() -> None:
    (request, _) = _made(prompts=[Text("hello"), "good"], sampling_params={"stop": [Text("x"), Role.USER]})
    assert (request.prompt, type(request.prompt), request.sampling.stop) == ("hello", str, ("x", "user"))
    assert [type(stop) for stop in request.sampling.stop] == [str, str]
    chat = [{"role": Role.USER, "content": Text("hello")}]
    (request, _) = _made(messages=[chat, [{"role": "user", "content": "good"}]])
    assert request.messages == [{"role": "user", "content": "hello"}]


def test_what_the_engines_process_does_not_know_is_a_fault_of_who_sent_it() -> None:
    data = messages.packed(((Text("x"),), {}))
    broken = data.replace(b"test_hostile_inputs", b"test_hostile_outputs"[:19])
    with pytest.raises(TypeError, match="values of Python's own types"):
        messages.unpacked(broken)


def test_a_number_with_more_digits_than_python_writes_can_be_spoken_of() -> None:
    assert show(10**5_000) == "a int that is too large to be shown"
