"""JSON lines in: a file or a binary stream becomes rows, one at a time.

Knows lines, encodings, identifiers and which row kind a line is; the two kinds' fields are in
`plain_rows` and `openai_rows`. Memory is one row plus 16 hashed bytes per identifier.

INVARIANT: every non-blank line yields exactly one `Row` or `BadRow`, with its own line number, in
order; only a file that cannot be read, or has no rows at all, raises.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, BinaryIO

import orjson

from batchllm.dataset.field_checks import show
from batchllm.dataset.openai_rows import KIND_OF_URL, parse_openai, read_body_sampling
from batchllm.dataset.plain_rows import parse_plain
from batchllm.dataset.records import BadRow, Row, RowKind
from batchllm.dataset.sampling import SGLANG_FIELDS, apply_settings, read_settings
from batchllm.errors import ConfigError, RowError, WorkloadError
from batchllm.request import SamplingParams

OPENAI_MARKS = frozenset({"custom_id", "method", "url", "body"})
MAX_CACHED_SAMPLINGS = 1024

_BOM = b"\xef\xbb\xbf"


def read_rows(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    defaults: SamplingParams,
    default_max_new_tokens: int | None = None,
    flag: str = "-i",
) -> Iterator[Row | BadRow]:
    """Reads JSON lines; bad ones come out as data and the rest go on.

    Blank lines yield nothing but count for line numbers. A byte order mark at the start, CRLF line
    ends and a last line without an end are accepted. ``1`` and ``"1"`` are the same identifier.

    Args:
        source: A path, or an open binary stream (which is not closed).
        defaults: Sampling of every row where the row says nothing; see `openai_rows` for the one
            exception.
        default_max_new_tokens: Output limit of chat rows that set none, which in OpenAI's format
            means "whatever the context leaves"; None takes ``defaults.max_new_tokens``.
        flag: The command line flag that gave the path, for messages.

    Raises:
        ConfigError: At once, if the path cannot be opened.
        WorkloadError: While iterating, if reading fails or there are no rows.
    """
    if default_max_new_tokens is None:
        default_max_new_tokens = defaults.max_new_tokens
    chat_defaults = dataclasses.replace(defaults, max_new_tokens=default_max_new_tokens)
    reader = _Reader(defaults, chat_defaults)
    if not isinstance(source, (str, os.PathLike)):
        return reader.read(source, str(getattr(source, "name", "the input stream")))
    path = os.fspath(source)
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    return _read_path(path, reader)


def _read_path(path: str, reader: _Reader) -> Iterator[Row | BadRow]:
    with open(path, "rb", buffering=1 << 20) as stream:
        yield from reader.read(stream, path)


class _Reader:
    """The state of one pass over one input."""

    __slots__ = ("_chat_defaults", "_defaults", "_kind", "_line_of_id", "_samplings")

    def __init__(self, defaults: SamplingParams, chat_defaults: SamplingParams) -> None:
        self._defaults = defaults
        self._chat_defaults = chat_defaults
        self._kind: RowKind = "plain"
        # Hashes, not strings, so that long identifiers do not hold memory. A collision would drop a
        # good row as a duplicate: at 128 bits and 10 million rows its chance is below 1e-24.
        self._line_of_id: dict[bytes, int] = {}
        self._samplings: dict[tuple[RowKind, bytes], tuple[SamplingParams, bool]] = {}

    def read(self, stream: BinaryIO, name: str) -> Iterator[Row | BadRow]:
        index = 0
        try:
            for line, raw in enumerate(stream, start=1):
                data = raw.removeprefix(_BOM) if line == 1 else raw
                if data.isspace() or not data:
                    continue
                yield self._read_line(data, index, line)
                index += 1
        except OSError as error:
            raise WorkloadError(f"{name}: reading stopped after {index} rows: {error}") from error
        if index == 0:
            raise WorkloadError(f"{name}: has no rows; write one JSON object per line")

    def _read_line(self, data: bytes, index: int, line: int) -> Row | BadRow:
        given_id: str | int | None = None
        try:
            record = _parse_object(data)
            self._kind = kind = _kind_of(record)
            if kind == "plain":
                given_id = _checked_id(record, "id", str(index))
                self._claim_id(given_id, line)
                return parse_plain(
                    record,
                    given_id=given_id,
                    index=index,
                    line=line,
                    sampling=self._plain_sampling,
                )
            given_id = _checked_id(record, "custom_id", None)
            self._claim_id(given_id, line)
            return parse_openai(
                record,
                given_id=given_id,
                index=index,
                line=line,
                sampling=self._chat_sampling if kind == "chat" else self._completion_sampling,
            )
        except RowError as error:
            return BadRow(
                # A line that does not parse takes the format of the one before it, so that a file
                # with one broken line still has one kind of output line.
                kind="chat" if self._kind == "plain" and b'"custom_id"' in data else self._kind,
                given_id=given_id,
                index=index,
                line=line,
                code=error.code,
                message=error.message,
                param=error.param,
            )

    def _claim_id(self, given_id: str | int, line: int) -> None:
        key = blake2b(str(given_id).encode(), digest_size=16).digest()
        first = self._line_of_id.setdefault(key, line)
        if first != line:
            raise RowError(
                f"id {show(given_id)} is already used on line {first}; ids must be unique in a job "
                "(a row without an id has its position as id)",
                code="duplicate_id",
                param="id" if self._kind == "plain" else "custom_id",
            )

    def _plain_sampling(self, mapping: object) -> tuple[SamplingParams, bool]:
        if not mapping and (mapping is None or isinstance(mapping, dict)):
            return self._defaults, False
        return self._cached("plain", mapping, self._read_plain_sampling)

    def _chat_sampling(self, body: object) -> tuple[SamplingParams, bool]:
        return self._cached("chat", body, self._read_chat_sampling)

    def _completion_sampling(self, body: object) -> tuple[SamplingParams, bool]:
        return self._cached("completions", body, self._read_completion_sampling)

    def _read_plain_sampling(self, mapping: Any) -> tuple[SamplingParams, bool]:
        settings = read_settings(mapping, SGLANG_FIELDS)
        return apply_settings(settings, self._defaults), "max_new_tokens" in settings

    def _read_chat_sampling(self, body: Any) -> tuple[SamplingParams, bool]:
        return read_body_sampling(body, "chat", defaults=self._chat_defaults)

    def _read_completion_sampling(self, body: Any) -> tuple[SamplingParams, bool]:
        return read_body_sampling(body, "completions", defaults=self._defaults)

    def _cached(
        self, kind: RowKind, mapping: object, read: Callable[[Any], tuple[SamplingParams, bool]]
    ) -> tuple[SamplingParams, bool]:
        """Most jobs sample every row alike: checks each distinct mapping once."""
        try:
            # The JSON text as key tells true from 1 and 1 from 1.0, which hash alike.
            key = (kind, orjson.dumps(mapping))
        except orjson.JSONEncodeError:  # nested deeper than orjson writes
            return read(mapping)
        found = self._samplings.get(key)
        if found is None:
            if len(self._samplings) >= MAX_CACHED_SAMPLINGS:
                self._samplings.clear()
            found = self._samplings[key] = read(mapping)
        return found


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _why_not_json(data, error) from None
    if not isinstance(record, dict):
        raise RowError(f"a line must hold one JSON object, not {show(record)}", code="not_an_object")
    return record


def _why_not_json(data: bytes, error: orjson.JSONDecodeError) -> RowError:
    try:
        data.decode()
    except UnicodeDecodeError as wrong:
        return RowError(
            f"byte {wrong.start + 1} of the line (0x{data[wrong.start]:02x}) is not UTF-8; write the file as UTF-8",
            code="invalid_utf8",
        )
    where = f"invalid JSON at column {error.colno}: {error.msg}"
    if "depth" in error.msg or "recursion" in error.msg.lower():
        return RowError(f"{where}; nest less than 1024 deep", code="nested_too_deep")
    if "surrogate" in error.msg:
        return RowError(f"{where}; escape characters in whole pairs", code="lone_surrogate")
    return RowError(where, code="invalid_json")


def _kind_of(record: dict[str, Any]) -> RowKind:
    """Plain unless a field of OpenAI's is there; chat where such a row's url says nothing known."""
    if OPENAI_MARKS.isdisjoint(record):
        return "plain"
    url = record.get("url")
    return KIND_OF_URL.get(url, "chat") if isinstance(url, str) else "chat"


def _checked_id(record: dict[str, Any], name: str, absent: str | None) -> str | int:
    given = record.get(name)
    if given is None:
        if absent is None:
            raise RowError(
                f"the row has no {name}; answers are matched to rows by it",
                code="missing_id",
                param=name,
            )
        return absent
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise RowError(
            f"{name} must be a non-empty string or an integer up to 64 bits, not {show(given)}",
            code="invalid_id",
            param=name,
        )
    return given
