"""Parquet files and saved Hugging Face datasets read like the same rows in JSON lines."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from batchllm.dataset import BadRow, ColumnMap, Row, open_input, read_rows, render_error, tables
from batchllm.errors import ConfigError, WorkloadError
from batchllm.request import SamplingParams
from tests.sizes import sized

HELLO = [{"role": "user", "content": "hi"}]


def write_parquet(table: pa.Table, path: Path) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(table, path, row_group_size=700)
    return path


def write_parquet_folder(table: pa.Table, path: Path) -> Path:
    path.mkdir()
    half = len(table) // 2
    pq.write_table(table.slice(0, half), path / "part-0.parquet")
    pq.write_table(table.slice(half), path / "part-1.parquet")
    (path / "_metadata.parquet").write_bytes(b"not to be read")
    return path


def write_hf(table: pa.Table, path: Path) -> Path:
    datasets.Dataset(table).save_to_disk(path, num_shards=2 if len(table) > 1 else 1)
    return path


WRITERS: list[Callable[[pa.Table, Path], Path]] = [write_parquet, write_parquet_folder, write_hf]
every_format = pytest.mark.parametrize("write", WRITERS)


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def read(path: Path, **columns: Any) -> list[Row | BadRow]:
    return list(read_rows(path, defaults=SamplingParams(), columns=ColumnMap(**columns) if columns else None))


def read_jsonl(records: list[dict[str, Any]], **columns: Any) -> list[Row | BadRow]:
    data = b"\n".join(map(orjson.dumps, records))
    return list(read_rows(io.BytesIO(data), defaults=SamplingParams(), columns=ColumnMap(**columns)))


RECORDS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "hi", "sampling_params": {"n": 2, "stop": ["x"]}, "task": "t", "other": 1},
    {"id": "b", "input_ids": [1, 2, 3], "sampling_params": {"temperature": 0.5}},
    {"id": "c", "messages": [*HELLO, {"role": "assistant", "content": "yes"}], "namespace": "n"},
    {"prompt": "no id", "expected_new_tokens": 5},
    {"id": "nothing"},
    {"id": "two", "prompt": "x", "input_ids": [4]},
    {"custom_id": "o", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
]


@every_format
def test_every_format_gives_the_rows_of_the_json_lines(write: Callable[..., Path], tmp_path: Path) -> None:
    """Null columns and null fields of structs are as if they were not there."""
    rows = read(write(pa.Table.from_pylist(RECORDS, schema=SCHEMA), tmp_path / "in"))
    assert rows == read_jsonl(RECORDS)
    assert [type(row) for row in rows] == [Row] * 4 + [BadRow] * 2 + [Row]


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})),
        "sampling_params": pa.struct({"n": pa.int64(), "stop": pa.list_(pa.string()), "temperature": pa.float64()}),
        "namespace": pa.string(),
        "task": pa.string(),
        "expected_new_tokens": pa.int16(),
        "other": pa.int64(),
        "custom_id": pa.string(),
        "method": pa.string(),
        "url": pa.string(),
        "body": pa.struct({"prompt": pa.string(), "max_tokens": pa.int64()}),
    }
)

texts = st.text(st.characters(codec="utf-8"), max_size=6)
records = st.fixed_dictionaries(
    {},
    optional={
        "id": texts,
        "prompt": texts,
        "input_ids": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
        "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "bot"]), "content": texts})),
        "sampling_params": st.fixed_dictionaries({}, optional={"n": st.integers(0, 4), "temperature": st.floats(0, 3)}),
        "task": texts,
        "other": st.integers(0, 9),
    },
)


@settings(max_examples=sized(30, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, min_size=1, max_size=5))
def test_any_rows_read_alike_from_parquet_and_json_lines(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    path = write_parquet(pa.Table.from_pylist(records, schema=SCHEMA), tmp_path_factory.mktemp("in") / "in")
    assert read(path, carry=("other",)) == read_jsonl(records, carry=("other",))


@every_format
def test_rows_are_numbered_over_all_files_and_batches(write: Callable[..., Path], tmp_path: Path) -> None:
    texts = [f"p{number}" if number % 5 else "" for number in range(2500)]
    rows = read(write(pa.table({"text": texts}), tmp_path / "in"), prompt_column="text")
    assert [row.line for row in rows] == list(range(1, 2501))
    assert [row.index for row in rows if isinstance(row, BadRow)] == list(range(0, 2500, 5))
    assert [row.request.prompt for row in rows if isinstance(row, Row)] == [text for text in texts if text]


@every_format
def test_columns_are_named_and_carried(write: Callable[..., Path], tmp_path: Path) -> None:
    table = pa.table({"key": [7, 8], "text": ["x", None], "label": ["l", None], "unread": [b"\xff", b""]})
    first, second = read(write(table, tmp_path / "in"), id_column="key", template="Say {text}", carry=("label",))
    assert isinstance(first, Row) and isinstance(second, BadRow)
    assert (first.given_id, first.request.prompt, first.carried) == (7, "Say x", {"label": "l"})
    assert (second.given_id, second.code, second.carried) == (8, "missing_column", {"label": None})


@every_format
def test_openai_rows_are_read_as_such_with_a_body_of_either_form(write: Callable[..., Path], tmp_path: Path) -> None:
    body = {"messages": HELLO, "max_tokens": 5}
    given = {"custom_id": ["a", "b"], "method": ["POST"] * 2, "url": ["/v1/chat/completions"] * 2}
    for number, bodies in enumerate(([body, {"messages": HELLO}], [json.dumps(body)] * 2)):
        rows = read(write(pa.table({**given, "body": bodies}), tmp_path / f"in{number}"))
        assert [row.kind for row in rows if isinstance(row, Row)] == ["chat", "chat"]
        assert [row.given_id for row in rows] == ["a", "b"]


TYPES: list[tuple[pa.Array, object]] = [
    (pa.array([b"\xff\x00"]), "/wA="),
    (pa.array([decimal.Decimal("1.10")]), "1.10"),
    (pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5)]), "2026-01-02T03:04:05"),
    (pa.array([1], pa.timestamp("ns")), "1970-01-01T00:00:00.000000001"),
    (pa.array([datetime.date(2026, 1, 2)]), "2026-01-02"),
    (pa.array([datetime.time(3, 4)]), "03:04:00"),
    (pa.array([datetime.timedelta(seconds=90)]), 90.0),
    (pa.array([math.nan]), None),
    (pa.array([math.inf]), None),
    (pa.array([0.5], pa.float16()), 0.5),
    (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    (pa.array(["a"]).dictionary_encode(), "a"),
    (pa.array(["a"], pa.string_view()), "a"),
    (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())), [["k", 1]]),
    (pa.array([{"a": None, "b": {"c": b"x", "d": [None, 1.0]}}]), {"b": {"c": "eA==", "d": [None, 1.0]}}),
    (pa.array([None], pa.null()), None),
]


@pytest.mark.parametrize(("column", "value"), TYPES, ids=lambda given: str(getattr(given, "type", "")))
def test_values_that_json_does_not_have_are_carried_as_it_has_them(
    tmp_path: Path, column: pa.Array, value: object
) -> None:
    path = write_parquet(pa.table({"prompt": ["x"], "it": column}), tmp_path / "in")
    (row,) = read(path, carry=("it",))
    assert row.carried == {"it": value}
    assert orjson.loads(orjson.dumps(row.carried)) == row.carried


def test_a_value_out_of_json_s_reach_is_a_bad_row_and_its_neighbours_run(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x", "y", "z"], "when": pa.array([0, 2**62, 1], pa.timestamp("us"))})
    rows = read(write_parquet(table, tmp_path / "in"), carry=("when",))
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert isinstance(rows[1], BadRow) and (rows[1].code, rows[1].param) == ("not_json", "when")
    assert isinstance(rows[2], Row) and rows[2].carried == {"when": "1970-01-01T00:00:00.000001"}


def test_text_that_is_not_utf8_is_a_bad_row_and_its_neighbours_run(tmp_path: Path) -> None:
    broken = pa.array([b"x", b"\xff", b"z"]).view(pa.string())
    rows = read(write_parquet(pa.table({"prompt": broken}), tmp_path / "in"))
    assert [row.code if isinstance(row, BadRow) else "good" for row in rows] == ["good", "not_json", "good"]


# ---- what is refused


@every_format
def test_a_column_that_is_not_there_is_refused_at_once_naming_those_that_are(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(pa.table({"text": ["x", "y"], "label": [1, 2]}), tmp_path / "in")
    for flag, columns in (
        ("--prompt-column", {"prompt_column": "txt"}),
        ("--messages-column", {"messages_column": "txt"}),
        ("--template", {"template": "{text}{txt}"}),
        ("--id-column", {"id_column": "txt", "prompt_column": "text"}),
        ("--carry", {"carry": ("txt",), "prompt_column": "text"}),
    ):
        with pytest.raises(ConfigError, match=rf"{flag}: -i .*in.* has no column 'txt'; it has 'label', 'text'"):
            read_rows(path, defaults=SamplingParams(), columns=ColumnMap(**columns))
    with pytest.raises(ConfigError, match="name one with --prompt-column"):
        read_rows(path, defaults=SamplingParams())


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.{suffix}"
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(ConfigError, match=rf"in\.{suffix} cannot be read as a table: two of its columns have one name"):
        read(path)


def test_a_table_without_rows_is_a_workload_error_naming_it(tmp_path: Path) -> None:
    path = write_parquet(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in")
    with pytest.raises(WorkloadError, match=r"in\.parquet: has no rows"):
        read(path)


def test_a_dataset_of_several_splits_is_refused_naming_them(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"prompt": ["x"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"several splits; give that of one: test, train"):
        read(tmp_path / "in")
    assert len(read(tmp_path / "in" / "train")) == 1


def test_a_dataset_with_an_index_over_its_files_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write_hf(pa.table({"prompt": ["x", "y"]}), tmp_path / "in")
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(ConfigError, match="flatten_indices"):
        read(path)


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"_data_files": []}',
        '{"_data_files": [3]}',
        '{"_data_files": [{"filename": "../x.arrow"}]}',
    ],
)
def test_a_dataset_whose_state_is_broken_is_a_config_error(tmp_path: Path, state: str) -> None:
    path = write_hf(pa.table({"prompt": ["x"]}), tmp_path / "in")
    (path / "state.json").write_text(state)
    with pytest.raises(ConfigError, match=r"-i .*state\.json"):
        read(path)


def test_a_dataset_file_that_is_gone_is_a_config_error(tmp_path: Path) -> None:
    path = write_hf(pa.table({"prompt": ["x", "y"]}), tmp_path / "in")
    next(path.glob("*.arrow")).unlink()
    with pytest.raises(ConfigError, match=r"-i .*arrow cannot be read"):
        read(path)


def write_arrow(path: Path, num_batches: int = 4) -> list[int]:
    """A stream of batches, and where each of them ends."""
    ends = []
    table = pa.table({"prompt": [f"prompt {number}" for number in range(100)]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for _ in range(num_batches):
            stream.write_table(table)
            ends.append(file.tell())
    return ends


def test_an_arrow_file_that_was_cut_between_two_batches_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.arrow"
    ends = write_arrow(path)
    assert len(read(path)) == 400
    path.write_bytes(path.read_bytes()[: ends[1]])
    with pytest.raises(ConfigError, match=r"in\.arrow cannot be read as a table: it was not written to its end"):
        read(path)


def test_an_arrow_file_with_an_end_in_its_middle_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.arrow"
    ends = write_arrow(path)
    data = bytearray(path.read_bytes())
    data[ends[1] + 4 : ends[1] + 8] = bytes(4)  # the length of the third batch
    path.write_bytes(data)
    with pytest.raises(WorkloadError, match=r"in\.arrow stopped after 200 rows: it ends before its file does"):
        read(path)


def test_an_arrow_file_that_is_corrupt_midway_stops_with_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "in.arrow"
    ends = write_arrow(path)
    data = bytearray(path.read_bytes())
    data[ends[1] + 8 : ends[1] + 200] = bytes(192)
    path.write_bytes(data)
    rows = read_rows(path, defaults=SamplingParams())
    with pytest.raises(WorkloadError, match=r"in\.arrow stopped after 200 rows"):
        for number, row in enumerate(rows):
            assert isinstance(row, Row) and number < 200


@pytest.mark.parametrize("num_kept", [0, 3, 4, 50, -1])
def test_a_parquet_file_that_is_cut_is_a_config_error(tmp_path: Path, num_kept: int) -> None:
    path = write_parquet(pa.table({"prompt": ["x"] * 100}), tmp_path / "in")
    path.write_bytes(path.read_bytes()[:num_kept])
    with pytest.raises(ConfigError, match=r"-i .*in\.parquet cannot be read as a table"):
        read(path)


def write_damaged_parquet(path: Path, column: int) -> Path:
    """Four blocks of 1024 rows; in the third one, a letter of that column is another one."""
    texts = [f"prompt {number}" for number in range(4096)]
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(pa.table({"prompt": texts, "unread": texts}), path, row_group_size=1024, **options)
    at = pq.ParquetFile(path).metadata.row_group(2).column(column).data_page_offset
    data = path.read_bytes()
    at = data.index(b"prompt", at + 500)  # behind the header of the page
    path.write_bytes(data[:at] + b"q" + data[at + 1 :])
    return path


def test_a_parquet_page_that_is_not_what_was_written_stops_with_the_rows_before(tmp_path: Path) -> None:
    """Where the file has checksums: without them, a letter that has changed is a letter."""
    rows = read_rows(write_damaged_parquet(tmp_path / "in.parquet", 0), defaults=SamplingParams())
    assert [next(rows).line for _ in range(2048)] == list(range(1, 2049))
    with pytest.raises(WorkloadError, match=r"in\.parquet stopped after 2048 rows"):
        next(rows)


def test_columns_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    assert len(read(write_damaged_parquet(tmp_path / "in.parquet", 1))) == 4096
    assert len(read(write_damaged_parquet(tmp_path / "in.parquet", 0), prompt_column="unread")) == 4096


def test_an_error_line_of_a_table_s_row_can_be_written(tmp_path: Path) -> None:
    (row,) = read(write_parquet(pa.table({"prompt": [None], "b": [b"x"]}), tmp_path / "in"), carry=("b",))
    assert isinstance(row, BadRow)
    assert orjson.loads(orjson.dumps(render_error(row)))["carried"] == {"b": "eA=="}


def test_a_forced_format_that_is_not_the_file_s_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt":"x"}\n')
    for forced in ("parquet", "hf"):
        source = open_input(str(path), spool_folder=None, input_format=forced)
        with pytest.raises(ConfigError, match=r"in\.jsonl cannot be read as a table"):
            read_rows(source, defaults=SamplingParams())


TEXTS = pa.table({"id": ["a", "b"], "prompt": ["x, y", "42"], "note": [None, "n"]})


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
@pytest.mark.parametrize("name", ["rows.feather", "rows.arrow", "rows"])
def test_feather_and_arrow_files_are_tables_whatever_their_names(tmp_path: Path, name: str, compression: str) -> None:
    feather.write_feather(TEXTS, tmp_path / name, compression=compression, chunksize=1)
    assert prompts_of(tmp_path / name) == [("a", "x, y"), ("b", "42")]
    (tmp_path / "cut").write_bytes((tmp_path / name).read_bytes()[:-10])
    with pytest.raises(ConfigError, match="cut: cut cannot be read as a table"):
        prompts_of(tmp_path / "cut")


@pytest.mark.parametrize(
    "data",
    [
        b'id,prompt\na,"x, y"\nb,42\n',
        b'\xef\xbb\xbfid,prompt\r\na,"x, y"\r\nb,42',
        b'prompt,other,id\n"x, y",1,a\n42,,b\n',
    ],
)
def test_cells_of_a_csv_file_are_texts(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(data)
    assert prompts_of(tmp_path / "rows.csv") == [("a", "x, y"), ("b", "42")]


def test_cells_of_a_csv_file_may_have_several_lines_or_be_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_bytes(b'id\tprompt\na\t"one\n\ntwo"\nb\t\n')
    first, second = read_rows(tmp_path / "rows.tsv", defaults=SamplingParams())
    assert isinstance(first, Row) and first.request.prompt == "one\n\ntwo"
    assert isinstance(second, BadRow) and second.code == "missing_prompt"


@pytest.mark.parametrize("name", ["my, id", 'the "id"', "two\nlines", "\u00e9"])
def test_cells_are_texts_whatever_the_name_of_their_column_has_in_it(tmp_path: Path, name: str) -> None:
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([[], ["n", "prompt", name], ["1", "a", "007"], ["2", "b", "008"]])
    columns = ColumnMap(id_column=name)
    rows = list(read_rows(tmp_path / "rows.csv", defaults=SamplingParams(), columns=columns))
    assert [row.given_id for row in rows] == ["007", "008"]


def test_cells_of_a_compressed_csv_file_are_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"id\tprompt\n007\t1.50\n"))
    source = open_input(str(tmp_path / "rows.csv.gz"), spool_folder=None, input_format="csv")
    (row,) = read_rows(source, defaults=SamplingParams())
    assert isinstance(row, Row) and (row.given_id, row.request.prompt) == ("007", "1.50")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_of_a_row_are_text_and_carried_ones_are_not(tmp_path: Path, kind: pa.DataType) -> None:
    """Spark writes texts as bytes: a model must not be asked base64."""
    texts = pa.array([b"caf\xc3\xa9", b"\xff"], kind)
    chats = pa.array([[{"role": b"user", "content": b"Hi"}]] * 2, pa.list_(pa.struct({"role": kind, "content": kind})))
    path = write_parquet(pa.table({"prompt": texts, "more": texts, "chat": chats}), tmp_path / "in")
    good, broken = read(path, carry=("more",))
    assert isinstance(good, Row) and (good.request.prompt, good.carried) == ("café", {"more": "Y2Fmw6k="})
    assert isinstance(broken, BadRow) and (broken.code, broken.param) == ("not_json", "prompt")
    chat, _ = read(path, messages_column="chat")
    assert isinstance(chat, Row) and chat.request.messages == [{"role": "user", "content": "Hi"}]


def test_names_of_columns_that_never_end_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'id,"prompt\n' + b"x" * 200_000)
    with pytest.raises(ConfigError, match=r"rows.csv cannot be read as a table: the names of its columns"):
        prompts_of(tmp_path / "rows.csv")


@given(
    st.lists(st.lists(st.sampled_from(["x", "", "two\nlines", "a, b", 'say "x"']), min_size=1, max_size=4), min_size=1)
)
@settings(deadline=None)
def test_a_csv_row_with_another_number_of_cells_fails_by_itself(rows: list[list[str]]) -> None:
    """Wherever it is, in a file that is read in blocks of two rows or so, those beside it keep their numbers."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder, "rows.csv")
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["id", "prompt"], *(["n", *cells] for cells in rows)])
        patch.setattr(tables, "_CSV_BLOCK", 64)
        found = list(read_rows(path, defaults=SamplingParams(), columns=ColumnMap(id_column="prompt", template="{id}")))
    assert [row.line for row in found] == list(range(1, len(rows) + 1))
    for row, cells in zip(found, rows, strict=True):
        if len(cells) != 1:
            assert isinstance(row, BadRow) and row.code == "wrong_number_of_cells"
            assert f"has {1 + len(cells)} cells, and the table 2 columns" in row.message
        else:
            assert row.given_id == (cells[0] or None)


