"""Schemas that the grammar does not keep are named. `tests/srt/test_schema_grammar.py` asks the grammar itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.dataset.schema_support import schema_problem


def problem(schema: Any) -> str | None:
    return schema_problem(json.dumps(schema))


@pytest.mark.parametrize(
    "note",
    ["title", "description", "default", "examples", "$comment", "readOnly", "writeOnly", "deprecated", "$id", "x-ours"],
)
def test_annotations_constrain_nothing(note: str) -> None:
    assert problem({"type": "object", "properties": {"a": {"type": "integer", note: "text"}}, note: "text"}) is None


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"n": {"type": "integer", "multipleOf": 5}}}, "$.properties.n: multipleOf: "),
        ({"type": "array", "items": {"anyOf": [{"not": {"const": 1}}]}}, "$.items.anyOf[0]: not: "),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"minimum": 3}}}, "$.$defs.a: minimum: "),
        ({"type": "object", "properties": {"a": {"enum": []}}}, "$.properties.a: enum: "),
        ({"type": "object", "properties": {"a": False}}, "$.properties.a: false: "),
    ],
)
def test_keyword_is_named_with_its_path(schema: Any, place: str) -> None:
    assert str(problem(schema)).startswith(place)


def test_definition_that_nothing_refers_to_is_not_looked_at() -> None:
    assert problem({"type": "integer", "$defs": {"unused": {"not": {}}}}) is None


def test_keyword_of_another_type_constrains_nothing() -> None:
    assert problem({"type": "string", "multipleOf": 5, "uniqueItems": True, "required": ["a"]}) is None


def test_recursive_schema_is_followed_once() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}}
    assert problem(tree) is None


def test_schema_text_is_looked_at_once() -> None:
    """A million rows may share it."""
    text = json.dumps({"type": "integer", "minimum": 17, "description": "of this test"})
    hits = schema_problem.cache_info().hits
    schema_problem(text)
    schema_problem(text)
    assert schema_problem.cache_info().hits == hits + 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
keywords = st.sampled_from(
    [
        *("type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "$ref", "$defs", "items"),
        *("prefixItems", "properties", "required", "patternProperties", "additionalProperties", "propertyNames"),
        *("minProperties", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "pattern", "format", "minLength"),
    ]
)


@given(
    st.recursive(
        st.dictionaries(keywords, json_values, max_size=4),
        lambda inner: st.dictionaries(keywords, inner | json_values | st.lists(inner, max_size=2), max_size=4),
        max_leaves=4,
    )
)
def test_whatever_stands_in_a_schema_gets_an_answer(schema: Any) -> None:
    """Malformed schemas included: what is wrong with those the grammar library says."""
    assert isinstance(problem(schema), str | None)
