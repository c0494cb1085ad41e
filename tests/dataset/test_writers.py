"""Writers: every format holds every line in order; a file is whole or not there; refusals are told, not traced."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.registry import known_implementations
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import parquet_table
from batchllm.dataset.writers import (
    BUFFER_BYTES,
    can_append,
    check_output,
    check_writable,
    is_same_output,
    open_appender,
    open_writer,
)
from batchllm.errors import BatchLLMError, ConfigError
from tests.disk_limits import files_may_have

USAGE = {"prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": 3}
ENDINGS = ("jsonl", "txt", "jsonl.gz", "jsonl.zst", "parquet")


def plain(row_id: Any, text: str = "t", **more: Any) -> bytes:
    answer = {"text": text, "output_ids": [1, 2, 3], "finish_reason": "stop", "usage": USAGE}
    return orjson.dumps({"id": row_id, **answer, **more})


def read_back(path: Path) -> list[bytes]:
    if path.suffix == ".parquet":
        return [record.encode() for record in pq.read_table(path)["record"].to_pylist()]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return data.splitlines()


def write_all(path: Path | str, lines: list[bytes]) -> None:
    with open_writer(str(path)) as writer:
        for line in lines:
            writer.write(line)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def rows_of(path: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    write_all(path, lines)
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


# ---- All formats


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=30))
def test_each_format_gives_back_each_line_in_order(ending: str, texts: list[str]) -> None:
    lines = [plain(number, text) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"out.{ending}")
        write_all(path, lines)
        assert read_back(path) == lines
        assert names_in(path.parent) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_more_than_a_buffer_and_a_batch_comes_through(ending: str, tmp_path: Path) -> None:
    lines = [plain(number, "x" * 60) for number in range(2 * parquet_table.BATCH_ROWS + 1)]
    assert sum(map(len, lines)) > 2 * BUFFER_BYTES
    write_all(tmp_path / f"out.{ending}", lines)
    assert read_back(tmp_path / f"out.{ending}") == lines


@pytest.mark.parametrize("ending", ENDINGS)
def test_same_lines_give_the_same_bytes(ending: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_all(tmp_path / f"{name}.{ending}", [plain(1), plain(2)])
    assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"other.{ending}").read_bytes()


def test_a_gz_file_tells_no_time(tmp_path: Path) -> None:
    write_all(tmp_path / "out.jsonl.gz", [plain(1)])
    assert (tmp_path / "out.jsonl.gz").read_bytes()[4:8] == bytes(4)


@pytest.mark.parametrize("ending", ENDINGS)
def test_until_closed_the_old_file_stays(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{ending}"
    path.write_text("before\n")
    writer = open_writer(str(path))
    for number in range(10_000):
        writer.write(plain(number))
    assert path.read_text() == "before\n"
    writer.close()
    writer.close()
    assert len(read_back(path)) == 10_000
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_exception_leaves_what_was_there_and_nothing_else(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{ending}"
    path.write_text("before\n")
    with pytest.raises(KeyError), open_writer(str(path)) as writer:
        for number in range(10_000):
            writer.write(plain(number))
        raise KeyError("job")
    assert path.read_text() == "before\n"
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_is_told_and_the_old_file_stays(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{ending}"
    path.write_text("before\n")
    digits = random.Random(0)
    told = pytest.raises(BatchLLMError, match=rf"--errors .*out\.{ending}: .*too large.*kept in the job's folder")
    with files_may_have(100_000), told, open_writer(str(path), flag="--errors") as writer:
        for number in range(20_000):
            writer.write(plain(number, str(digits.getrandbits(200))))
    assert path.read_text() == "before\n"
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_that_is_gone_is_told(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(BatchLLMError, match=r"-o .*No such file.*kept in the job's folder"):
        open_writer(str(folder / f"out.{ending}"))
    folder.mkdir()
    writer = open_writer(str(folder / f"out.{ending}"))
    writer.write(plain(1))
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()
    with pytest.raises(BatchLLMError, match=r"-o .*No such file.*kept in the job's folder"):
        writer.close()


def test_a_link_keeps_pointing_to_the_file_written(tmp_path: Path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(real)
    write_all(link, [plain(1)])
    assert link.is_symlink()
    assert read_back(real) == [plain(1)]


# ---- Elsewhere


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_url_takes_every_format(ending: str, tmp_path: Path) -> None:
    lines = [plain(number) for number in range(5000)]
    for url in (f"memory://writers/out.{ending}", f"file://{tmp_path}/out.{ending}"):
        write_all(url, lines)
        copy = tmp_path / f"copy.{ending}"
        with fsspec.open(url) as stored:
            copy.write_bytes(stored.read())
        assert read_back(copy) == lines


def test_an_abandoned_object_keeps_its_old_content_where_the_file_system_can(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("before\n")
    writer = open_writer(f"file://{path}")
    writer.write(plain(1, "x" * BUFFER_BYTES))
    writer.abandon()
    writer.close()
    assert path.read_text() == "before\n"
    assert names_in(tmp_path) == ["out.jsonl"]


def test_what_a_remote_file_system_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(BatchLLMError, match=r"-o file://.*: cannot be written: .*kept in the job's folder"):
        write_all(f"file://{tmp_path}/none/out.jsonl", [plain(1)])


def test_standard_output_gets_lines_and_stays_open(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for _ in range(2):
        write_all("-", [plain(1), plain(2)])
    assert capfdbinary.readouterr().out.splitlines() == 2 * [plain(1), plain(2)]


def test_a_reader_that_has_gone_is_a_broken_pipe() -> None:
    script = """