def prompts_of(path: Path) -> list[tuple[Any, Any]]:
    rows = list(read_rows(path, defaults=SamplingParams()))
    return [(row.given_id, row.request.prompt) if isinstance(row, Row) else (row.given_id, row.message) for row in rows]


def test_messages_as_a_struct_of_lists_are_messages(tmp_path: Path) -> None:
    """So `datasets` writes a sequence of a dict."""
    columns = {"role": ["system", "user"], "content": ["Be short.", "Hi"], "name": [None, "me"]}
    pq.write_table(pa.table({"id": ["a"], "messages": [columns]}), tmp_path / "t.parquet")
    (row,) = read_rows(tmp_path / "t.parquet", defaults=SamplingParams())
    assert isinstance(row, Row)
    assert row.request.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi", "name": "me"},
    ]


@pytest.mark.parametrize(
    "rest", [b'b,"x\n', b'b,"x', b'b,"x\nc,y\nd,z\n', b'b,"x\nc,y\n\n', b'b,1,"x\nc,y\n', b'b,"x\r\nc,y']
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_csv_file_that_ends_within_quotes_is_refused_where_they_hide_rows(
    tmp_path: Path, rest: bytes, suffix: str
) -> None:
    """And only there: one line that lacks its last quote hides nothing."""
    path, table = tmp_path / f"rows.csv{suffix}", b'id,prompt\na,"p\nq"\n' + rest
    path.write_bytes(gzip.compress(table) if suffix else table)
    source = open_input(str(path), spool_folder=None, input_format="csv")
    if b"\n" in rest.rstrip(b"\n") or rest.endswith(b"\n"):
        with pytest.raises(WorkloadError, match=r"rows.csv.*stopped after .*a quote that opens in its last row"):
            list(read_rows(source, defaults=SamplingParams()))
    else:
        rows = list(read_rows(source, defaults=SamplingParams()))
        assert [row.given_id for row in rows] == ["a", "b"]


def test_a_long_row_that_ends_within_quotes_is_refused_whatever_parts_its_cells(tmp_path: Path) -> None:
    """It has one cell more than the others, and is longer than Python's reader takes."""
    rows = "".join(f"b{i}\tx\n" for i in range(40_000))
    (tmp_path / "rows.csv").write_text(f'id\tprompt\na\tp\nb\t1\t"x\n{rows}')
    with pytest.raises(WorkloadError, match="a quote that opens in its last row"):
        prompts_of(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "end", [b'b,"x\ny"', b'b,"x\ny"\n\n', b'"b\nc",y\n', b'b,"x\n"\r\n', b'b,"x\ny",z\n', b'b,5" wide\n']
)
def test_a_csv_file_whose_quotes_close_is_read_to_its_end(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(b"id,prompt\na,p\n" + end)
    assert len(list(read_rows(tmp_path / "rows.csv", defaults=SamplingParams()))) == 2


def test_cells_of_a_csv_file_that_are_json_are_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        'id,input_ids,sampling_params,expected_new_tokens\na,"[5, 6]","{""temperature"": 0}",3\n'
    )
    (row,) = read_rows(tmp_path / "rows.csv", defaults=SamplingParams())
    assert isinstance(row, Row), row
    assert (list(row.request.input_ids or ()), row.request.sampling.temperature) == ([5, 6], 0)
    assert row.request.expected_new_tokens == 3
