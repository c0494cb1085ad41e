"""What `parse_sampling` accepts, what it refuses, and how it says so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from batchllm.dataset import parse_sampling
from batchllm.errors import RowError
from batchllm.request import SamplingParams

DEFAULTS = SamplingParams()


def refused(mapping: Any, defaults: SamplingParams = DEFAULTS) -> RowError:
    with pytest.raises(RowError) as caught:
        parse_sampling(mapping, defaults=defaults)
    return caught.value


def test_nothing_given_is_the_defaults() -> None:
    defaults = SamplingParams(max_new_tokens=7, temperature=0.5, stop=("x",))
    assert parse_sampling({}, defaults=defaults) == defaults


def test_null_means_not_given() -> None:
    defaults = SamplingParams(seed=3, top_p=0.5)
    assert parse_sampling({"seed": None, "top_p": None}, defaults=defaults) == defaults


def test_every_name_of_sglang_is_read() -> None:
    given = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "n": 3,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "frequency_penalty": -2,
        "presence_penalty": 2.0,
        "repetition_penalty": 1.5,
        "regex": "[ab]+",
        "logprobs": True,
        "top_logprobs": 20,
        "skip_special_tokens": False,
    }
    assert parse_sampling(given, defaults=DEFAULTS) == SamplingParams(
        temperature=0.0,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        max_new_tokens=9,
        min_new_tokens=2,
        n=3,
        seed=11,
        stop=("a", "b"),
        stop_token_ids=(1, 2),
        ignore_eos=True,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        repetition_penalty=1.5,
        regex="[ab]+",
        logprobs=True,
        top_logprobs=20,
        skip_special_tokens=False,
    )


def test_values_take_the_type_of_their_field() -> None:
    params = parse_sampling({"temperature": 1, "stop": "x"}, defaults=DEFAULTS)
    assert type(params.temperature) is float
    assert params.stop == ("x",)


def test_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    error = refused({"temprature": 0.5})
    assert error.code == "unknown_parameter"
    assert error.param == "temprature"
    assert "did you mean 'temperature'?" in error.message


def test_unknown_name_is_refused_even_with_a_null_value() -> None:
    assert refused({"nonsense": None}).code == "unknown_parameter"


def test_unknown_name_far_from_all_lists_the_known_ones() -> None:
    assert "max_new_tokens" in refused({"zzz": 1}).message


OUT_OF_RANGE = [
    ("max_new_tokens", -1),
    ("max_new_tokens", 2**31),
    ("min_new_tokens", -1),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -2),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("frequency_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 2.1),
    ("n", 0),
    ("n", 129),
    ("top_logprobs", 21),
    ("top_logprobs", -1),
    ("seed", -(2**63)),
    ("seed", 2**63),
    ("max_new_tokens", 1e20),
    ("stop", ["a", ""]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range_names_the_field_and_the_range(name: str, value: object) -> None:
    error = refused({name: value})
    assert (error.code, error.param) == ("parameter_out_of_range", name)
    assert name in error.message


WRONG_TYPE = [
    ("max_new_tokens", True),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", "16"),
    ("temperature", True),
    ("temperature", "0"),
    ("top_k", True),
    ("top_k", 1.5),
    ("n", [1]),
    ("seed", 1.5),
    ("stop", 3),
    ("stop", ["a", 3]),
    ("stop_token_ids", 3),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("logprobs", 1),
    ("skip_special_tokens", "no"),
    ("regex", 3),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_wrong_type_names_the_field_and_the_type(name: str, value: object) -> None:
    error = refused({name: value})
    assert (error.code, error.param) == ("invalid_parameter_type", name)


def test_a_mapping_is_needed() -> None:
    assert refused([("n", 1)]).code == "invalid_parameter_type"


BOUNDARIES = [
    ("max_new_tokens", 1),
    ("temperature", 0.0),
    ("top_p", 1.0),
    ("top_k", -1),
    ("min_p", 1.0),
    ("frequency_penalty", 2.0),
    ("repetition_penalty", 2.0),
    ("n", 128),
    ("seed", 2**63 - 1),
    ("stop_token_ids", ()),
]


@pytest.mark.parametrize(("name", "value"), BOUNDARIES)
def test_the_ends_of_the_ranges_are_in(name: str, value: object) -> None:
    assert getattr(parse_sampling({name: value}, defaults=DEFAULTS), name) == value


def test_json_schema_object_and_text_are_stored_as_text_in_the_order_given() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    as_object = parse_sampling({"json_schema": schema}, defaults=DEFAULTS).json_schema
    as_text = parse_sampling({"json_schema": json.dumps(schema)}, defaults=DEFAULTS).json_schema
    assert as_object is not None and as_text is not None
    assert json.loads(as_object) == json.loads(as_text) == schema
    assert as_object.index('"b"') < as_object.index('"a"')


@pytest.mark.parametrize("name", ["json_schema", "regex", "ebnf", "structural_tag"])
def test_an_empty_grammar_asks_nothing(name: str) -> None:
    """As on SGLang's server, beside another one too."""
    other = {"regex": "yes"} if name != "regex" else {"ebnf": 'root ::= "yes"'}
    assert parse_sampling({name: "", **other}, defaults=DEFAULTS) == parse_sampling(other, defaults=DEFAULTS)


@pytest.mark.parametrize("schema", ["{", "[]", "3", 3, [], {1: 2}, True])
def test_json_schema_that_is_no_json_object_is_refused(schema: object) -> None:
    assert refused({"json_schema": schema}).code == "invalid_json_schema"


