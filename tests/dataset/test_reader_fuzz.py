"""Whatever bytes come in, in whatever format: no traceback, and one row or bad row for each non-blank line or row."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchllm.dataset import BadRow, ColumnMap, Row, jsonl, read_rows, render_error
from batchllm.dataset.sampling import SGLANG_FIELDS
from batchllm.errors import ConfigError, WorkloadError
from batchllm.request import SamplingParams
from tests.sizes import sized

BOM = b"\xef\xbb\xbf"


def check_reading(data: bytes, columns: ColumnMap | None = None) -> list[Row | BadRow]:
    """Reads, and checks the room's invariant against an independent count of the lines."""
    lines = data.removeprefix(BOM).split(b"\n")
    is_array = lines[0].lstrip().startswith(b"[")  # read as one, by items; what is around them may end it
    expected = [number for number, line in enumerate(lines, start=1) if line.strip()]
    rows: list[Row | BadRow] = []
    try:
        rows.extend(read_rows(io.BytesIO(data), defaults=SamplingParams(), columns=columns))
    except WorkloadError:
        assert not expected or is_array
    assert is_array or [row.line for row in rows] == expected
    for position, row in enumerate(rows):
        assert (row.request.index if isinstance(row, Row) else row.index) == position
        if isinstance(row, BadRow):
            assert row.code and row.message and len(row.message) < 1500
            orjson.dumps(render_error(row))
    return rows


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
field_names = st.sampled_from(
    [
        *("id", "prompt", "input_ids", "messages", "sampling_params", "namespace"),
        *("custom_id", "method", "url", "body", "zzz"),
    ]
)
known_values = st.sampled_from(
    [
        *("POST", "/v1/completions", "/v1/chat/completions", [1, 2], [[1]], ["a"], "text", 5),
        *([{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "x"}]}]),
        {"prompt": "x", "max_tokens": 3, "response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True},
        {"max_new_tokens": 3, "stop": ["x"]},
    ]
)
sampling_like = st.dictionaries(
    st.sampled_from([*SGLANG_FIELDS, "max_tokens", "prompt", "response_format", "stream"]),
    json_values | known_values,
    max_size=4,
)
records = st.dictionaries(field_names, known_values | sampling_like | json_values, max_size=5)

GOOD = b'{"id":"good-%d","prompt":"x"}'


@settings(max_examples=sized(100, 400), deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data: bytes) -> None:
    check_reading(data)


@settings(max_examples=sized(60, 200), deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b" ", b"{}", b"x", b"\x0c", BOM])))
def test_every_mix_of_line_ends_counts_lines_right(pieces: list[bytes]) -> None:
    check_reading(b"".join(pieces))


@settings(max_examples=sized(60, 200), deadline=None)
@given(st.lists(records, max_size=4))
def test_json_of_the_wrong_shape_never_raises(lines: list[dict[str, Any]]) -> None:
    check_reading(b"\n".join(json.dumps(line).encode() for line in lines))


column_maps = st.builds(
    lambda source, id_column, carry: ColumnMap(**source, id_column=id_column, carry=tuple(carry)),
    st.sampled_from(
        [
            {},
            {"template": "{prompt}-{zzz}"},
            {"template": "{body}"},
            {"prompt_column": "zzz"},
            {"messages_column": "zzz"},
        ]
    ),
    st.none() | field_names,
    st.lists(field_names, unique=True, max_size=3),
)


@settings(max_examples=sized(75, 300), deadline=None)
@given(st.lists(records, max_size=4), column_maps)
def test_no_columns_of_any_shape_raise(lines: list[dict[str, Any]], columns: ColumnMap) -> None:
    data = b"\n".join(json.dumps(line).encode() for line in lines)
    for row in check_reading(data, columns):
        if row.carried is not None:
            assert list(row.carried) == list(columns.carry)
            orjson.dumps(row.carried)


@settings(max_examples=sized(60, 200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 20))
def test_lines_of_any_length_count_as_one(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], max_line_len: int
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_LEN", max_line_len)
    for row in check_reading(b"\n".join(b"x" * length for length in lengths)):
        assert isinstance(row, BadRow)
        assert row.code == ("line_too_long" if lengths[row.line - 1] > max_line_len else "invalid_json")


