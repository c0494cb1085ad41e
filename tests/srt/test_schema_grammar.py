"""What `batchllm.dataset.schema_support` says of the grammar library, asked of the library that is installed."""

from __future__ import annotations

import json
import random
import string
from typing import Any

import jsonschema
import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string

from batchllm.dataset.schema_support import grammar_schema, schema_problem
from batchllm.dataset.schema_values import misread_escape
from tests.sizes import sized

EMPTY: dict[str, Any] = {}
INT, STR = {"type": "integer"}, {"type": "string"}

BROKEN: list[tuple[Any, str, str]] = [
    ({"type": "integer", "multipleOf": 5}, "multipleOf", "3"),
    ({"type": "integer", "minimum": 3}, "minimum", "1"),
    ({"type": "integer", "minimum": -5}, "minimum", "-"),
    ({"type": "integer", "maximum": -5}, "maximum", "-2"),
    ({"type": "integer", "minimum": 0, "maximum": 120}, "minimum", "129"),
    ({"type": "integer", "minimum": 2000, "maximum": 2100}, "minimum", "2900"),
    ({"type": "integer", "minimum": 50, "exclusiveMinimum": 9}, "minimum", "10"),
    ({"type": "number", "minimum": 0, "maximum": 1}, "minimum", "1.5"),
    ({"type": "number", "minimum": 3.5}, "minimum", "3x5"),
    ({"type": "number", "exclusiveMinimum": 0}, "exclusiveMinimum", "0"),
    ({"minimum": 3}, "minimum", "2"),
    ({"allOf": [INT, {"minimum": 3}]}, "allOf", '"a"'),
    ({"allOf": [INT], "maximum": 5}, "maximum", "6"),
    ({"not": STR}, "not", '"a"'),
    ({"if": STR, "then": {"maxLength": 1}}, "if", '"aa"'),
    ({"type": "array", "items": EMPTY, "contains": INT}, "contains", '["a"]'),
    ({"type": "array", "items": INT, "uniqueItems": True}, "uniqueItems", "[1,1]"),
    ({"items": INT, "uniqueItems": True}, "uniqueItems", "[1,1]"),
    (
        {"type": "object", "properties": {"a": INT, "b": INT}, "dependentRequired": {"a": ["b"]}},
        "dependentRequired",
        '{"a":1}',
    ),
    (
        {"type": "object", "properties": {"a": INT}, "dependentSchemas": {"a": {"required": ["b"]}}},
        "dependentSchemas",
        '{"a":1}',
    ),
    ({"type": "object", "required": ["a"]}, "required", "{}"),
    ({"type": "object", "properties": {"a": INT}, "required": ["b"]}, "required", '{"a":1}'),
    ({"type": "object", "properties": {"b": INT}, "propertyNames": {"pattern": "^a$"}}, "propertyNames", '{"b":1}'),
    (
        {"type": "object", "propertyNames": {"pattern": "^a$"}, "additionalProperties": INT},
        "propertyNames",
        '{"a":"x"}',
    ),
    ({"patternProperties": {"^a$": INT}}, "patternProperties", '{"a":"x"}'),
    ({"type": "object", "properties": {"a": STR}, "patternProperties": {"^a": INT}}, "patternProperties", '{"a":"x"}'),
    ({"type": "object", "properties": {"a": INT}, "additionalProperties": True}, "additionalProperties", '{"a":"x"}'),
    ({"type": "object", "properties": {"a": INT}, "additionalProperties": STR}, "additionalProperties", '{"a":"x"}'),
    ({"type": "object", "additionalProperties": INT, "minProperties": 2}, "minProperties", '{"a":1,"a":1}'),
    ({"minProperties": 1}, "minProperties", "{}"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "maxLength", '"aaa"'),
    ({"type": "string", "format": "date", "pattern": "^a$"}, "pattern", '"2020-01-01"'),
    ({"type": "string", "format": "uuid", "maxLength": 3}, "maxLength", f'"{"0" * 8}-0000-0000-0000-{"0" * 12}"'),
    ({"type": "string", "format": "json-pointer"}, "format", '"/""'),
    ({"type": "string", "pattern": "a|b"}, "pattern", '"a'),
    ({"type": "string", "pattern": "a.b"}, "pattern", '"a"b"'),
    ({"type": "string", "pattern": "[^a]"}, "pattern", '"""'),
    ({"type": "string", "pattern": "a$b"}, "pattern", '"ab"'),
    ({"type": "string", "pattern": "\\Aa"}, "pattern", '"Aa"'),
    ({"type": "integer", "enum": ["a", 1]}, "type", '"a"'),
    ({"type": "string", "const": 1}, "type", "1"),
    ({"enum": [1, 5], "maximum": 3}, "maximum", "5"),
    ({"type": []}, "type", "1"),
    ({"enum": []}, "enum", ""),
    ({"anyOf": [INT, STR], "minimum": 3}, "minimum", "1"),
    ({"type": "object", "properties": {"a": INT}, "anyOf": [{"required": ["a"]}]}, "required", "{}"),
    ({"oneOf": [INT, {"type": "number"}]}, "oneOf", "1"),
    ({"oneOf": [STR], "anyOf": [INT]}, "oneOf", "1"),
    ({"$ref": "#/$defs/n", "$defs": {"n": INT}, "minimum": 3}, "minimum", "1"),
    ({"$ref": "#n", "$defs": {"n": {"$anchor": "n", "type": "string"}}}, "$ref", "1"),
    (
        {
            "type": "array",
            "prefixItems": [{"type": "object", "properties": {"title": kind}} for kind in (STR, INT)],
        },
        "properties",
        '[{"title":"a"},{"title":"a"}]',
    ),
]
"""A schema, the keyword that is not kept, and a text that the grammar lets through all the same."""

