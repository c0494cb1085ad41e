"""What `BatchEngine.batch_generate` takes is checked as rows of a file are, whatever form it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from batchllm import BatchEngine
from batchllm.engine import _Inputs, _inputs_of, _make_requests, _rejection
from batchllm.errors import ConfigError, RowError
from batchllm.request import SamplingParams


def faults(field: str, value: Any, sampling: Any) -> list[tuple[str, str | None]]:
    """Codes and parameters of one prompt's faults, beside a good one's."""
    good: dict[str, Any] = {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    nothing = [None, None]
    inputs = _Inputs(
        field=field,
        values=[value, good[field]],
        sampling=[sampling, {}],
        expected=nothing,
        tasks=["", ""],
        continuations=nothing,
        score_from=nothing,
    )
    requests, rejected = _make_requests(inputs)
    assert [request.index for request in requests] == [index for index in (0, 1) if index not in dict(rejected)]
    return [(error.code, error.param) for _, error in rejected]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", "bad \ud83d half", "prompt"),
        ("messages", [{"role": "user", "content": "\ud83d"}], "messages[0].content"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}],
            "messages[0].content[0].text",
        ),
    ],
)
def test_half_a_character_fails_its_prompt_only(field: str, value: Any, param: str) -> None:
    assert faults(field, value, {}) == [("lone_surrogate", param)]


@pytest.mark.parametrize("make", [dict, SamplingParams])
def test_sampling_is_checked_in_either_form(make: Any) -> None:
    assert faults("prompt", "a", make(stop=("\ud83d",))) == [("lone_surrogate", "stop")]
    assert faults("prompt", "a", make(regex="\ud83d")) == [("lone_surrogate", "regex")]
    assert faults("prompt", "a", make(json_schema='{"type":"integer","multipleOf":2}')) == [
        ("unsupported_schema", "json_schema")
    ]
    assert faults("prompt", "a", make(max_new_tokens=3, stop=("x",), stop_token_ids=(1,), logprobs=True)) == []


def test_no_settings_are_given_by_none_as_in_a_file() -> None:
    requests, rejected = _make_requests(_inputs_of(["a", "b"], [None, {"max_new_tokens": 3}]))
    assert ([request.sampling.max_new_tokens for request in requests], rejected) == ([128, 3], [])


@pytest.mark.parametrize("params", [None, {}, {"max_new_tokens": None}])
def test_a_limit_that_is_not_given_is_a_default_as_in_a_file(params: Any) -> None:
    """What only scores generates nothing, and a prompt near the context's end is answered with what room there is."""
    given, scored = _make_requests(_inputs_of(["a", "b"], params, continuations=[None, "c"]))[0]
    assert (given.sampling.max_new_tokens, given.may_lower_max_new_tokens) == (128, True)
    assert scored.sampling.max_new_tokens == 0
    (asked,) = _make_requests(_inputs_of(["a"], {"max_new_tokens": 128}))[0]
    assert not asked.may_lower_max_new_tokens


def test_a_column_of_a_table_is_a_list_whoever_holds_it() -> None:
    """Tables that were read from Parquet have lists as arrays of numpy; Arrow's have scalars of their own."""
    chats = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    in_arrays = pd.Series([np.array(chat, object) for chat in chats])
    for field, values in (
        ("prompts", pa.chunked_array([["a"], ["b"]])),
        ("input_ids", pa.array([[1, 2], [3]])),
        ("messages", pa.array(chats)),
        ("messages", in_arrays),
    ):
        sampling = pa.array([{"max_new_tokens": 3, "seed": None}, {"max_new_tokens": 4, "seed": 5}])
        requests, rejected = _make_requests(_inputs_of(sampling_params=sampling, **{field: values}))
        assert ([request.sampling.max_new_tokens for request in requests], rejected) == ([3, 4], [])
        assert field != "messages" or [request.messages for request in requests] == chats


@pytest.mark.parametrize("values", ["a", {"a": 1}, {"a"}, pd.DataFrame({"a": ["b"]}), np.array("a"), iter("a"), 3])
def test_what_is_no_list_is_refused_by_the_name_of_its_argument(values: Any) -> None:
    """A table of pandas gave the name of its column as the prompt."""
    with pytest.raises(ConfigError, match="prompts must be a list, or one column of a table, not "):
        _inputs_of(values)
    if not isinstance(values, dict):
        with pytest.raises(ConfigError, match="sampling_params must be a list, or one column of a table, not "):
            _inputs_of(["a"], values)


def test_an_engine_that_could_not_end_a_batch_is_not_started(tmp_path: Path) -> None:
    """Its trace is written when all is answered; what could be known before would cost the answers."""
    with pytest.raises(ConfigError, match=r"trace_path .*there is no directory"):
        BatchEngine(trace_path=tmp_path / "none" / "trace.json")
    no_name: Any = 3
    with pytest.raises(ConfigError, match="trace_path 3: must be the name of a file"):
        BatchEngine(trace_path=no_name)
    with pytest.raises(ConfigError, match=r"group_order must be one of lexicographic, .*, not 'longest'"):
        BatchEngine(group_order="longest")  # type: ignore[arg-type]


def test_a_prompt_that_cannot_run_says_why_by_code_too() -> None:
    completion = _rejection(1, RowError("stop has half a character", code="lone_surrogate"))
    assert (completion.error, completion.error_code) == ("stop has half a character", "lone_surrogate")
