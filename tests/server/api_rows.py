"""Batches for the tests of the API: lines in, objects and lines out.

Knows the formats; claims nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
from openai.types import Batch

COMPLETIONS = "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
DEADLINE_S = 60
"""For what ought to take a moment: waiting longer is a failure, not a hung test."""


def row(number: int, **body: Any) -> dict[str, Any]:
    """A row whose prompt ends with its number; every ten of them share the tokens before."""
    body = {"model": "instant", "prompt": [2000 + number // 10, 2500, number], "max_tokens": 4} | body
    return {"custom_id": f"r{number}", "method": "POST", "url": COMPLETIONS, "body": body}


def rows_of(num_rows: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [row(number) for number in range(first, first + num_rows)]


def jsonl(rows: Sequence[Any]) -> bytes:
    """Lines of rows; text stands for itself."""
    return b"".join((one if isinstance(one, str) else json.dumps(one)).encode() + b"\n" for one in rows)


def upload(client: openai.OpenAI, rows: Sequence[Any] | bytes, **more: Any) -> str:
    """Uploads rows; returns the id of the file."""
    data = rows if isinstance(rows, bytes) else jsonl(rows)
    return client.files.create(file=("in.jsonl", data), purpose="batch", **more).id


def begin(client: openai.OpenAI, rows: Sequence[Any] | bytes, **more: Any) -> Batch:
    """Uploads rows and begins a batch of them."""
    asked: dict[str, Any] = {"endpoint": COMPLETIONS, "completion_window": "24h"} | more
    return client.batches.create(input_file_id=upload(client, rows), **asked)


def until(is_so: Callable[[], bool], what: str) -> None:
    """Waits for something to come true."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def wait_for(client: openai.OpenAI, batch_id: str, *statuses: str) -> Batch:
    """Waits for a batch to have one of these statuses, or to have ended."""
    deadline = time.monotonic() + DEADLINE_S
    while (batch := client.batches.retrieve(batch_id)).status not in (statuses or ENDED):
        assert time.monotonic() < deadline, batch
        assert batch.status not in ENDED, batch
        time.sleep(0.02)
    return batch


def wait_for_rows(client: openai.OpenAI, batch_id: str, num_rows: int) -> Batch:
    """Waits for so many rows of a batch to be done."""
    deadline = time.monotonic() + DEADLINE_S
    while counts_of(batch := client.batches.retrieve(batch_id))[1] < num_rows:
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def counts_of(batch: Batch) -> tuple[int, int, int]:
    """Rows in all, answered, failed."""
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """Lines of a file of results; none where there is no file."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def check_each_row_once(client: openai.OpenAI, batch: Batch, num_rows: int, *, first: int = 0) -> None:
    """Every row from `r0` on, or from the first, is in one file of results, once, and an answer is its own."""
    answers, failures = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    found = [line["custom_id"] for line in answers + failures]
    assert sorted(found) == sorted(f"r{number}" for number in range(first, first + num_rows))
    for line in answers:
        assert line["response"]["body"]["choices"][0]["text"] == f"after {line['custom_id'][1:]}"
    assert counts_of(batch) == (num_rows, len(answers), len(failures))
