"""Tables in: Parquet and Arrow files, saved Hugging Face datasets and CSV become records of JSON values.

Knows Arrow, its types and its errors; not what a row is. `pyarrow` is imported when a table is opened.

INVARIANT: every row of every file yields exactly one record or `BrokenRecord`, in order, or reading stops with a
`WorkloadError`; a record holds JSON values only, and no nulls.
"""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import io
import math
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from batchllm.dataset.column_map import ColumnMap
from batchllm.dataset.field_checks import MAX_INT64, show
from batchllm.dataset.records import BrokenRecord
from batchllm.dataset.sources import Input
from batchllm.errors import ConfigError, RowError, WorkloadError

BATCH_LEN = 1024
"""Rows in memory at a time, as far as the file's own blocks allow."""

_ARROW_FILE = b"ARROW1"
_CSV_BLOCK = 1 << 26
"""Bytes of a CSV file in memory; a row must fit in."""
_FIRST_CSV_ROW = 2  # the names of the columns are the first
_END_OF_STREAM = b"\xff\xff\xff\xff" + bytes(4)
_TEXT_OF: dict[type, Callable[[Any], Any]] = {
    bytes: lambda value: base64.b64encode(value).decode(),
    datetime.date: lambda value: value.isoformat(),  # a datetime is one too
    datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: lambda value: value.total_seconds(),
    decimal.Decimal: lambda value: _decimal(value),
    uuid.UUID: str,
}
"""How values that JSON does not have are written."""

_Record = dict[str, Any] | BrokenRecord


def open_table(source: Input, columns: ColumnMap) -> Iterator[_Record]:
    """Opens the files of a table; their rows come as they are read.

    Args:
        columns: What is wanted of each row; only these columns are read.

    Raises:
        ConfigError: At once, if a file is not what it should be, or a column that was named is not there.
        WorkloadError: While iterating, if a file turns out to be corrupt.
    """
    import pyarrow

    schema_of, _ = _READERS[source.format]
    for path in source.local_paths:
        try:
            names = schema_of(path).names
            if len(set(names)) < len(names):
                raise ValueError("two of its columns have one name")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ConfigError(f"{source.flag} {source.name}: {path.name} cannot be read as a table: {error}") from error
        columns.check_columns(names, f"{source.flag} {source.name}")
    return _records(source, columns)


def table_records(table: Any, columns: ColumnMap) -> Iterator[_Record]:
    """The rows of a ``pyarrow.Table``, or of a batch of one.

    Args:
        columns: What is wanted of each row.
    """
    return _batch_records(table, columns)


def _records(source: Input, columns: ColumnMap) -> Iterator[_Record]:
    import pyarrow

    num_rows = 0
    _, batches_of = _READERS[source.format]
    for path in source.local_paths:
        try:
            for batch in batches_of(path, columns.columns()):
                for record in [batch] if isinstance(batch, BrokenRecord) else _batch_records(batch, columns):
                    yield record
                    num_rows += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise WorkloadError(f"{source.name}: reading {path.name} stopped after {num_rows} rows: {error}") from error


def _parquet_schema(path: Path) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(os.fspath(path)) as file:
        return file.schema_arrow


def _parquet_batches(path: Path, wanted: frozenset[str]) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(os.fspath(path), page_checksum_verification=True) as file:
        names = [name for name in file.schema_arrow.names if name in wanted]
        yield from file.iter_batches(batch_size=BATCH_LEN, columns=names)


def _csv_schema(path: Path) -> Any:
    with _open_csv(path, deque()) as reader:
        return reader.schema


def _csv_batches(path: Path, wanted: frozenset[str]) -> Iterator[Any]:
    """Batches, and `BrokenRecord` where a row has another number of cells than the first one."""
    odd: deque[Any] = deque()
    number, last_cell = _FIRST_CSV_ROW, None
    with _open_csv(path, odd) as reader:
        for batch in reader:
            last_cell = batch.columns[-1][-1].as_py() if batch.num_rows else last_cell
            for piece in _slices(batch, wanted):
                while piece.num_rows:
                    while odd and odd[0].number == number:
                        yield _odd_row(odd.popleft())
                        number += 1
                    length = min(piece.num_rows, odd[0].number - number) if odd else piece.num_rows
                    yield piece.slice(0, length)
                    piece = piece.slice(length)
                    number += length
    _check_quotes(path, last_cell, odd[-1].text if odd else "")
    yield from map(_odd_row, odd)


