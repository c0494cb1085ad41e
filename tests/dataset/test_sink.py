"""The sink: input order at the end, nothing lost on the way, nothing harmed that was there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import JsonlSink, check_writable
from batchllm.errors import BatchLLMError, ConfigError


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_lines_end_in_input_order_and_nothing_else_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with JsonlSink(out) as sink:
        for index in (5, 0, 3, 9000, 1):
            sink.write(index, {"id": index, "text": "é\n" * index})
    assert [line["id"] for line in lines_of(out)] == [0, 1, 3, 5, 9000]
    assert lines_of(out)[2]["text"] == "é\n" * 3
    assert names_in(tmp_path) == ["out.jsonl"]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(40)), st.sets(st.integers(0, 39)))
def test_any_finishing_order_gives_the_same_files(order: list[int], failed: set[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        out, errors = Path(directory, "out.jsonl"), Path(directory, "errors.jsonl")
        with JsonlSink(out, errors_path=errors) as sink:
            for index in order:
                write = sink.write_error if index in failed else sink.write
                write(index, {"id": index})
        assert [line["id"] for line in lines_of(out)] == sorted(set(range(40)) - failed)
        assert [line["id"] for line in lines_of(errors)] == sorted(failed)


def test_without_an_errors_file_failures_stand_among_the_others(tmp_path: Path) -> None:
    with JsonlSink(tmp_path / "out.jsonl") as sink:
        sink.write(2, {"id": 2})
        sink.write_error(1, {"id": 1, "error": {}})
        sink.write(0, {"id": 0})
    assert [line["id"] for line in lines_of(tmp_path / "out.jsonl")] == [0, 1, 2]


def test_finished_lines_reach_the_partial_file_while_running(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "out.jsonl")
    for index in reversed(range(1000)):
        sink.write(index, {"id": index})
    assert len(lines_of(tmp_path / "out.jsonl.partial")) >= 1000 - 256
    assert not (tmp_path / "out.jsonl").exists()
    sink.close()
    sink.close()
    assert len(lines_of(tmp_path / "out.jsonl")) == 1000


def test_no_rows_give_an_empty_file(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "out.jsonl").close()
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_failure_keeps_the_partial_file_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    with pytest.raises(KeyError) as caught, JsonlSink(out) as sink:
        sink.write(1, {"id": 1})
        sink.write(0, {"id": 0})
        raise KeyError("engine")
    assert caught.value.__notes__ == [f"2 finished rows are kept in {out}.partial, in finishing order"]
    assert [line["id"] for line in lines_of(tmp_path / "out.jsonl.partial")] == [1, 0]
    assert out.read_text() == "before\n"


def test_a_failure_names_both_partial_files(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "out.jsonl", errors_path=tmp_path / "bad.jsonl")
    sink.write(0, {"id": 0})
    sink.write_error(1, {"id": 1})
    kept = sink.abandon()
    assert "out.jsonl.partial" in kept and "bad.jsonl.partial" in kept


def test_a_failure_before_any_row_leaves_nothing_behind(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "out.jsonl", errors_path=tmp_path / "bad.jsonl").abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_of_an_earlier_run_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").write_text("first\n")
    (tmp_path / "out.jsonl.partial.1").write_text("even earlier\n")
    with JsonlSink(tmp_path / "out.jsonl") as sink:
        sink.write(0, {"id": 0})
    assert (tmp_path / "out.jsonl.partial.1").read_text() == "even earlier\n"
    assert (tmp_path / "out.jsonl.partial.2").read_text() == "first\n"


def test_disk_that_fails_while_ordering_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    sink = JsonlSink(out)
    sink.write(0, {"id": 0})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BatchLLMError, match=r"No space left .*1 finished rows .*\.partial"):
        sink.close()
    assert names_in(tmp_path) == ["out.jsonl", "out.jsonl.partial"]
    assert out.read_text() == "before\n"


def test_disk_that_fails_while_writing_claims_only_what_is_there(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "out.jsonl")
    for index in range(300):
        sink.write(index, {"id": index})
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    os.dup2(full.fileno(), sink._answers._file.fileno())
    full.close()
    with pytest.raises(BatchLLMError, match=r"No space left .*; 256 finished rows are kept"):
        for index in range(300, 900):
            sink.write(index, {"id": index})
    assert "256 finished rows" in sink.abandon()


def test_a_row_written_twice_is_our_mistake(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "out.jsonl")
    sink.write(3, {})
    with pytest.raises(AssertionError, match="row 3 is written twice"):
        sink.write(3, {})
    sink.abandon()


def test_a_link_keeps_pointing_to_the_file_written(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text("before\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    with JsonlSink(link) as sink:
        sink.write(0, {"id": 0})
    assert link.is_symlink()
    assert lines_of(real) == [{"id": 0}]


# ---- check_writable


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
            JsonlSink(tmp_path / name, input_path=source)
    assert source.read_text() == "{}\n"


def test_errors_and_output_must_be_two_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the output file -o too"):
        JsonlSink(tmp_path / "out.jsonl", errors_path=tmp_path / "out.jsonl")
    assert names_in(tmp_path) == []
