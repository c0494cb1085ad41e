"""Output lines as a Parquet table: what is asked for most as columns, and the whole line beside them.

    id, text, finish_reason, output_ids, prompt_tokens, cached_tokens, completion_tokens, error_code, error_message
                  of the plain and of the OpenAI format alike; of several choices, the first one's. Null: not there.
    carried ones  under their own names, or ``carried.NAME`` where that is taken
    record        the line itself, JSON

A carried column whose values are all numbers, all texts or all truth values has that type. One that mixes them, or has
lists or objects, is JSON text. Which of these it is depends on all its values, never on their order.

Knows the formats of lines; not files.

INVARIANT: one row for each line, in their order, and nothing of a line is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_ROWS = 4096
BATCH_BYTES = 1 << 26
"""A batch ends at either."""

_OWN_TYPES = {
    "id": pa.string(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "output_ids": pa.list_(pa.int32()),
    "prompt_tokens": pa.int64(),
    "cached_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "error_code": pa.string(),
    "error_message": pa.string(),
}
_MAX_EXACT = 1 << 53
"""Up to here a double holds every whole number."""


class _LongInt:
    """Stands for whole numbers that an int64 holds, and a double may not."""


class _HugeInt:
    """Stands for whole numbers that no int64 holds."""


def write_table(lines: BinaryIO, stream: BinaryIO) -> None:
    """Writes lines as a table.

    Args:
        lines: Output lines, read twice from its beginning.
        stream: Gets the Parquet file; not closed.

    Raises:
        OSError: The stream refuses.
    """
    lines.seek(0)
    types = _carried_types(lines)
    columns = _column_names(types)
    schema = pa.schema([*_OWN_TYPES.items(), *((columns[name], types[name] or pa.string()) for name in types)])
    schema = schema.append(pa.field("record", pa.string()))
    lines.seek(0)
    with pq.ParquetWriter(stream, schema) as writer:
        for batch in _batches(lines):
            writer.write_table(_table(batch, types, schema))


def answer_table(lines: Sequence[bytes], carried: Mapping[str, Any]) -> pa.Table:
    """Lines as a table in memory, whose types do not depend on the lines.

    Args:
        lines: Output lines.
        carried: The carried columns of these rows, arrays as the input has them.
    """
    names = _column_names(carried)
    schema = pa.schema([*_OWN_TYPES.items(), ("record", pa.string())])
    table = _table(lines, {}, schema)
    for name, values in carried.items():
        table = table.add_column(table.num_columns - 1, names[name], values)
    return table


def _batches(lines: BinaryIO) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    num_bytes = 0
    for line in lines:
        batch.append(line)
        num_bytes += len(line)
        if len(batch) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _carried_types(lines: BinaryIO) -> dict[str, pa.DataType | None]:
    """The type of each carried column, in order of appearance; None for JSON text."""
    seen: dict[str, set[type]] = {}
    for line in lines:
        if b'"carried"' in line:
            for name, value in orjson.loads(line).get("carried", {}).items():
                seen.setdefault(name, set()).add(_kind_of(value))
    return {name: _type_of(kinds - {type(None)}) for name, kinds in seen.items()}


def _kind_of(value: Any) -> type:
    if type(value) is not int or abs(value) <= _MAX_EXACT:
        return type(value)
    return _LongInt if -(1 << 63) <= value < 1 << 63 else _HugeInt


def _type_of(kinds: set[type]) -> pa.DataType | None:
    if kinds <= {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds <= {int, _LongInt}:
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    return None


def _column_names(carried: Mapping[str, Any]) -> dict[str, str]:
    taken = {*_OWN_TYPES, "record", *carried}
    columns = {}
    for name in carried:
        column = name
        if name in _OWN_TYPES or name == "record":
            while column in taken:
                column = f"carried.{column}"
            taken.add(column)
        columns[name] = column
    return columns


def _table(batch: Sequence[bytes], types: dict[str, pa.DataType | None], schema: pa.Schema) -> pa.Table:
    records = [orjson.loads(line) for line in batch]
    own = list(zip(*map(_own_values, records), strict=True)) or [()] * len(_OWN_TYPES)
    carried = [record.get("carried", {}) for record in records]
    columns: list[Any] = list(own)
    for name, kind in types.items():
        values = [row.get(name) for row in carried]
        if kind is None:
            values = [None if value is None else orjson.dumps(value).decode() for value in values]
        columns.append(values)
    columns.append([line.rstrip(b"\n").decode() for line in batch])
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _own_values(record: dict[str, Any]) -> tuple[Any, ...]:
    """A line's values in the order of `_OWN_TYPES`."""
    response = record.get("response")
    body = record if response is None else response["body"]
    given_id = record.get("id") if response is None else record["custom_id"]
    choice = (body.get("choices") or [body])[0]
    usage = body.get("usage") or {}
    error = body.get("error") or {}
    message = choice.get("message")
    return (
        None if given_id is None else str(given_id),
        choice.get("text") if message is None else message["content"],
        choice.get("finish_reason"),
        choice.get("output_ids"),
        usage.get("prompt_tokens"),
        usage.get("cached_tokens", usage.get("prompt_tokens_details", {}).get("cached_tokens")),
        usage.get("completion_tokens"),
        error.get("code"),
        error.get("message"),
    )