KEPT: list[Any] = [
    EMPTY,
    {"type": "object"},
    {"type": "object", "description": "any"},
    {"type": "array"},
    {"type": "integer", "minimum": 1, "maximum": 10},
    {"type": "integer", "minimum": 1900, "maximum": 2100},
    {"type": "integer", "exclusiveMinimum": 0},
    {"type": "integer", "minimum": 18},
    {"type": "number", "minimum": 0},
    {
        "type": "integer",
        "multipleOf": 1,
        "title": "a",
        "default": 3,
        "examples": [1],
        "$comment": "",
        "format": "int64",
    },
    {"type": "array", "items": INT, "minItems": 1, "maxItems": 3, "uniqueItems": False},
    {"type": "array", "prefixItems": [INT, STR], "items": False},
    {"type": "object", "properties": {"a": INT, "b": STR}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "additionalProperties": INT, "minProperties": 1},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x_[a-z]+$": INT}},
    {"type": "string", "minLength": 1, "maxLength": 3},
    {"type": "string", "maxLength": 0},
    {"type": ["string", "null"], "minLength": 2},
    {"type": "string", "maxLength": 5000, "format": "made-up"},
    {"type": "object", "properties": {"minLength": {"type": "string", "maxLength": 2}}},
    {"type": "string", "pattern": "^(a|b)[0-9]{2}$", "minLength": 0},
    {"type": "string", "pattern": '^[^"\\\\\\x00-\\x1f]+$'},
    *({"type": "string", "format": name} for name in ("date", "ipv4", "uuid", "made-up")),
    {"type": ["string", "null"], "enum": ["a", None]},
    {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
    {"oneOf": [INT, STR]},
    {"oneOf": [{"const": 1}, {"const": "1"}]},
    {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            name: {"type": "object", "properties": {"kind": {"const": name, "type": "string"}}, "required": ["kind"]}
            for name in ("cat", "dog")
        },
    },
    {"allOf": [{"$ref": "#/$defs/n"}], "$defs": {"n": INT}, "description": "d"},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
]


def test_string_of_limited_length_holds_no_control_characters() -> None:
    """The library alone would let them in, and the answer would be no JSON; other characters it takes as before."""
    text = json.dumps({"type": "string", "minLength": 1, "maxLength": 3})
    alone, closed = (xgrammar.Grammar.from_json_schema(schema) for schema in (text, grammar_schema(text)))
    assert _is_grammar_accept_string(alone, '"\t"') and not _is_grammar_accept_string(closed, '"\t"')
    for inside, is_in in (("a", True), ("é🦀ب", True), ("", False), ("abcd", False), ('"', False)):
        assert _is_grammar_accept_string(closed, f'"{inside}"') == is_in


ENDLESS: list[Any] = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
]


@pytest.mark.parametrize(("schema", "keyword", "text"), BROKEN, ids=lambda value: json.dumps(value)[:60])
def test_refused_keyword_is_not_kept_by_the_grammar(schema: Any, keyword: str, text: str) -> None:
    """The checker names the keyword, and the grammar takes a text that breaks the schema or is no JSON."""
    assert f": {keyword}: " in str(schema_problem(json.dumps(schema)))
    assert _is_grammar_accept_string(xgrammar.Grammar.from_json_schema(json.dumps(schema)), text)
    assert not is_valid(text, schema)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"$ref": "http://example.org/a.json"}, "$ref"),
        ({"$dynamicRef": "#n"}, "$dynamicRef"),
        ({"type": "string", "format": "idn-email"}, "format"),
    ],
)
def test_refused_keyword_constrains_nothing_in_the_grammar(schema: Any, keyword: str) -> None:
    """Where no validator here can judge: the grammar takes any string."""
    assert f": {keyword}: " in str(schema_problem(json.dumps(schema)))
    assert _is_grammar_accept_string(xgrammar.Grammar.from_json_schema(json.dumps(schema)), '"x"')


@pytest.mark.parametrize("schema", KEPT, ids=lambda schema: json.dumps(schema)[:60])
def test_accepted_schema_is_kept(schema: Any) -> None:
    """Texts drawn from the grammar of a schema that passes are valid."""
    assert schema_problem(json.dumps(schema)) is None
    drawn = [draw(schema, random.Random(seed)) for seed in range(12)]
    assert [text for text in drawn if text is not None and not is_valid(text, schema)] == []


