"""Columns become rows: templates, named columns, what is carried, and every refusal."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import BadRow, ColumnMap, Row, read_rows, reject, render_error
from batchllm.errors import ConfigError, RowError
from batchllm.offline.row_spool import RowSpool
from batchllm.request import SamplingParams

HELLO = [{"role": "user", "content": "hi"}]
OPENAI = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": HELLO}}


def read_one(record: dict[str, Any] | bytes, **columns: Any) -> Row | BadRow:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    (only,) = read_rows(io.BytesIO(data), defaults=SamplingParams(), columns=ColumnMap(**columns))
    return only


def good(record: dict[str, Any] | bytes, **columns: Any) -> Row:
    row = read_one(record, **columns)
    assert isinstance(row, Row), row
    return row


def bad(record: dict[str, Any] | bytes, **columns: Any) -> BadRow:
    row = read_one(record, **columns)
    assert isinstance(row, BadRow), row
    return row


# ---- the prompt


def test_without_names_the_fields_of_a_row_are_taken_and_others_ignored() -> None:
    row = good({"id": "a", "prompt": "hi", "namespace": "n", "task": "t", "expected_new_tokens": 3, "author": "me"})
    assert (row.given_id, row.request.prompt, row.request.namespace, row.request.task) == ("a", "hi", "n", "t")
    assert row.request.expected_new_tokens == 3
    assert row.carried is None


def test_a_named_column_is_the_prompt_and_other_prompts_are_left_alone() -> None:
    record = {"text": "hi", "prompt": "no", "input_ids": [1], "messages": HELLO, "sampling_params": {"n": 2}}
    row = good(record, prompt_column="text")
    assert (row.request.prompt, row.request.input_ids, row.request.messages) == ("hi", None, None)
    assert row.request.sampling.n == 2


@pytest.mark.parametrize("value", [HELLO, json.dumps(HELLO)])
def test_messages_come_as_a_list_or_its_text(value: object) -> None:
    assert good({"chat": value}, messages_column="chat").request.messages == HELLO
    assert good({"messages": value}).request.messages == HELLO


def test_sampling_may_be_json_text() -> None:
    assert good({"prompt": "x", "sampling_params": '{"n": 3}'}).request.sampling.n == 3


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("Summarize: {text}", "Summarize: T"),
        ("{text}{text} {n}", "TT 3"),
        ("{{{text}}} {{", "{T} {"),
        ("{half} {yes} {many} {of} {my column}", '0.5 true [1,"é"] {"a":null} m'),
    ],
)
def test_template_puts_the_row_s_values_in_its_places(template: str, prompt: str) -> None:
    record = {"text": "T", "n": 3, "half": 0.5, "yes": True, "many": [1, "é"], "of": {"a": None}, "my column": "m"}
    assert good(record, template=template).request.prompt == prompt


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_value_comes_out_as_it_is_and_is_never_read_as_a_template(around: str, value: str) -> None:
    escaped = around.replace("{", "{{").replace("}", "}}")
    made = ColumnMap(template=f"{escaped}{{text}}{escaped}").apply({"text": value}, is_openai=False)
    assert made["prompt"] == around + value + around


@pytest.mark.parametrize(
    "template",
    ["{}", "{ }", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a:{b}}", "{0.x}", "{a", "a}", "{{a}}", "plain", ""],
)
def test_template_with_more_than_names_or_without_any_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="--template"):
        ColumnMap(template=template)


@settings(deadline=None)
@given(st.text(alphabet='{}ab.![:"é', max_size=12))
def test_any_template_is_refused_or_names_columns(template: str) -> None:
    try:
        columns = ColumnMap(template=template)
    except ConfigError:
        return
    row = read_one({}, template=template)
    assert isinstance(row, BadRow) and row.code == "missing_column"
    assert row.param in columns.columns()


@pytest.mark.parametrize("record", [{"a": 1, "other": 2}, {"a": 1, "other": 2, "text": None}])
@pytest.mark.parametrize("columns", [{"template": "{a}{text}"}, {"prompt_column": "text"}, {"messages_column": "text"}])
def test_a_column_without_a_value_is_named_with_those_that_have_one(
    record: dict[str, Any], columns: dict[str, str]
) -> None:
    row = bad({"id": "r", **record}, **columns)
    assert (row.code, row.param, row.given_id) == ("missing_column", "text", "r")
    assert "'a', 'id', 'other'" in row.message


def test_a_row_of_very_many_columns_is_described_in_few_words() -> None:
    row = bad({f"column-{'x' * 500}-{number}": 1 for number in range(500)}, prompt_column="text")
    assert len(row.message) < 1500 and "and 480 more" in row.message


def test_a_prompt_column_that_is_no_text_is_a_bad_prompt() -> None:
    assert bad({"text": 3}, prompt_column="text").code == "invalid_prompt"
    assert bad({"text": ""}, template="{text}").code == "empty_prompt"


@pytest.mark.parametrize("field", ["messages", "sampling_params"])
def test_text_that_is_not_json_is_refused_naming_the_field(field: str) -> None:
    row = bad({"id": "r", "prompt": "x", field: "nonsense"})
    assert (row.code, row.param, row.given_id) == ("invalid_column", field, "r")


# ---- the id


def test_a_named_column_is_the_id() -> None:
    row = good({"key": 5, "id": "no", "prompt": "x"}, id_column="key")
    assert (row.given_id, row.request.row_id) == (5, "5")


def test_a_row_without_the_named_id_is_refused() -> None:
    row = bad({"id": "no", "prompt": "x"}, id_column="key")
    assert (row.code, row.param, row.given_id) == ("missing_id", "key", None)


# ---- OpenAI rows


def test_an_openai_row_is_read_as_one_and_its_body_may_be_text() -> None:
    for body in (OPENAI["body"], json.dumps(OPENAI["body"])):
        row = good({**OPENAI, "body": body, "extra": 1}, carry=("extra",))
        assert (row.kind, row.given_id, row.request.messages, row.carried) == ("chat", "c", HELLO, {"extra": 1})


def test_an_openai_row_may_have_its_id_elsewhere() -> None:
    record = {**OPENAI, "key": "k"}
    del record["custom_id"]
    assert good(record, id_column="key").given_id == "k"


def test_a_named_prompt_makes_every_row_a_plain_one() -> None:
    row = good({**OPENAI, "text": "x"}, prompt_column="text")
    assert (row.kind, row.given_id, row.request.prompt) == ("plain", "0", "x")


def test_a_url_alone_makes_no_openai_row() -> None:
    row = good({"url": "https://example.org", "prompt": "x"}, carry=("url",))
    assert (row.kind, row.carried) == ("plain", {"url": "https://example.org"})


# ---- what is carried


def test_carried_columns_come_in_the_order_asked_for_and_null_where_absent() -> None:
    record = {"prompt": "x", "b": [1, {"c": None}], "a": "t"}
    row = good(record, carry=("a", "gone", "b", "prompt"))
    assert row.carried is not None
    assert list(row.carried.items()) == [("a", "t"), ("gone", None), ("b", [1, {"c": None}]), ("prompt", "x")]


def test_a_bad_row_carries_too() -> None:
    assert bad({"a": 1}, carry=("a",)).carried == {"a": 1}
    assert bad({**OPENAI, "body": {}, "a": 1}, carry=("a",)).carried == {"a": 1}


def test_what_is_nested_too_deep_to_be_written_is_refused() -> None:
    nested = b"[" * 400 + b"]" * 400
    row = bad(b'{"id":"r","prompt":"x","deep":' + nested + b"}", carry=("deep",))
    assert (row.code, row.param, row.given_id, row.carried) == ("not_json", "deep", "r", None)
    assert bad(b'{"deep":' + nested + b"}", template="{deep}").code == "not_json"


@pytest.mark.parametrize("depth", range(248, 258))
def test_whatever_is_carried_can_be_kept_and_written(depth: int, tmp_path: Path) -> None:
    row = read_one(b'{"prompt":"x","deep":' + b"[" * depth + b"]" * depth + b"}", carry=("deep",))
    if isinstance(row, Row):
        with contextlib.closing(RowSpool(tmp_path)) as spool:
            spool.append(row.head)
            spool.flush()
            assert spool.read(0) == row.head
        orjson.dumps(render_error(reject(row.head, RowError("no", code="aborted"))))
    else:
        assert row.code == "not_json" and depth > 250


# ---- flags


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_column": "a", "template": "{a}"}, "--prompt-column and --template"),
        ({"prompt_column": "a", "messages_column": "b"}, "--prompt-column and --messages-column"),
        ({"prompt_column": ""}, "--prompt-column: is empty"),
        ({"messages_column": ""}, "--messages-column: is empty"),
        ({"id_column": ""}, "--id-column: is empty"),
        ({"carry": ("a", "")}, "--carry: is empty"),
        ({"carry": ("a", "b", "a")}, "--carry a: is given twice"),
    ],
)
def test_flags_that_contradict_or_say_nothing_are_refused_by_name(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ColumnMap(**columns)
