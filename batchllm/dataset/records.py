"""What reading one input line gives: a `Row` that can run, or a `BadRow` that says why it cannot.

Knows the shape of both, nothing of how they are parsed or written.

INVARIANT: every non-blank input line becomes exactly one of the two, with its own ``index``.

Codes of a `BadRow`; they are part of the output format and never change meaning:

    the line      invalid_utf8, invalid_json, nested_too_deep, lone_surrogate, not_an_object
    its fields    unknown_field, invalid_method, invalid_url, invalid_body, invalid_namespace
    its id        missing_id, invalid_id, duplicate_id
    its prompt    missing_prompt, ambiguous_prompt, empty_prompt, invalid_prompt, multiple_prompts,
                  invalid_input_ids, invalid_messages, unsupported_content
    its sampling  unknown_parameter, unsupported_parameter, invalid_parameter_type,
                  parameter_out_of_range, conflicting_parameters, invalid_json_schema,
                  invalid_regex, invalid_response_format
    the engine    prompt_too_long, token_id_out_of_range, never_fits_kv_pool, aborted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchllm.errors import RowError
from batchllm.request import Request

RowKind = Literal["plain", "completions", "chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One input row that can run.

    Attributes:
        request: What the inside of batchllm sees of it.
        given_id: The identifier exactly as the row gave it; ``request.row_id`` is its text.
        line: Line number in the input, from 1, blank lines counted.
        model: The model its body names, if it does.
    """

    request: Request
    kind: RowKind
    given_id: str | int
    line: int
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One input row that cannot run, as data for the output.

    Attributes:
        kind: Which format the output line takes; a guess where the line could not be parsed.
        given_id: The identifier as given, or None where the row did not get that far.
        index: Position among the non-blank lines, from 0.
        line: Line number in the input, from 1.
        param: The field at fault, if one is.
        status_code: HTTP status of an OpenAI output line: 400 the caller's mistake, 500 ours.
    """

    kind: RowKind
    given_id: str | int | None
    index: int
    line: int
    code: str
    message: str
    param: str | None = None
    status_code: int = 400


def reject(row: Row, error: RowError, *, status_code: int = 400) -> BadRow:
    """Turns a row that read well into a bad one, for what only the engine could tell."""
    return BadRow(
        kind=row.kind,
        given_id=row.given_id,
        index=row.request.index,
        line=row.line,
        code=error.code,
        message=error.message,
        param=error.param,
        status_code=status_code,
    )