def _check_quotes(path: Path, last_cell: str | None, last_odd: str) -> None:
    """Refuse a file that ends within quotes: its last row has swallowed all rows behind it, which Arrow does not tell.

    Args:
        path: The file.
        last_cell: The last cell of the last row that has a cell for each column.
        last_odd: The last row, as it is in the file, where it has another number of cells.

    Raises:
        ValueError: It does.
    """
    may_be_open, is_open = "\n" in (last_cell or ""), False
    if last_odd:
        try:
            list(csv.reader([last_odd], delimiter=_delimiter(path), strict=True))
            may_be_open = False
        except csv.Error as error:
            is_open, may_be_open = "end of data" in str(error), "field limit" in str(error)
    # A cell of several lines is in quotes, and the last one of the file ends with them.
    if is_open or (may_be_open and _last_byte(path) != b'"'):
        raise ValueError("a quote that opens in its last row is never closed, and hides the rows behind it; close it")


def _last_byte(path: Path) -> bytes:
    """The last one of a file that is no end of a line."""
    import pyarrow

    end = b""
    with pyarrow.input_stream(os.fspath(path)) as stream:  # decompresses, like the reader of tables
        while block := stream.read(_CSV_BLOCK):
            end = block.rstrip(b"\r\n")[-1:] or end
    return end


def _odd_row(row: Any) -> BrokenRecord:
    message = (
        f"the row has {row.actual_columns} cells, and the table {row.expected_columns} columns; a cell with a "
        "delimiter in it must be in quotes"
    )
    return BrokenRecord(RowError(message, code="wrong_number_of_cells"))