@settings(max_examples=sized(50, 150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(records, st.integers(min_value=0), st.binary(max_size=3), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    )
)
def test_good_rows_around_mutated_ones_survive(
    mutations: list[tuple[dict[str, Any], int, bytes, int]],
) -> None:
    lines = [GOOD % 0]
    for number, (record, at, inserted, num_cut) in enumerate(mutations, start=1):
        whole = json.dumps(record).encode()
        at %= len(whole)
        mutated = whole[:at] + inserted + whole[at + num_cut :]
        lines += [mutated.replace(b"\n", b" "), GOOD % number]
    rows = check_reading(b"\n".join(lines))
    survivors = [row.given_id for row in rows if isinstance(row, Row)]
    expected = [f"good-{number}" for number in range(len(mutations) + 1)]
    assert [given_id for given_id in survivors if str(given_id).startswith("good-")] == expected


@settings(max_examples=sized(60, 200), deadline=None)
@given(sampling_like)
@example({"label_token_ids": [0]})
def test_sampling_that_is_read_is_within_its_ranges(mapping: dict[str, Any]) -> None:
    """Only a row that is scored or embedded may generate nothing."""
    line = json.dumps({"prompt": "x", "sampling_params": mapping}).encode()
    (row,) = check_reading(line)
    if isinstance(row, Row):
        sampling = row.request.sampling
        is_scored = bool(sampling.label_token_ids) or sampling.prompt_logprobs is not None
        least = 0 if is_scored or sampling.embed else 1
        assert sampling.max_new_tokens >= max(least, sampling.min_new_tokens)
        assert 0 < sampling.top_p <= 1
        assert 1 <= sampling.n <= 128
        assert "" not in sampling.stop


# ---- files of every format, damaged

NUM_TABLE_ROWS = 60
TABLE = pa.table(
    {
        "prompt": [f"hello {row % 7}" if row % 5 else None for row in range(NUM_TABLE_ROWS)],
        "input_ids": [None if row % 5 else [1, 2, row] for row in range(NUM_TABLE_ROWS)],
        "sampling_params": [{"n": 1, "temperature": 0.5, "stop": ["x"]}] * NUM_TABLE_ROWS,
        "when": pa.array(range(NUM_TABLE_ROWS), pa.timestamp("us")),
        "word": pa.array(["x", "y"] * (NUM_TABLE_ROWS // 2)).dictionary_encode(),
    }
)
JSON_LINES = b"".join(b'{"prompt":"hello %d"}\n' % (row * 7919) for row in range(NUM_TABLE_ROWS))


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer, row_group_size=25)
    return buffer.getvalue()


def arrow_bytes() -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, TABLE.schema) as stream:
        for start in range(0, NUM_TABLE_ROWS, 20):
            stream.write_table(TABLE.slice(start, 20))
    return buffer.getvalue()


FILES = {
    "in.parquet": parquet_bytes(),
    "in.arrow": arrow_bytes(),
    "in.jsonl.gz": gzip.compress(JSON_LINES),
    "in.jsonl.zst": zstandard.ZstdCompressor().compress(JSON_LINES),
}

edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 12), st.binary(max_size=8)), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=sized(100, 400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=edits)
def test_a_damaged_file_of_any_format_ends_in_a_message_or_gives_every_row(
    tmp_path: Path, name: str, edits: list[tuple[float, int, bytes]]
) -> None:
    """Rows come with their own numbers until the damage; a table without a message has all its rows."""
    data = FILES[name]
    for where, num_cut, inserted in edits:
        at = int(where * len(data))
        data = data[:at] + inserted + data[at + num_cut :]
    path = tmp_path / name
    path.write_bytes(data)
    rows: list[Row | BadRow] = []
    try:
        rows.extend(read_rows(path, defaults=SamplingParams(), columns=ColumnMap(carry=("when", "word"))))
    except (ConfigError, WorkloadError) as error:
        assert name in str(error)
    else:
        if "jsonl" not in name:
            assert len(rows) == NUM_TABLE_ROWS
    for position, row in enumerate(rows):
        assert (row.request.index if isinstance(row, Row) else row.index) == position
        assert row.line == position + 1 or "jsonl" in name
        orjson.dumps(row.carried)
        if isinstance(row, BadRow):
            orjson.dumps(render_error(row))


@settings(max_examples=sized(60, 200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=40)
    | (json_values | st.dictionaries(st.sampled_from(["_data_files", "_indices_files"]), json_values)).map(
        lambda state: json.dumps(state).encode()
    )
)
def test_no_state_of_a_saved_dataset_raises(tmp_path: Path, state: bytes) -> None:
    (tmp_path / "state.json").write_bytes(state)
    with pytest.raises(ConfigError, match=r"-i "):
        read_rows(tmp_path, defaults=SamplingParams())
