"""JSON lines, or one JSON array: every record of a stream, or what is wrong with it.

Knows bytes and JSON; not what a record means.

INVARIANT: every non-blank line, or item of the array, yields one record or one error, with its number; memory is one of
them.
"""

from __future__ import annotations

import codecs
import json
import re
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
_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")
"""How an array of objects begins on its first line. A line that is an array of other things is a bad row."""
_LONGEST_ROW = 1 << 20
"""Bytes of the longest first line that is looked at as a row, where it may be an array."""
_BLOCK_LEN = 1 << 20
_DECODER = json.JSONDecoder(parse_int=len, parse_float=len)
"""Finds where an item ends; it is read again then. Python would not make numbers of too many digits."""


def parse_lines(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BrokenRecord]]:
    """The record of every non-blank line, with its number; of an array, of every item.

    A first line that is an array as a whole is the array if nothing follows, and a bad row if lines do.

    Raises:
        OSError: While iterating, where the stream cannot be read, or the array is not JSON.
    """
    held = b""  # a first line of which that is not known yet
    for line, raw in enumerate(iter(partial(stream.readline, MAX_LINE_LEN + 1), b""), start=1):
        if held and not raw.isspace():
            yield 1, _record_of(held)
            held = b""
        if len(raw) > MAX_LINE_LEN and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(1 << 20)
            yield line, BrokenRecord(_line_too_long())
            continue
        data = raw.removeprefix(_BOM) if line == 1 else raw
        if data.isspace() or not data:
            continue
        if line == 1 and _ARRAY.match(data):
            if _is_whole_array(data):
                held = data
                continue
            yield from _parse_array(data, stream)
            return
        yield line, _record_of(data)
    if held:
        yield from _parse_array(held, stream)


def _is_whole_array(line: bytes) -> bool:
    if len(line) > _LONGEST_ROW or not line.rstrip().endswith(b"]"):
        return False
    try:
        return isinstance(orjson.loads(line), list)
    except orjson.JSONDecodeError:
        return False


def _record_of(line: bytes) -> dict[str, Any] | BrokenRecord:
    try:
        return _parse_object(line)
    except RowError as error:
        return BrokenRecord(error, looks_openai=b'"custom_id"' in line)


def _parse_array(head: bytes, stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BrokenRecord]]:
    """The record of every item of an array.

    Args:
        head: What was read of it already.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, at, is_end, item = _decoded(decoder, head), 0, False, 0
    at = text.index("[") + 1
    while True:
        at = _behind_space(text, at)
        if at < len(text) and text[at] == "]":
            if _behind_space(text, at + 1) < len(text):
                raise OSError("something stands behind the array")
            if is_end:
                return
        elif at < len(text):
            start = at
            if item and text[at] == ",":
                start = _behind_space(text, at + 1)
            try:
                _, end = _DECODER.raw_decode(text, start)
                # More of a number, or of what stands behind the array, may come.
                if (is_end or end < len(text)) and (not item or text[at] == ","):
                    item += 1
                    yield item, _as_record(text[start:end])
                    at = end
                    continue
            except (json.JSONDecodeError, RecursionError) as error:
                if is_end or isinstance(error, RecursionError) or len(text) - start > MAX_LINE_LEN:
                    raise OSError(f"item {item + 1} of the array cannot be read: {error}") from error
        if is_end:
            raise OSError(f"the array ends in the midst of item {item + 1}")
        block = stream.read(max(_BLOCK_LEN, len(text) - at))  # a long item is begun anew few times
        is_end = not block
        text, at = text[at:] + _decoded(decoder, block, is_end), 0


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, is_end: bool = False) -> str:
    try:
        return decoder.decode(block, is_end)
    except UnicodeDecodeError as error:
        raise OSError(f"the array is not UTF-8: {error}") from error


def _as_record(text: str) -> dict[str, Any] | BrokenRecord:
    """An item read again by the rules of lines, which are stricter than Python's."""
    try:
        return _parse_object(text.encode())
    except RowError as error:
        return BrokenRecord(error, looks_openai='"custom_id"' in text)
    except UnicodeEncodeError:
        return BrokenRecord(RowError("a character is half a surrogate pair", code="lone_surrogate"))


_SPACE = re.compile(r"[ \t\n\r]*")


def _behind_space(text: str, at: int) -> int:
    """Where the white space of JSON that begins at ``at`` ends."""
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


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