import sys
from batchllm.dataset.writers import open_writer
try:
    with open_writer("-") as writer:
        while True:
            writer.write(b"{}")
except BrokenPipeError:
    sys.stderr.write("broken pipe")
    sys.stderr.flush()
    import os
    os._exit(3)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"{}\n"
    process.stdout.close()
    assert process.stderr.read() == b"broken pipe"
    assert process.wait() == 3
    process.stderr.close()


# ---- Growing files


def test_appended_lines_can_be_read_once_flushed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(plain(0) + b"\n")
    with open_appender(str(path)) as writer:
        for number in (1, 2):
            writer.write(plain(number))
            writer.flush()
            assert read_back(path) == [plain(before) for before in range(number + 1)]


def test_a_growing_file_on_a_full_disk_is_told() -> None:
    writer = open_appender("/dev/full", flag="--errors")
    writer.write(plain(1))
    with pytest.raises(BatchLLMError, match=r"--errors /dev/full: cannot be written: No space left on device; .*kept"):
        writer.flush()
    writer.abandon()


def test_only_plain_local_files_and_standard_output_grow() -> None:
    assert can_append("out.jsonl") and can_append("-") and can_append("gz") and can_append("out")
    assert not any(map(can_append, ("out.jsonl.gz", "out.ZST", "out.parquet", "s3://bucket/out.jsonl")))


# ---- Parquet


def test_a_plain_line_has_its_values_as_columns(tmp_path: Path) -> None:
    line = plain("a", "text")
    assert rows_of(tmp_path / "out.parquet", [line]) == [
        {
            "id": "a",
            "text": "text",
            "finish_reason": "stop",
            "output_ids": [1, 2, 3],
            "prompt_tokens": 5,
            "cached_tokens": 2,
            "completion_tokens": 3,
            "error_code": None,
            "error_message": None,
            "record": line.decode(),
        }
    ]


def test_a_failed_plain_line_has_its_error_as_columns(tmp_path: Path) -> None:
    error = {"code": "too_long", "message": "is long", "line": 3, "param": None}
    (row,) = rows_of(tmp_path / "out.parquet", [orjson.dumps({"id": None, "error": error})])
    assert (row["id"], row["error_code"], row["error_message"]) == (None, "too_long", "is long")
    assert row["text"] is row["output_ids"] is row["prompt_tokens"] is None


