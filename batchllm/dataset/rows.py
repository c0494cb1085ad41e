"""Rows in: the records of an input, JSON lines or a table's, become rows, one at a time.

Knows identifiers and which row kind a record is; the two kinds' fields are in `plain_rows` and `openai_rows`, files and
their formats in `sources`, `jsonl` and `tables`, other columns than a row's in `column_map`. That no
two rows have one identifier is for `row_ids`. Memory is one row, or one batch of a table.

INVARIANT: every non-blank line, and every row of a table, yields exactly one `Row` or `BadRow`, with its own line
number, in order; only an input that cannot be read, or has no rows at all, raises.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any, BinaryIO

import msgspec
import orjson

from batchllm.dataset.column_map import ColumnMap
from batchllm.dataset.field_checks import any_json_schema_text, json_schema_text, show, whole
from batchllm.dataset.jsonl import parse_lines
from batchllm.dataset.openai_body import BodySettings, read_body
from batchllm.dataset.openai_rows import KIND_OF_URL, parse_openai
from batchllm.dataset.openai_rows import ROW_FIELDS as OPENAI_FIELDS
from batchllm.dataset.plain_rows import parse_plain
from batchllm.dataset.records import BadRow, BrokenRecord, Row, RowKind
from batchllm.dataset.sampling import apply_settings, read_settings, sglang_fields
from batchllm.dataset.sources import Input, open_input
from batchllm.dataset.tables import open_table, table_records
from batchllm.errors import RowError, WorkloadError
from batchllm.request import SamplingParams

MAX_CACHED_SETTINGS = 1024
MAX_EXACT = 1 << 53
"""Up to here a double holds every whole number."""
_Record = dict[str, Any] | BrokenRecord


def read_rows(
    source: Input | str | os.PathLike[str] | BinaryIO,
    *,
    defaults: SamplingParams,
    default_max_new_tokens: int | None = None,
    chosen: Collection[str] = (),
    checks_schemas: bool = False,
    flag: str = "-i",
    columns: ColumnMap | None = None,
) -> Iterator[Row | BadRow]:
    """Reads the rows of an input; bad ones come out as data and the rest go on.

    Blank lines yield nothing but count for line numbers. A byte order mark at the start, CRLF line
    ends and a last line without an end are accepted. A row's line in a table is its number, from 1.

    Args:
        source: An input, the path of one, or an open binary stream of JSON lines (which is not closed).
        defaults: Sampling of every row where the row says nothing; see `openai_rows` for the one
            exception.
        default_max_new_tokens: Output limit of chat rows that set none, which in OpenAI's format
            means "whatever the context leaves"; None takes ``defaults.max_new_tokens``.
        chosen: Fields of ``defaults`` that the user has set; in others a chat row takes what the model recommends.
        checks_schemas: JSON schemas that the grammar does not keep are taken, and answers are checked against theirs.
        flag: The command line flag that gave the path, for messages.
        columns: Where the id and the prompt are, and what to carry to the output. With None, a line may have no
            other fields than a row's, and of a table's columns those with the names of a row's fields are taken.

    Raises:
        ConfigError: At once, if the input cannot be opened or has no such columns.
        WorkloadError: While iterating, if reading fails or there are no rows.
    """
    if default_max_new_tokens is None:
        default_max_new_tokens = defaults.max_new_tokens
    chat_defaults = dataclasses.replace(defaults, max_new_tokens=default_max_new_tokens)
    settings = (defaults, chat_defaults, frozenset(chosen), checks_schemas)
    if not isinstance(source, (Input, str, os.PathLike)):
        name = str(getattr(source, "name", "the input stream"))
        return _Reader(*settings, columns, is_table=False).read(parse_lines(source), name)
    if not isinstance(source, Input):
        source = open_input(os.fspath(source), spool_folder=None, flag=flag)
    records: Iterator[tuple[int, _Record]]
    is_table = source.format != "jsonl"
    if not is_table:
        records = _parse_file(source)
    else:
        columns = ColumnMap() if columns is None else columns
        records = enumerate(open_table(source, columns), start=1)
    return _Reader(*settings, columns, is_table=is_table).read(records, source.name)


def read_table(
    table: Any, *, name: str, defaults: SamplingParams, chosen: Collection[str] = (), columns: ColumnMap
) -> Iterator[Row | BadRow]:
    """Reads the rows of a ``pyarrow.Table``, which is a part of more: each row must give its id.

    Args:
        name: What it is called in messages.
        defaults: As in `read_rows`, like what follows.

    Raises:
        WorkloadError: While iterating, if there are no rows.
    """
    reader = _Reader(defaults, defaults, frozenset(chosen), False, columns, is_table=True, needs_ids=True)
    return reader.read(enumerate(table_records(table, columns), start=1), name)


def _parse_file(source: Input) -> Iterator[tuple[int, _Record]]:
    with source.open_stream() as stream:
        yield from parse_lines(stream)


class _Reader:
    """The state of one pass over one input."""

    __slots__ = (
        *("_chat_defaults", "_checks_schemas", "_chosen", "_columns", "_defaults"),
        *("_is_table", "_json_schema", "_kind", "_needs_ids", "_settings"),
    )

    def __init__(
        self,
        defaults: SamplingParams,
        chat_defaults: SamplingParams,
        chosen: frozenset[str],
        checks_schemas: bool,
        columns: ColumnMap | None,
        *,
        is_table: bool,
        needs_ids: bool = False,
    ) -> None:
        self._chosen = chosen
        self._is_table = is_table
        self._needs_ids = needs_ids
        self._checks_schemas = checks_schemas
        self._json_schema = any_json_schema_text if checks_schemas else json_schema_text
        self._defaults = defaults
        self._chat_defaults = chat_defaults
        self._columns = columns
        self._kind: RowKind = "plain"
        self._settings: dict[tuple[RowKind, bytes], BodySettings] = {}

    def read(self, records: Iterable[tuple[int, _Record]], name: str) -> Iterator[Row | BadRow]:
        index = 0
        try:
            for line, record in records:
                row = self._read_record(record, index, line)
                if self._checks_schemas and isinstance(row, Row) and row.request.sampling.json_schema is not None:
                    row = msgspec.structs.replace(row, checks_schema=True)
                yield row
                index += 1
        except OSError as error:
            raise WorkloadError(f"{name}: reading stopped after {index} rows: {error}") from error
        if index == 0:
            raise WorkloadError(f"{name}: has no rows; there is nothing to answer")

    def _read_record(self, record: _Record, index: int, line: int) -> Row | BadRow:
        given_id: str | int | None = None
        carried: dict[str, Any] | None = None
        columns = self._columns
        try:
            if isinstance(record, BrokenRecord):
                raise record.error
            self._kind = kind = _kind_of(record, columns)
            id_column = None if columns is None else columns.id_column
            own_id = str(index) if kind == "plain" and not id_column and not self._needs_ids else None
            given_id = _checked_id(record, id_column or ("id" if kind == "plain" else "custom_id"), own_id)
            if columns is not None:
                carried = columns.carried(record)
                record = columns.apply(record, is_openai=kind != "plain", is_table=self._is_table)
            if kind == "plain":
                return parse_plain(
                    record, given_id=given_id, index=index, line=line, sampling=self._plain_sampling, carried=carried
                )
            row = parse_openai(
                record,
                given_id=given_id,
                index=index,
                line=line,
                read_body=self._read_completion if kind == "completions" else self._read_chat,
            )
            return row if carried is None else msgspec.structs.replace(row, carried=carried)
        except RowError as error:
            return BadRow(
                # A line that does not parse takes the format of the one before it, so that a file
                # with one broken line still has one kind of output line.
                kind="chat" if self._kind == "plain" and _looks_openai(record) else self._kind,
                given_id=given_id,
                index=index,
                line=line,
                code=error.code,
                message=error.message,
                param=error.param,
                carried=carried,
            )

    def _plain_sampling(self, mapping: object) -> tuple[SamplingParams, bool]:
        if not mapping and (mapping is None or isinstance(mapping, dict)):
            return self._defaults, False
        return self._cached("plain", mapping)[:2]

    def _read_chat(self, body: dict[str, Any]) -> BodySettings:
        return self._cached("chat", body)

    def _read_completion(self, body: dict[str, Any]) -> BodySettings:
        return self._cached("completions", body)

    def _cached(self, kind: RowKind, mapping: Any) -> BodySettings:
        """Most jobs ask the same of every row: checks each distinct mapping once."""
        try:
            # The JSON text as key tells true from 1 and 1 from 1.0, which hash alike.
            key = (kind, orjson.dumps(mapping))
        except orjson.JSONEncodeError:  # nested deeper than orjson writes
            return self._read(kind, mapping)
        found = self._settings.get(key)
        if found is None:
            if len(self._settings) >= MAX_CACHED_SETTINGS:
                self._settings.clear()
            found = self._settings[key] = self._read(kind, mapping)
        return found

    def _read(self, kind: RowKind, mapping: Any) -> BodySettings:
        if kind == "plain":
            settings = read_settings(mapping, sglang_fields(self._json_schema))
            return BodySettings(apply_settings(settings, self._defaults), "max_new_tokens" in settings)
        defaults = self._chat_defaults if kind == "chat" else self._defaults
        return read_body(mapping, kind, defaults=defaults, chosen=self._chosen, json_schema=self._json_schema)


def _looks_openai(record: _Record) -> bool:
    return isinstance(record, BrokenRecord) and record.looks_openai


def _kind_of(record: dict[str, Any], columns: ColumnMap | None) -> RowKind:
    """Plain unless a field of OpenAI's is there; chat where such a row's url says nothing known."""
    if OPENAI_FIELDS.isdisjoint(record) if columns is None else not columns.is_openai(record):
        return "plain"
    url = record.get("url")
    return KIND_OF_URL.get(url, "chat") if isinstance(url, str) else "chat"


def _checked_id(record: dict[str, Any], name: str, absent: str | None) -> str | int:
    given = record.get(name)
    if type(given) is float and abs(given) <= MAX_EXACT:
        given = whole(given)
    if given is None:
        if absent is None:
            raise RowError(
                f"the row has no {name}; answers are matched to rows by it",
                code="missing_id",
                param=name,
            )
        return absent
    if type(given) is str and given:
        return given
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise RowError(
            f"{name} must be a non-empty string or an integer up to 64 bits, not {show(given)}",
            code="invalid_id",
            param=name,
        )
    return given
