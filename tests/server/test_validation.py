"""A file is good as a whole, or every line that is not is named, whatever the lines are."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.server.validation import MAX_SHOWN, Verdict, validate
from tests.server.api_rows import COMPLETIONS, jsonl, row, rows_of
from tests.sizes import sized


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file") / "in.jsonl"


def _validate(path: Path, rows: list[Any], *, max_rows: int = 1000) -> Verdict:
    path.write_bytes(jsonl(rows))
    verdict = validate(path, endpoint=COMPLETIONS, max_rows=max_rows, keep_on=lambda: True)
    assert verdict is not None
    return verdict


def _broken(number: int, how: str) -> Any:
    """A row that is wrong in one way."""
    good = row(number)
    if how == "text":
        return json.dumps(good)[:-2]
    if how == "surrogate":
        return json.dumps(good | {"custom_id": "\ud800"})
    if how in good:
        return {name: value for name, value in good.items() if name != how}
    return good | {how: 1}


LINES = st.lists(
    st.sampled_from(
        ["good", "good", "good", "blank", "repeated", "text", "surrogate", "custom_id", "url", "body", "x"]
    ),
    max_size=30,
)


@settings(max_examples=sized(30, 60), deadline=None)
@given(kinds=LINES)
def test_exactly_the_lines_that_are_wrong_are_named_in_order(path: Path, kinds: list[str]) -> None:
    rows: list[Any] = []
    wrong = []
    has_first = False
    for line, kind in enumerate(kinds, start=1):
        if kind == "blank":
            rows.append("")
        elif kind == "repeated":
            rows.append(row(1000))
            if has_first:
                wrong.append(line)
            has_first = True
        elif kind == "good":
            rows.append(row(line))
        else:
            rows.append(_broken(line, kind))
            wrong.append(line)
    num_rows = sum(kind != "blank" for kind in kinds)
    verdict = _validate(path, rows)
    assert verdict.num_rows == num_rows
    assert [error["line"] for error in verdict.errors] == (wrong if num_rows else [None])
    assert all(error["message"] and error["code"] for error in verdict.errors)


@settings(max_examples=sized(30, 60), deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_get_a_verdict(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    verdict = validate(path, endpoint=COMPLETIONS, max_rows=10, keep_on=lambda: True)
    assert verdict is not None
    assert verdict.num_errors >= 1


def test_what_is_in_a_body_is_not_looked_at(path: Path) -> None:
    assert _validate(path, [row(i) | {"body": {"anything": i}} for i in range(5)]).errors == []


def test_errors_are_counted_beyond_those_that_are_kept(path: Path) -> None:
    verdict = _validate(path, [{}] * 150 + [row(0)] * 51)
    assert (verdict.num_errors, len(verdict.errors)) == (200, MAX_SHOWN)
    assert [error["line"] for error in verdict.errors] == list(range(1, MAX_SHOWN + 1))


def test_a_file_of_just_as_many_rows_as_may_be_is_good(path: Path) -> None:
    assert _validate(path, rows_of(10), max_rows=10).errors == []
    (error,) = _validate(path, rows_of(12), max_rows=10).errors
    assert (error["code"], error["line"]) == ("too_many_rows", 11)


def test_it_stops_when_it_is_told_to(path: Path) -> None:
    path.write_bytes(jsonl(rows_of(10)))
    answers = iter([True] * 3 + [False])
    assert validate(path, endpoint=COMPLETIONS, max_rows=10, keep_on=lambda: next(answers)) is None
    assert next(answers, None) is None


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bz2", "xz"])
def test_a_compressed_file_is_looked_at_line_by_line(path: Path, compress: Callable[[bytes], bytes]) -> None:
    path.write_bytes(compress(jsonl([row(0), "{", row(1)])))
    verdict = validate(path, endpoint=COMPLETIONS, max_rows=1000, keep_on=lambda: True)
    assert verdict is not None and verdict.num_rows == 3
    assert [error["line"] for error in verdict.errors] == [2]


@pytest.mark.parametrize(
    ("data", "code", "word"),
    [
        (b"PK\x03\x04" + bytes(30), "unsupported_format", "ZIP"),
        (b"PAR1" + bytes(30), "unsupported_format", "parquet table"),
        (gzip.compress(b"PAR1" + bytes(30)), "unsupported_format", "inside gzip"),
        (b"id,prompt\na,b\nc,d\n", "unsupported_format", "CSV"),
        (gzip.compress(b"{}\n" * 9)[:-6], "invalid_file", "cannot be read"),
        (b"", "empty_file", "no rows"),
    ],
    ids=["zip", "parquet", "parquet in gzip", "csv", "cut off", "empty"],
)
def test_a_file_that_is_no_json_is_named_once(path: Path, data: bytes, code: str, word: str) -> None:
    path.write_bytes(data)
    verdict = validate(path, endpoint=COMPLETIONS, max_rows=1000, keep_on=lambda: True)
    assert verdict is not None
    (error,) = [error for error in verdict.errors if error["code"] == code]
    assert word in error["message"] and error["line"] is None