def test_of_several_choices_the_first_is_shown(tmp_path: Path) -> None:
    choices = [{"index": i, "text": f"t{i}", "output_ids": [i], "finish_reason": "length"} for i in range(2)]
    (row,) = rows_of(tmp_path / "out.parquet", [orjson.dumps({"id": 7, "choices": choices, "usage": USAGE})])
    assert (row["id"], row["text"], row["output_ids"], row["prompt_tokens"]) == ("7", "t0", [0], 5)


@pytest.mark.parametrize("choice", [{"message": {"role": "assistant", "content": "hi"}}, {"text": "hi"}])
def test_openai_lines_have_the_same_columns(choice: dict[str, Any], tmp_path: Path) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    body = {"choices": [{"index": 0, **choice, "finish_reason": "stop"}], "usage": usage}
    failed = {"error": {"message": "line 2: no", "code": "bad"}}
    lines = [
        orjson.dumps({"id": "batch_req_1", "custom_id": name, "response": {"status_code": 0, "body": b}, "error": None})
        for name, b in (("good", body), ("bad", failed))
    ]
    good, bad = rows_of(tmp_path / "out.parquet", lines)
    assert (good["id"], good["text"], good["finish_reason"], good["output_ids"]) == ("good", "hi", "stop", None)
    assert (good["prompt_tokens"], good["cached_tokens"], good["completion_tokens"]) == (5, 2, 3)
    assert (bad["id"], bad["text"], bad["error_code"], bad["error_message"]) == ("bad", None, "bad", "line 2: no")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, 2**60], pa.int64()),
        ([1, 2.5, None], pa.float64()),
        ([True, None, False], pa.bool_()),
        (["a", None, ""], pa.string()),
        ([None, None, None], pa.string()),
    ],
)
def test_carried_columns_of_one_kind_keep_it(values: list[Any], kind: pa.DataType, tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    rows = rows_of(path, [plain(number, carried={"c": value}) for number, value in enumerate(values)])
    assert pq.read_schema(path).field("c").type == kind
    assert [row["c"] for row in rows] == values


@pytest.mark.parametrize("values", [[1, "1"], [True, 1], [[1], [2]], [{"a": 1}, None], [2**60, 0.5], [2**63, 1]])
def test_carried_columns_of_mixed_kinds_are_json_text(values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    rows = rows_of(path, [plain(number, carried={"c": value}) for number, value in enumerate(values)])
    assert pq.read_schema(path).field("c").type == pa.string()
    assert [None if row["c"] is None else json.loads(row["c"]) for row in rows] == values


def test_the_type_of_a_carried_column_is_that_of_its_last_batch_too(tmp_path: Path) -> None:
    """A column that comes late, and one that changes its kind late, are known from the first row on."""
    carried: list[dict[str, Any]] = [{"n": 1}] * parquet_table.BATCH_ROWS + [{"n": "x", "late": 1.5}]
    rows = rows_of(tmp_path / "out.parquet", [plain(0, carried=values) for values in carried])
    assert (rows[0]["n"], rows[0]["late"]) == ("1", None)
    assert (rows[-1]["n"], rows[-1]["late"]) == ('"x"', 1.5)


def test_a_carried_column_never_hides_one_of_ours_or_another(tmp_path: Path) -> None:
    carried = {"text": "question", "carried.text": "other", "record": 1}
    (row,) = rows_of(tmp_path / "out.parquet", [plain(1, "answer", carried=carried)])
    assert (row["text"], row["carried.carried.text"], row["carried.text"]) == ("answer", "question", "other")
    assert row["carried.record"] == 1


def test_a_text_that_speaks_of_carried_columns_carries_none(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "out.parquet", [plain(1, '"carried"'), plain(2, carried={"c": 1})])
    assert [row["c"] for row in rows] == [None, 1]


def test_no_rows_give_a_table_without_rows(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "out.parquet", []) == []


# ---- check_output


def test_every_name_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    """A name is as long as the file system allows, in bytes; longer ones are refused before anything runs."""
    for name in ("o" * 255, "ö" * 127):
        check_output(str(tmp_path / name), "-o")
        with open_writer(str(tmp_path / name)) as writer:
            writer.write(plain(0))
        assert read_back(tmp_path / name) == [plain(0)]
    with pytest.raises(ConfigError, match=r"-o .*: the name is too long for its file system; shorten it"):
        check_output(str(tmp_path / ("o" * 256)), "-o")


def test_outputs_are_checked_without_a_trace(tmp_path: Path) -> None:
    check_output("-", "-o")
    check_output("memory://somewhere/out.jsonl", "-o")
    check_output(str(tmp_path / "out.parquet"), "-o")
    assert names_in(tmp_path) == []
    with pytest.raises(ConfigError, match=r"--errors .*create it first"):
        check_output(str(tmp_path / "none" / "out.jsonl"), "--errors")


def test_urls_that_cannot_be_written_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"-o abc://x: no file system is known as abc://"):
        check_output("abc://x", "-o")
    with pytest.raises(ConfigError, match=r"-o https://x/y: https:// can be read, not written"):
        check_output("https://x/y", "-o")
    with pytest.raises(ConfigError, match="is the input itself"):
        check_output("memory://x", "-o", input_path="memory://x")


def test_a_file_system_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"class": "package_that_is_not_there.FileSystem", "err": "Install package_that_is_not_there"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(ConfigError, match=r"absent:// needs a package .*Install package_that_is_not_there"):
        check_output("absent://x", "-o")


def test_two_names_of_one_output_are_the_same(tmp_path: Path) -> None:
    one = tmp_path / "out.jsonl"
    one.write_text("")
    (tmp_path / "link.jsonl").symlink_to(one)
    assert is_same_output(str(one), str(tmp_path / "link.jsonl")) and is_same_output("-", "-")
    assert not is_same_output(str(one), str(tmp_path / "other.jsonl")) and not is_same_output("-", "memory://x")


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl.BZ2", "out.feather", "out.pq"])
def test_a_name_of_another_format_is_refused_and_not_given_to_json_lines(tmp_path: Path, name: str) -> None:
    for path in (str(tmp_path / name), f"memory://{name}"):
        with pytest.raises(ConfigError, match=r"--errors .*is not written; give .jsonl, .jsonl.gz, .jsonl.zst or"):
            check_output(path, "--errors")
    check_output(str(tmp_path / "out.json"), "-o")


# ---- check_writable


def test_a_file_that_is_not_for_answers_is_not_written_to_standard_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--report -: cannot be standard output; give a file name"):
        check_writable("-", "--report")
    check_writable(tmp_path / "-", "--report")


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.jsonl", "-o")
    assert names_in(tmp_path) == []
    old = tmp_path / "old.jsonl"
    old.write_text("content\n")
    check_writable(old, "-o")
    assert old.read_text() == "content\n"


def test_unwritable_paths_are_refused_naming_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"-o .*: there is no directory .*create it first"):
        check_writable(tmp_path / "none" / "out.jsonl", "-o")
    with pytest.raises(ConfigError, match=r"--errors .*: is a directory"):
        check_writable(tmp_path, "--errors")
    with pytest.raises(ConfigError, match="not a regular file"):
        check_writable("/dev/null", "-o")


def test_a_file_system_that_refuses_is_found_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"-o /proc/out\.jsonl: cannot write in /proc"):
        check_writable("/proc/out.jsonl", "-o")


def test_a_read_only_file_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("keep\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write all
    with pytest.raises(ConfigError, match="is read-only"):
        check_writable(out, "-o")


def test_writing_over_the_input_is_refused_under_any_name(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    (tmp_path / "hard.jsonl").hardlink_to(source)
    (tmp_path / "soft.jsonl").symlink_to(source)
    for name in ("in.jsonl", "hard.jsonl", "soft.jsonl", "../" + tmp_path.name + "/in.jsonl"):
        with pytest.raises(ConfigError, match="is the input itself"):
            check_output(str(tmp_path / name), "-o", input_path=str(source))
    assert source.read_text() == "{}\n"
