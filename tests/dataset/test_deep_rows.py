"""Rows that are nested deep: what is read of them can be written, or they are refused by themselves."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from batchllm.dataset import BadRow, Row, read_rows
from batchllm.offline.row_spool import RowSpool
from batchllm.request import SamplingParams

Body = dict[str, Any]
MESSAGES = [{"role": "user", "content": "x"}]

SCHEMAS: list[Callable[[Body], Body]] = [
    lambda deep: {"json_schema": deep},
    lambda deep: {"json_schema": json.dumps(deep)},
    lambda deep: {"response_format": {"type": "structural_tag", "tag": deep}},
    lambda deep: {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
]
OPTIONS: list[Callable[[Body], Body]] = [
    lambda deep: {"tools": [deep]},
    lambda deep: {"tool_choice": deep},
    lambda deep: {"reasoning": deep},
    lambda deep: {"reasoning_effort": deep},
    lambda deep: {"chat_template_kwargs": deep},
    lambda deep: {"task": deep},
    lambda deep: {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": deep}]}]},
    lambda deep: {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": deep}]}]},
    lambda deep: {"tools": [{}], "messages": [{"role": "assistant", "tool_calls": [deep]}]},
    lambda deep: {"messages": [{"role": "user", "content": "x", "tools": deep}]},
    lambda deep: {"metadata": deep},
]
REFUSED: list[Callable[[Body], Body]] = [
    lambda deep: {"stop": deep},
    lambda deep: {"logit_bias": deep},
    lambda deep: {"messages": deep},
    lambda deep: {"nonsense": deep},
]


def _nested(depth: int) -> Body:
    value: Body = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def _record(body: Body) -> Body:
    body = {"messages": MESSAGES} | body
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


def _read(*bodies: Body) -> list[Row | BadRow]:
    lines = "\n".join(json.dumps(_record(body) | {"custom_id": str(i)}) for i, body in enumerate(bodies))
    return list(read_rows(io.BytesIO(lines.encode()), defaults=SamplingParams()))


@pytest.mark.parametrize("depth", [100, *range(244, 258), 300, 600, 900])
@pytest.mark.parametrize("make", [*SCHEMAS, *OPTIONS, *REFUSED])
def test_what_is_read_can_be_written_and_the_other_rows_run(
    make: Callable[[Body], Body], depth: int, tmp_path: Path
) -> None:
    """Heads of rows are written as JSON; requests go from process to process as pickles."""
    before, row, after = _read({}, make(_nested(depth)), {})
    assert isinstance(before, Row) and isinstance(after, Row)
    if isinstance(row, Row):
        with contextlib.closing(RowSpool(tmp_path)) as spool:
            spool.append(row.head)
            spool.flush()
            assert spool.read(0) == row.head
        orjson.dumps(msgspec.structs.astuple(row.head))  # lines of the output repeat some of it
        pickle.dumps((row.request, row.head))


@pytest.mark.parametrize("make", OPTIONS)
def test_what_is_nested_a_hundred_deep_is_taken(make: Callable[[Body], Body]) -> None:
    (row,) = _read(make(_nested(100)))
    assert isinstance(row, Row)