def _open_csv(path: Path, odd: deque[Any]) -> Any:
    """Every cell is text: a prompt may look like a number. An empty one is missing.

    Args:
        path: The file.
        odd: Takes rows with another number of cells than the first one, before the rows behind them are read.
    """
    import pyarrow
    from pyarrow import csv as arrow_csv

    delimiter = _delimiter(path)

    def set_aside(row: Any) -> str:
        odd.append(row)
        return "skip"

    return arrow_csv.open_csv(
        os.fspath(path),
        # One thread: several do not know the numbers of rows.
        read_options=arrow_csv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False),
        parse_options=arrow_csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=set_aside
        ),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(_csv_names(path, delimiter), pyarrow.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _delimiter(path: Path) -> str:
    """A tab where the first line has one, else a comma."""
    import pyarrow

    with pyarrow.input_stream(os.fspath(path)) as file:
        return "\t" if b"\t" in io.BufferedReader(file).readline(_CSV_BLOCK) else ","


def _csv_names(path: Path, delimiter: str) -> list[str]:
    """The first line that is not empty: a name in quotes may have anything in it."""
    import pyarrow

    with pyarrow.input_stream(os.fspath(path)) as stream:  # like the reader of tables it decompresses *.gz
        file = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        try:
            return next(filter(None, csv.reader(file, delimiter=delimiter)), [])
        except csv.Error as error:
            raise ValueError(f"the names of its columns cannot be read: {error}") from error


def _arrow_schema(path: Path) -> Any:
    """The schema of a file that was written to its end: one cut between two batches would read like a whole one."""
    import pyarrow

    if _is_arrow_file(path):
        with pyarrow.OSFile(os.fspath(path)) as file:
            return pyarrow.ipc.open_file(file).schema
    with open(path, "rb") as file:
        file.seek(-min(len(_END_OF_STREAM), file.seek(0, os.SEEK_END)), os.SEEK_END)
        if file.read() != _END_OF_STREAM:
            raise ValueError("it was not written to its end")
    with pyarrow.OSFile(os.fspath(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return stream.schema


def _is_arrow_file(path: Path) -> bool:
    """Arrow's format for files, and Feather's, not its format for streams."""
    with open(path, "rb") as file:
        return file.read(len(_ARROW_FILE)) == _ARROW_FILE


def _arrow_batches(path: Path, wanted: frozenset[str]) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(os.fspath(path)) as file:
        if _is_arrow_file(path):
            reader = pyarrow.ipc.open_file(file)
            for i in range(reader.num_record_batches):
                yield from _slices(reader.get_batch(i), wanted)
            return
        with pyarrow.ipc.open_stream(file) as stream:
            for batch in stream:
                yield from _slices(batch, wanted)
        if file.tell() != file.size():
            raise ValueError("it ends before its file does")


def _slices(batch: Any, wanted: frozenset[str]) -> Iterator[Any]:
    # The library trusts the offsets in a file; wrong ones would read what is not ours.
    batch.validate(full=True)
    chosen = batch.select([name for name in batch.schema.names if name in wanted])
    for start in range(0, chosen.num_rows, BATCH_LEN):
        yield chosen.slice(start, BATCH_LEN)


_READERS: Mapping[str, tuple[Callable[[Path], Any], Callable[[Path, frozenset[str]], Iterator[Any]]]] = {
    "parquet": (_parquet_schema, _parquet_batches),
    "hf": (_arrow_schema, _arrow_batches),
    "csv": (_csv_schema, _csv_batches),
}
"""Of each format how the schema of a file is read, and the batches of the columns that are wanted."""


def _batch_records(batch: Any, wanted: ColumnMap) -> Iterator[_Record]:
    names, of_rows = wanted.columns(), wanted.row_columns()
    columns = {
        name: _column_values(name, batch.column(i), name in of_rows)
        for i, name in enumerate(batch.schema.names)
        if name in names
    }
    for position in range(batch.num_rows):
        record: dict[str, Any] = {}
        broken: RowError | None = None
        for name, values in columns.items():
            value = values[position]
            if isinstance(value, RowError):
                broken = broken or value
            elif value is not None:
                record[name] = value
        yield record if broken is None else BrokenRecord(broken)


def _column_values(name: str, column: Any, bytes_are_text: bool) -> list[Any]:
    """The JSON value of each row; None for null, and a `RowError` where there is none."""
    import pyarrow

    unconvertible = (pyarrow.ArrowException, ValueError, OverflowError)
    try:
        values = column.to_pylist()
    except unconvertible:
        values = []
        for item in column:
            try:
                values.append(item.as_py())
            except unconvertible as error:
                values.append(_not_json(name, str(error)))
    return values if _is_json(column.type) else [_json_or_error(name, value, bytes_are_text) for value in values]


def _is_json(arrow_type: Any) -> bool:
    """True where `to_pylist` gives JSON values without nulls inside."""
    from pyarrow import types

    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return _is_json(arrow_type.value_type)
    return any(
        is_type(arrow_type)
        for is_type in (types.is_string, types.is_large_string, types.is_integer, types.is_boolean, types.is_null)
    )


def _json_or_error(name: str, value: Any, bytes_are_text: bool) -> Any:
    try:
        return _json_value(value, bytes_are_text)
    except (TypeError, UnicodeDecodeError) as error:
        return _not_json(name, str(error))


def _json_value(value: Any, bytes_are_text: bool) -> Any:
    """A value as JSON has it: other types as text, a number that is not finite as null, null fields left out.

    Spark and others write texts as columns of bytes.
    """
    if value is None or isinstance(value, (str, bool, int, RowError)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: made for key, item in value.items() if (made := _json_value(item, bytes_are_text)) is not None}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, bytes_are_text) for item in value]
    if bytes_are_text and isinstance(value, bytes):
        return value.decode()
    for python_type, convert in _TEXT_OF.items():
        if isinstance(value, python_type):
            return convert(value)
    raise TypeError(f"JSON has no {type(value).__name__}")


def _decimal(value: decimal.Decimal) -> str | int:
    """Databases write integers as decimals without places; any other one is text, which loses nothing of it."""
    is_integer = value.is_finite() and value.as_tuple().exponent == 0 and abs(value) <= MAX_INT64
    return int(value) if is_integer else str(value)


def _not_json(name: str, why: str) -> RowError:
    return RowError(f"column {show(name)} has a value that JSON cannot hold: {why}", code="not_json", param=name)
