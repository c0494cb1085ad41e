"""Whether a file can be a batch: every line's envelope, and ids that occur once.

Knows lines and what is around a request's body; what is in the body is looked at when the row runs, and its mistakes
cost that row alone.

INVARIANT: a file is good as a whole or not at all; memory is one line and 24 bytes a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchllm.dataset import RowIds
from batchllm.dataset.decompress import NotJsonError, open_unwrapped
from batchllm.dataset.field_checks import show
from batchllm.dataset.jsonl import parse_lines
from batchllm.dataset.openai_rows import check_envelope
from batchllm.dataset.records import BrokenRecord
from batchllm.errors import RowError

MAX_SHOWN = 100
"""Errors that are reported one by one."""


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What is to be said of a file.

    Attributes:
        num_rows: Rows of the file.
        errors: The first of what is wrong, as objects of a batch's ``errors``; empty if nothing is.
        num_errors: How much is wrong.
    """

    num_rows: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_errors: int = 0

    def add(self, error: RowError, line: int | None) -> None:
        """One more thing is wrong."""
        self.num_errors += 1
        if len(self.errors) < MAX_SHOWN:
            self.errors.append({"code": error.code, "line": line, "message": error.message, "param": error.param})


def validate(path: Path, *, endpoint: str, max_rows: int, keep_on: Callable[[], bool]) -> Verdict | None:
    """Look at every line of a file.

    Args:
        path: The file.
        endpoint: Which all rows must name.
        max_rows: Most rows there may be.
        keep_on: Asked before each line.

    Returns:
        What was found; None if ``keep_on`` said to stop.

    Raises:
        OSError: The file cannot be read.
    """
    verdict = Verdict()
    ids, lines = RowIds(), array("q")
    try:
        with open_unwrapped(path) as stream:
            for line, record in parse_lines(stream):
                if not keep_on():
                    return None
                verdict.num_rows += 1
                if verdict.num_rows > max_rows:
                    message = f"the file has more than {max_rows} rows; split it"
                    verdict.add(RowError(message, code="too_many_rows"), line)
                    break
                given_id: str | None = None
                try:
                    given_id = _id_of(record, endpoint)
                except RowError as error:
                    verdict.add(error, line)
                ids.append(given_id)
                lines.append(line)
    except NotJsonError as error:
        verdict.add(RowError(f"the file is {error}; upload JSON lines", code="unsupported_format"), None)
        return verdict
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the file's
            raise
        verdict.add(
            RowError(f"the file cannot be read after {verdict.num_rows} rows: {error}", code="invalid_file"), None
        )
    if verdict.num_rows == 0 and not verdict.errors:
        verdict.add(RowError("the file has no rows", code="empty_file"), None)
    _add_duplicates(verdict, ids, lines)
    return verdict


def _id_of(record: dict[str, Any] | BrokenRecord, endpoint: str) -> str:
    """The line's id."""
    if isinstance(record, BrokenRecord):
        raise record.error
    given_id = record.get("custom_id")
    if given_id is None:
        message = "the row has no custom_id; answers are matched to rows by it"
        raise RowError(message, code="missing_id", param="custom_id")
    if not isinstance(given_id, str) or not given_id:
        message = f"custom_id must be a non-empty string, not {show(given_id)}"
        raise RowError(message, code="invalid_id", param="custom_id")
    check_envelope(record)
    if record["url"] != endpoint:
        message = f"url must be the batch's endpoint, {endpoint}, not {show(record['url'])}"
        raise RowError(message, code="invalid_url", param="url")
    return given_id


def _add_duplicates(verdict: Verdict, ids: RowIds, lines: array[int]) -> None:
    """Duplicates are known only at the end, but reported in the order of lines."""
    others, verdict.errors = verdict.errors, []
    for row, first in ids.find_duplicates():
        message = f"this custom_id is already used on line {lines[first]}; ids must be unique in a file"
        verdict.add(RowError(message, code="duplicate_id", param="custom_id"), lines[row])
    verdict.errors = sorted(others + verdict.errors, key=lambda error: error["line"] or 0)[:MAX_SHOWN]
