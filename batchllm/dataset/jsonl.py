"""JSON lines: the record of every line of a stream, or what is wrong with the line.

Knows bytes, encodings and JSON; not what a record means.

INVARIANT: every non-blank line yields one record or one error, with its number; memory is one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

import orjson

from batchllm.dataset.field_checks import show
from batchllm.dataset.records import BrokenRecord
from batchllm.errors import RowError

MAX_LINE_LEN = 256 << 20
"""Bytes of the longest line that is read: what decompresses without end must not fill the memory."""

_BOM = b"\xef\xbb\xbf"


def parse_lines(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BrokenRecord]]:
    """The record of every non-blank line, with its number."""
    for line, raw in enumerate(iter(partial(stream.readline, MAX_LINE_LEN + 1), b""), start=1):
        if len(raw) > MAX_LINE_LEN and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(1 << 20)
            yield line, BrokenRecord(_line_too_long())
            continue
        data = raw.removeprefix(_BOM) if line == 1 else raw
        if data.isspace() or not data:
            continue
        record: dict[str, Any] | BrokenRecord
        try:
            record = _parse_object(data)
        except RowError as error:
            record = BrokenRecord(error, looks_openai=b'"custom_id"' in data)
        yield line, record


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _why_not_json(data, error) from None
    if not isinstance(record, dict):
        raise RowError(f"a line must hold one JSON object, not {show(record)}", code="not_an_object")
    return record


def _line_too_long() -> RowError:
    return RowError(
        f"the line is longer than {MAX_LINE_LEN >> 20} MiB; split it, or see whether the file is what it should be",
        code="line_too_long",
    )


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