@pytest.mark.parametrize("schema", ENDLESS, ids=json.dumps)
def test_schema_without_a_finite_value_is_refused(schema: Any) -> None:
    """No text drawn from its grammar ever ends."""
    assert "without end" in str(schema_problem(json.dumps(schema)))
    assert draw(schema, random.Random(0)) is None


@pytest.mark.parametrize("letter", string.ascii_letters.replace("U", ""))
def test_escape_of_a_letter_is_refused_where_it_stands_for_the_letter(letter: str) -> None:
    """An anchor of Python's would be an ``A``. (``\\U`` is the beginning of an escape.)"""
    try:
        grammar = xgrammar.Grammar.from_regex("\\" + letter)
    except RuntimeError:
        assert misread_escape("\\" + letter) is None
        return
    is_the_letter = _is_grammar_accept_string(grammar, letter)
    is_class = letter in "dDwWsS"
    assert (misread_escape("\\" + letter) is not None) == (is_the_letter and not is_class)


numbers = st.integers(-130, 2200) | st.sampled_from([-1.5, 0.5, 9.75])
bounds = st.dictionaries(
    st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), numbers, max_size=2
)
sizes = st.integers(0, 3)
schemas = st.recursive(
    st.builds(lambda kind, more: {"type": kind, **more}, st.sampled_from(["integer", "number"]), bounds)
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["string", ["string", "null"]])},
        optional={
            "pattern": st.sampled_from(
                ["^a+$", "a|b", "^(a|b)$", "[^a]", '[^"\\\\\\x00-\\x1f]', "\\d{2}", "[\\w-]+", "."]
            ),
            "maxLength": sizes,
            "format": st.sampled_from(["date", "ipv4", "regex", "x"]),
        },
    )
    | st.sampled_from([{"const": 1}, {"enum": ["a", None]}, {"type": "boolean"}, True, {"enum": []}]),
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.just("object")},
            optional={
                "properties": st.dictionaries(st.sampled_from(["a", "b", "title"]), inner, max_size=2),
                "required": st.lists(st.sampled_from(["a", "b", "title"]), max_size=2, unique=True),
                "additionalProperties": st.just(False) | inner,
                "patternProperties": st.dictionaries(st.sampled_from(["^a", "^b$"]), inner, max_size=1),
                "minProperties": sizes,
                "maxProperties": sizes,
            },
        )
        | st.fixed_dictionaries(
            {"type": st.just("array")},
            optional={"items": inner, "prefixItems": st.lists(inner, max_size=2), "minItems": sizes, "maxItems": sizes},
        )
        | st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
        | st.lists(inner, min_size=1, max_size=2).map(lambda options: {"oneOf": options})
        | inner.map(lambda schema: {"allOf": [schema], "minimum": 3})
    ),
    max_leaves=4,
)


@settings(max_examples=sized(60, 2000), deadline=None)
@given(schema=schemas, rng=st.randoms(use_true_random=False))
def test_whatever_passes_is_kept(schema: Any, rng: random.Random) -> None:
    """A schema that the checker passes either does not compile, or texts drawn from its grammar are valid."""
    text = json.dumps(schema)
    if not isinstance(schema, dict) or schema_problem(text) is not None:
        return
    try:
        drawn = [draw(schema, rng) for _ in range(4)]
    except RuntimeError:
        return  # the library refuses it, and the row fails with its reason
    assert [text for text in drawn if text is not None and not is_valid(text, schema)] == []


_VOCAB = [*'{}[]":,abtitle0123456789.-eEnulrsfT+x_ \t\n\\', "</s>"]
_VOCAB = list(dict.fromkeys(_VOCAB))
_TOKENIZER = xgrammar.TokenizerInfo(_VOCAB, stop_token_ids=[_VOCAB.index("</s>")])
_COMPILER = xgrammar.GrammarCompiler(_TOKENIZER)
_MAX_LEN = 120


def draw(schema: Any, rng: random.Random) -> str | None:
    """A text from the grammar of a schema, character by character; None where it did not end in time."""
    matcher = xgrammar.GrammarMatcher(_COMPILER.compile_json_schema(grammar_schema(json.dumps(schema))))
    bitmask = xgrammar.allocate_token_bitmask(1, len(_VOCAB))
    stop = len(_VOCAB) - 1
    text = ""
    while len(text) < _MAX_LEN:
        matcher.fill_next_token_bitmask(bitmask)
        words = bitmask[0].tolist()
        allowed = [i for i in range(len(_VOCAB)) if (words[i // 32] >> (i % 32)) & 1]
        if stop in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return text
        # White space is allowed almost anywhere: seldom drawn, or nothing else would be.
        seen = [i for i in allowed if not _VOCAB[i].isspace()] if rng.random() < 0.9 else allowed
        if not seen and not allowed:
            return None
        token = rng.choice([i for i in seen or allowed if i != stop])
        matcher.accept_token(token)
        text += _VOCAB[token]
    return None


def is_valid(text: str, schema: Any) -> bool:
    """Whether it is JSON and satisfies the schema."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return jsonschema.Draft202012Validator(schema).is_valid(value)