def test_json_schema_nested_too_deep_to_write_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(600):
        schema = {"items": schema}
    assert refused({"json_schema": schema}).code == "invalid_json_schema"


@pytest.mark.parametrize("pattern", ["[[a]", "(?<name>a)", r"\u{41}", "(unclosed"])
def test_regex_is_left_to_the_grammar_library_whose_dialect_it_is(pattern: str) -> None:
    assert parse_sampling({"regex": pattern}, defaults=DEFAULTS).regex == pattern


def test_escape_that_the_grammar_would_misread_is_refused() -> None:
    assert refused({"regex": r"\Aab\Z"}).code == "invalid_regex"
    assert parse_sampling({"regex": r"\\A\d"}, defaults=DEFAULTS).regex == r"\\A\d"


@pytest.mark.parametrize("name", ["stop", "regex"])
def test_half_a_character_is_refused_by_name_and_place(name: str) -> None:
    error = refused({name: "ab\ud83d"})
    assert (error.code, error.param) == ("lone_surrogate", name)
    assert "at 2" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("repetition_penalty", 1e-60),
        ("top_p", 1e-60),
        ("logit_bias", {"5": -1e308}),
        ("logit_bias", {"5": 10**400}),
    ],
)
def test_numbers_that_the_engine_cannot_hold_are_refused(name: str, value: Any) -> None:
    """It has floats of 32 bits; one that does not fit ended the scheduler."""
    error = refused({name: value})
    assert error.code == "parameter_out_of_range"
    assert "32 bits" in error.message


def test_half_a_character_in_a_schema_is_refused_by_name() -> None:
    error = refused({"json_schema": {"const": "\ud83d"}})
    assert (error.code, error.param) == ("lone_surrogate", "json_schema.const")
    assert refused({"json_schema": '{"const": "\ud83d"}'}).param == "json_schema"


def test_schema_that_the_grammar_does_not_keep_is_refused_by_keyword_and_path() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 5}}}
    error = refused({"json_schema": schema})
    assert (error.code, error.param) == ("unsupported_schema", "json_schema")
    assert error.message.startswith("json_schema: $.properties.n: multipleOf: ")


def test_json_schema_and_regex_exclude_each_other() -> None:
    assert refused({"json_schema": {}, "regex": "a"}).code == "conflicting_parameters"


def test_a_rows_regex_takes_the_place_of_the_default_schema() -> None:
    params = parse_sampling({"regex": "a"}, defaults=SamplingParams(json_schema="{}"))
    assert (params.regex, params.json_schema) == ("a", None)


def test_two_names_of_one_setting_must_agree() -> None:
    assert parse_sampling({"seed": 4, "sampling_seed": 4}, defaults=DEFAULTS).seed == 4
    error = refused({"seed": 4, "sampling_seed": 5})
    assert error.code == "conflicting_parameters"


def test_min_above_max_is_refused_against_the_default_too() -> None:
    error = refused({"min_new_tokens": 9}, SamplingParams(max_new_tokens=8))
    assert error.code == "conflicting_parameters"
    assert "9" in error.message and "8" in error.message


def test_top_logprobs_without_logprobs_is_refused() -> None:
    error = refused({"top_logprobs": 3})
    assert (error.code, error.param) == ("conflicting_parameters", "top_logprobs")


def test_messages_stay_short_however_long_the_value() -> None:
    assert len(refused({"max_new_tokens": "x" * 100_000}).message) < 300
    assert len(refused({"stop": [1] * 100_000}).message) < 300


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("max_new_tokens", 8.0, 8),
        ("max_new_tokens", np.int64(8), 8),
        ("max_new_tokens", np.float32(8), 8),
        ("n", 2.0, 2),
        ("seed", 5.0, 5),
        ("seed", -1, -1),
        ("seed", -(2**63) + 1, -(2**63) + 1),
        ("top_k", 20.0, 20),
        ("top_k", 0, -1),
        ("top_k", -1.0, -1),
        ("temperature", np.float64(0.5), 0.5),
        ("temperature", np.int32(1), 1.0),
        ("ignore_eos", np.bool_(True), True),
        ("stop", np.str_("x"), ("x",)),
        ("stop_token_ids", [3.0, np.int64(4)], (3, 4)),
        ("stop_token_ids", np.array([3, 4]), (3, 4)),
    ],
)
def test_a_number_is_what_it_is_worth_however_it_is_written(name: str, given: object, read: object) -> None:
    """As JSON has it: a column of integers with one that is missing is one of doubles. And scalars of numpy."""
    value = getattr(parse_sampling({name: given}, defaults=SamplingParams()), name)
    assert (type(value), value) == (type(read), read)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("max_new_tokens", 8.5),
        ("max_new_tokens", float("inf")),
        ("max_new_tokens", float("nan")),
        ("max_new_tokens", 1e300),
        ("max_new_tokens", np.float64("nan")),
        ("max_new_tokens", np.bool_(True)),
        ("max_new_tokens", np.array([8])),
        ("seed", -(2**63)),
        ("top_k", 0.5),
        ("top_k", -2),
        ("ignore_eos", np.int64(1)),
        ("stop", ["a", ""]),
        ("stop_token_ids", [3.5]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", np.array([[3]])),
        ("temperature", np.float32("nan")),
    ],
)
def test_a_number_that_is_none_of_these_is_refused(name: str, given: object) -> None:
    assert refused({name: given}).param == name


@pytest.mark.parametrize("value", ["", [], (), [""]])
def test_a_stop_that_is_empty_leaves_the_default(value: object) -> None:
    assert parse_sampling({"stop": value}, defaults=SamplingParams(stop=("x",))).stop == ("x",)
