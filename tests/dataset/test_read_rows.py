"""Reading JSON lines: what becomes a row, what becomes a bad row, and under which code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from batchllm.dataset import BadRow, Row, jsonl, read_rows
from batchllm.errors import ConfigError, WorkloadError
from batchllm.request import SamplingParams

DEFAULTS = SamplingParams()


def read(data: bytes, **options: Any) -> list[Row | BadRow]:
    return list(read_rows(io.BytesIO(data), defaults=DEFAULTS, **options))


def read_one(record: dict[str, Any] | bytes) -> Row | BadRow:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    (only,) = read(data)
    return only


def good(record: dict[str, Any] | bytes) -> Row:
    row = read_one(record)
    assert isinstance(row, Row), row
    return row


def bad(record: dict[str, Any] | bytes) -> BadRow:
    row = read_one(record)
    assert isinstance(row, BadRow), row
    return row


# ---- plain rows


def test_plain_row_with_everything() -> None:
    row = good({"id": "a", "prompt": "hi", "sampling_params": {"max_new_tokens": 3}, "namespace": "lora"})
    assert (row.kind, row.given_id, row.line) == ("plain", "a", 1)
    assert row.request.row_id == "a"
    assert row.request.prompt == "hi"
    assert row.request.namespace == "lora"
    assert row.request.sampling == SamplingParams(max_new_tokens=3)


def test_input_ids_are_a_flat_int32_array() -> None:
    ids = good({"id": "a", "input_ids": [0, 5, 2**31 - 1]}).request.input_ids
    assert ids is not None
    assert list(ids) == [0, 5, 2**31 - 1]
    assert memoryview(ids).itemsize == 4


def test_messages_are_kept_as_given() -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
    ]
    assert good({"id": "a", "messages": messages}).request.messages == messages


def test_integer_id_is_kept_and_its_text_is_used_inside() -> None:
    row = good({"id": 7, "prompt": "x"})
    assert row.given_id == 7
    assert row.request.row_id == "7"


def test_absent_id_is_the_position_among_the_rows() -> None:
    rows = read(b'\n{"prompt":"x"}\n\nnonsense\n{"prompt":"y"}\n')
    assert [(r.given_id, r.line) for r in rows] == [("0", 2), (None, 4), ("2", 5)]


def test_only_a_limit_the_row_did_not_set_may_be_lowered() -> None:
    assert good({"prompt": "x"}).request.may_lower_max_new_tokens
    assert good({"prompt": "x", "sampling_params": {"n": 2}}).request.may_lower_max_new_tokens
    limited = good({"prompt": "x", "sampling_params": {"max_new_tokens": 2}})
    assert not limited.request.may_lower_max_new_tokens


def test_equal_sampling_is_one_object() -> None:
    line = b'{"prompt":"x","sampling_params":{"n":2}}\n'
    first, second = read(line * 2)
    assert isinstance(first, Row) and isinstance(second, Row)
    assert first.request.sampling is second.request.sampling


def test_values_that_hash_alike_are_still_told_apart() -> None:
    rows = read(
        b'{"prompt":"x","sampling_params":{"n":1}}\n'
        b'{"prompt":"x","sampling_params":{"n":true}}\n'
        b'{"prompt":"x","sampling_params":{"n":1.0}}\n'
    )
    assert [type(row) for row in rows] == [Row, BadRow, Row]


def test_more_distinct_samplings_than_are_remembered_all_read_right() -> None:
    lines = b"".join(b'{"prompt":"x","sampling_params":{"seed":%d}}\n' % i for i in range(2500))
    rows = read(lines)
    assert [r.request.sampling.seed for r in rows if isinstance(r, Row)] == list(range(2500))


PLAIN_FAULTS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"id": "a"}, "missing_prompt", "prompt"),
    ({"id": "a", "prompt": None}, "missing_prompt", "prompt"),
    ({"id": "a", "prompt": "x", "input_ids": [1]}, "ambiguous_prompt", "input_ids"),
    ({"id": "a", "prompt": "x", "messages": []}, "ambiguous_prompt", "messages"),
    ({"id": "a", "prompt": ""}, "empty_prompt", "prompt"),
    ({"id": "a", "input_ids": []}, "empty_prompt", "input_ids"),
    ({"id": "a", "messages": []}, "empty_prompt", "messages"),
    ({"id": "a", "prompt": 3}, "invalid_prompt", "prompt"),
    ({"id": "a", "prompt": ["x"]}, "invalid_prompt", "prompt"),
    ({"id": "a", "input_ids": "1 2"}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "input_ids": [1, "2"]}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "input_ids": [1, 2.5]}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "input_ids": [1, True]}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "input_ids": [1, -2]}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "input_ids": [2**31]}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "input_ids": [10**25]}, "invalid_input_ids", "input_ids"),
    ({"id": "a", "messages": "hi"}, "invalid_messages", "messages"),
    ({"id": "a", "messages": ["hi"]}, "invalid_messages", "messages[0]"),
    ({"id": "a", "messages": [{"content": "x"}]}, "invalid_messages", "messages[0].role"),
    (
        {"id": "a", "messages": [{"role": "bot", "content": "x"}]},
        "invalid_messages",
        "messages[0].role",
    ),
    ({"id": "a", "messages": [{"role": "user"}]}, "invalid_messages", "messages[0].content"),
    (
        {"id": "a", "messages": [{"role": "user", "content": None}]},
        "invalid_messages",
        "messages[0].content",
    ),
    (
        {"id": "a", "messages": [{"role": "user", "content": "x", "contents": 1}]},
        "invalid_messages",
        "messages[0]",
    ),
    (
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "invalid_messages",
        "messages[0].content[0].text",
    ),
    (
        {"id": "a", "messages": [{"role": "user", "content": ["x"]}]},
        "invalid_messages",
        "messages[0].content[0]",
    ),
    (
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "unsupported_content",
        "messages[0].content[0]",
    ),
    ({"id": "a", "prompt": "x", "promt": "y"}, "unknown_field", "promt"),
    ({"id": "a", "prompt": "x", "max_new_tokens": 4}, "unknown_field", "max_new_tokens"),
    ({"id": "a", "prompt": "x", "namespace": 3}, "invalid_namespace", "namespace"),
    ({"id": "a", "prompt": "x", "task": 3}, "invalid_task", "task"),
    ({"id": "a", "prompt": "x", "expected_new_tokens": 0}, "parameter_out_of_range", "expected_new_tokens"),
    ({"id": "a", "prompt": "x", "expected_new_tokens": "7"}, "invalid_parameter_type", "expected_new_tokens"),
    ({"id": "a", "prompt": "x", "sampling_params": 3}, "invalid_parameter_type", "sampling_params"),
    ({"id": "a", "prompt": "x", "sampling_params": {"tmp": 0}}, "unknown_parameter", "tmp"),
    (
        {"id": "a", "prompt": "x", "sampling_params": {"max_new_tokens": 0}},
        "parameter_out_of_range",
        "max_new_tokens",
    ),
    (
        {"id": "a", "prompt": "x", "sampling_params": {"max_new_tokens": 10**30}},
        "parameter_out_of_range",
        "max_new_tokens",
    ),
]


@pytest.mark.parametrize(("record", "code", "param"), PLAIN_FAULTS)
def test_plain_fault_has_its_code_and_field(record: dict[str, Any], code: str, param: str | None) -> None:
    row = bad(record)
    assert (row.code, row.param, row.given_id, row.kind) == (code, param, "a", "plain")


def test_sampling_name_at_the_top_is_sent_to_its_place() -> None:
    assert "sampling_params" in bad({"prompt": "x", "temperature": 0}).message


def test_image_part_is_named() -> None:
    row = bad({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})
    assert "image_url" in row.message


@pytest.mark.parametrize("given", ["", True, 1.5, [], {}, 10**25])
def test_id_must_be_a_non_empty_string_or_an_integer(given: object) -> None:
    row = bad({"id": given, "prompt": "x"})
    assert (row.code, row.given_id) == ("invalid_id", None)


# ---- lines


LINE_FAULTS = [
    (b'{"id":"a"', "invalid_json"),
    (b"nonsense", "invalid_json"),
    (b'{"id":"a","prompt":NaN}', "invalid_json"),
    (b'{"id":"a","x":' + b"9" * 500 + b"}", "invalid_json"),
    (b'{"id":"a"} {"id":"b"}', "invalid_json"),
    (b'{"id":"\xff"}', "invalid_utf8"),
    (b"\xff\xfe", "invalid_utf8"),
    (b'{"prompt":"\\ud800"}', "lone_surrogate"),
    (b"[" * 5000 + b"]" * 5000, "nested_too_deep"),
    (b'{"a":' * 2000 + b"1" + b"}" * 2000, "nested_too_deep"),
    (b"[]", "not_an_object"),
    (b'"x"', "not_an_object"),
    (b"3", "not_an_object"),
    (b"null", "not_an_object"),
]


@pytest.mark.parametrize(("line", "code"), LINE_FAULTS)
def test_broken_line_has_its_code_and_number_and_its_neighbours_run(line: bytes, code: str) -> None:
    before, broken, after = read(b'{"id":"b","prompt":"x"}\n\n' + line + b'\n{"prompt":"y"}')
    assert isinstance(before, Row) and isinstance(after, Row)
    assert isinstance(broken, BadRow)
    assert (broken.code, broken.line, broken.index, broken.given_id) == (code, 3, 1, None)
    assert after.request.index == 2


def test_invalid_json_says_what_and_where() -> None:
    message = bad(b'{"id":"a",}').message
    assert "column 10" in message and "comma" in message


def test_byte_that_is_not_utf8_is_named() -> None:
    assert "byte 8 of the line (0xff)" in bad(b'{"id":"\xff"}').message


def test_byte_order_mark_at_the_start_is_skipped() -> None:
    assert good(b'\xef\xbb\xbf{"prompt":"x"}').request.prompt == "x"
    (row,) = read(b'\xef\xbb\xbf\n{"prompt":"x"}')
    assert row.line == 2


def test_crlf_and_a_last_line_without_end_are_accepted() -> None:
    rows = read(b'{"prompt":"x"}\r\n\r\n{"prompt":"y"}')
    assert [(type(row), row.line) for row in rows] == [(Row, 1), (Row, 3)]


def test_very_long_line_is_accepted() -> None:
    text = "x" * 20_000_000
    assert good({"prompt": text}).request.prompt == text


def test_sampling_nested_deeper_than_can_be_written_is_a_bad_row() -> None:
    nested = b'{"items":' * 500 + b"{}" + b"}" * 500
    row = bad(b'{"prompt":"x","sampling_params":{"json_schema":' + nested + b"}}")
    assert row.code == "invalid_json_schema"


def test_ids_are_read_and_not_compared() -> None:
    """One pass over the file keeps nothing of a row; `RowIds` finds who repeats whom."""
    rows = read(b'{"id":"a","prompt":"x"}\n{"id":"a","prompt":"y"}\n')
    assert [(type(row), row.given_id) for row in rows] == [(Row, "a"), (Row, "a")]


def test_a_bad_row_keeps_the_id_it_takes() -> None:
    assert bad({"id": "a"}).given_id == "a"


def test_unparsed_line_takes_the_format_of_the_file() -> None:
    first, second = read(b'{"custom_id":"a"\n{"prompt":"x"\n')
    assert isinstance(first, BadRow) and isinstance(second, BadRow)
    assert (first.kind, second.kind) == ("chat", "plain")
    rows = read(b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}\n{\n')
    assert isinstance(rows[1], BadRow) and rows[1].kind == "completions"


def test_line_that_is_too_long_is_a_bad_row_and_its_neighbours_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_LEN", 40)
    longest = b'{"prompt":"' + b"x" * 27 + b'"}'
    rows = read(longest + b"\n" + longest[:-2] + b'y"}\n' + b"z" * 3_000_000 + b"\n" + longest + b"\n" + b"z" * 41)
    assert [(row.line, row.code if isinstance(row, BadRow) else "good") for row in rows] == [
        (1, "good"),
        (2, "line_too_long"),
        (3, "line_too_long"),
        (4, "good"),
        (5, "line_too_long"),
    ]


# ---- files


def test_a_path_reads_like_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt":"x"}\n')
    assert list(read_rows(path, defaults=DEFAULTS)) == read(b'{"prompt":"x"}\n')


def test_missing_file_is_a_config_error_at_once_naming_flag_and_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"-i .*none\.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl", defaults=DEFAULTS)


def test_directory_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--input .*directory"):
        read_rows(tmp_path, defaults=DEFAULTS, flag="--input")


@pytest.mark.parametrize("content", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf"])
def test_file_without_rows_is_a_workload_error_naming_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match=r"empty\.jsonl: has no rows"):
        list(read_rows(path, defaults=DEFAULTS))


def test_reading_that_stops_midway_is_a_workload_error() -> None:
    class Broken(io.RawIOBase):
        def __init__(self) -> None:
            self._reads = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self._reads += 1
            if self._reads > 1:
                raise OSError(5, "Input/output error")
            line = b'{"prompt":"x"}\n'
            buffer[: len(line)] = line
            return len(line)

    rows = read_rows(io.BufferedReader(Broken()), defaults=DEFAULTS)
    assert isinstance(next(rows), Row)
    with pytest.raises(WorkloadError, match=r"after 1 rows: .*Input/output error"):
        next(rows)


@pytest.mark.parametrize(("given", "read"), [("1.0", 1), ("-3.0", -3), ("9007199254740992.0", 2**53)])
def test_an_id_of_a_column_of_doubles_is_the_whole_number(given: str, read: int) -> None:
    (row,) = read_rows(io.BytesIO(b'{"id": %s, "prompt": "x"}' % given.encode()), defaults=SamplingParams())
    assert isinstance(row, Row) and (type(row.given_id), row.given_id) == (int, read)


@pytest.mark.parametrize("given", ["1.5", "9007199254740994.0", "1e300"])
def test_an_id_that_a_double_may_have_rounded_is_refused(given: str) -> None:
    (row,) = read_rows(io.BytesIO(b'{"id": %s, "prompt": "x"}' % given.encode()), defaults=SamplingParams())
    assert isinstance(row, BadRow) and row.code == "invalid_id"


def test_token_ids_may_be_written_as_doubles() -> None:
    (row,) = read_rows(io.BytesIO(b'{"id": "a", "input_ids": [5.0, 6, 7.0]}'), defaults=SamplingParams())
    assert isinstance(row, Row) and list(row.request.input_ids or ()) == [5, 6, 7]


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({}, None),
        ({"lora_path": None}, None),
        ({"lora_path": ""}, None),
        ({"lora_path": "x"}, "x"),
        ({"sampling_params": {"lora_path": "x"}}, "x"),
        ({"lora_path": "y", "sampling_params": {"lora_path": "x", "temperature": 0}}, "y"),
    ],
)
def test_a_plain_row_names_its_adapter(fields: dict[str, Any], adapter: str | None) -> None:
    assert good({"id": "a", "prompt": "hi", **fields}).request.sampling.lora_path == adapter


def test_the_name_of_an_adapter_is_a_string() -> None:
    row = bad({"id": "a", "prompt": "hi", "lora_path": ["x"]})
    assert (row.code, row.param) == ("invalid_parameter_type", "lora_path")
