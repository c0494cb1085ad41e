"""Outputs: the files together hold each result of the journal once, in the order asked for, also of resumed jobs."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import BatchLLMError, ConfigError
from batchllm.offline.outputs import Outputs, ResultOrder, check_outputs
from tests.sizes import sized


class Journal:
    """Results in memory, in finishing order."""

    def __init__(self, results: list[tuple[int, bool]]) -> None:
        self.kept = results

    def results(self, order: ResultOrder, *, failed: bool | None = None) -> Iterator[bytes]:
        kept = sorted(self.kept) if order == "input" else self.kept
        return (line_of(index) for index, is_failed in kept if failed is None or failed == is_failed)

    def take(self, outputs: Outputs, results: list[tuple[int, bool]]) -> None:
        """Results become safe, and outputs hear of them if they want to."""
        self.kept = self.kept + results
        if outputs.is_live:
            outputs.append([(line_of(index), is_failed) for index, is_failed in results])


def line_of(index: int) -> bytes:
    return b'{"id":%d}' % index


def read(path: Path | str) -> list[bytes]:
    path = Path(path)
    if path.suffix == ".parquet":
        return [record.encode() for record in pq.read_table(path)["record"].to_pylist()]
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()


@settings(max_examples=sized(30, 60), deadline=None)
@given(
    finished=st.permutations(range(12)),
    failed=st.sets(st.integers(0, 11)),
    num_before=st.integers(0, 12),
    batch=st.integers(1, 5),
    order=st.sampled_from(["input", "finished"]),
    endings=st.tuples(*[st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"])] * 2),
    has_errors=st.booleans(),
)
def test_files_together_hold_each_result_once_and_in_order(
    finished: list[int],
    failed: set[int],
    num_before: int,
    batch: int,
    order: ResultOrder,
    endings: tuple[str, str],
    has_errors: bool,
) -> None:
    """Whatever an earlier run has done, and in whatever pieces the rest comes."""
    results = [(index, index in failed) for index in finished]
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder, "out" + endings[0]), Path(folder, "errors" + endings[1])
        path.write_bytes(b"an earlier run\n")
        journal = Journal(results[:num_before])
        errors_path = str(errors) if has_errors else None
        with Outputs(str(path), errors_path=errors_path, order=order, journal=journal) as outputs:
            outputs.begin()
            for start in range(num_before, len(results), batch):
                journal.take(outputs, results[start : start + batch])
            outputs.finish()
        expected = range(12) if order == "input" else finished
        assert read(path) == [line_of(index) for index in expected if not (has_errors and index in failed)]
        assert not has_errors or read(errors) == [line_of(index) for index in expected if index in failed]
        assert sorted(os.listdir(folder)) == sorted([path.name, *([errors.name] if has_errors else [])])


def test_in_finishing_order_results_can_be_read_while_the_job_runs(tmp_path: Path) -> None:
    path, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    journal = Journal([(4, False), (3, True)])
    with Outputs(str(path), errors_path=str(errors), order="finished", journal=journal) as outputs:
        outputs.begin()
        assert (read(path), read(errors)) == ([line_of(4)], [line_of(3)])
        journal.take(outputs, [(2, False), (1, True)])
        assert (read(path), read(errors)) == ([line_of(4), line_of(2)], [line_of(3), line_of(1)])


def test_a_torn_line_of_a_killed_run_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(line_of(1) + b'\n{"id":')
    journal = Journal([(1, False), (2, False)])
    with Outputs(str(path), errors_path=None, order="finished", journal=journal) as outputs:
        outputs.begin()
    assert read(path) == [line_of(1), line_of(2)]


def test_only_files_that_grow_make_outputs_live(tmp_path: Path) -> None:
    def is_live(name: str, errors: str | None, order: ResultOrder) -> bool:
        return Outputs(name, errors_path=errors, order=order, journal=Journal([])).is_live

    assert is_live("o.jsonl", None, "finished") and is_live("-", None, "finished")
    assert is_live("o.parquet", "e.jsonl", "finished")
    assert not is_live("o.parquet", None, "finished")
    assert not is_live("o.jsonl", "e.jsonl", "input")


def test_in_input_order_nothing_is_written_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Outputs(str(path), errors_path=None, order="input", journal=Journal([(1, False)])) as outputs:
        outputs.begin()
        assert not path.exists()


@pytest.mark.parametrize("order", ["input", "finished"])
def test_standard_output_gets_all_results_of_a_resumed_job(
    order: ResultOrder, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    journal = Journal([(2, False)])
    with Outputs("-", errors_path=None, order=order, journal=journal) as outputs:
        outputs.begin()
        assert capfdbinary.readouterr().out.splitlines() == ([line_of(2)] if order == "finished" else [])
        journal.take(outputs, [(1, True)])
        outputs.finish()
    assert capfdbinary.readouterr().out.splitlines() == (
        [line_of(1)] if order == "finished" else [line_of(1), line_of(2)]
    )


def test_a_growing_file_that_is_refused_is_told_naming_its_flag(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    outputs = Outputs(
        str(tmp_path / "out.jsonl"),
        errors_path=str(folder / "errors.jsonl"),
        order="finished",
        journal=Journal([]),
    )
    told = pytest.raises(BatchLLMError, match=r"--errors .*errors\.jsonl: .*kept in the job's folder")
    with told, outputs:
        outputs.begin()


def test_a_journal_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    class Damaged(Journal):
        def results(self, order: ResultOrder, *, failed: bool | None = None) -> Iterator[bytes]:
            yield line_of(1)
            raise BatchLLMError("row 2 is damaged")

    path = tmp_path / "out.jsonl"
    path.write_text("before\n")
    outputs = Outputs(str(path), errors_path=None, order="input", journal=Damaged([]))
    with pytest.raises(BatchLLMError, match="row 2 is damaged"):
        outputs.finish()
    assert path.read_text() == "before\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_outputs_that_cannot_be_are_refused_before_anything_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "out.jsonl")
    check_outputs(out, errors_path=str(tmp_path / "errors.jsonl"), input_path=str(tmp_path / "in.jsonl"))
    with pytest.raises(ConfigError, match=r"--errors .*out\.jsonl: is the output -o too"):
        check_outputs(out, errors_path=f"{tmp_path}/./out.jsonl")
    with pytest.raises(ConfigError, match=r"--errors .*is the input itself"):
        check_outputs(out, errors_path=str(tmp_path / "in.jsonl"), input_path=str(tmp_path / "in.jsonl"))
    with pytest.raises(ConfigError, match=r"-o .*create it first"):
        check_outputs(str(tmp_path / "none" / "out.jsonl"))
    assert os.listdir(tmp_path) == []
