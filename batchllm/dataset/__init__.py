"""The dataset room: rows in, rows out.

Reads JSON lines (plain rows and OpenAI batch rows, mixed at will) into `Row` and `BadRow`, and
writes answers and errors back in the formats of the rows. Knows nothing of tokenizers, plans or
engines.

INVARIANT: a bad row is data, never an exception that stops the others.
"""

from batchllm.dataset.jsonl import read_rows
from batchllm.dataset.limits import check_prompt_len, check_token_ids, fit_max_new_tokens
from batchllm.dataset.records import BadRow, Row, RowKind, reject
from batchllm.dataset.responses import find_abort, render_error, render_success
from batchllm.dataset.sampling import parse_sampling
from batchllm.dataset.sink import JsonlSink, check_writable

__all__ = [
    "BadRow",
    "JsonlSink",
    "Row",
    "RowKind",
    "check_prompt_len",
    "check_token_ids",
    "check_writable",
    "find_abort",
    "fit_max_new_tokens",
    "parse_sampling",
    "read_rows",
    "reject",
    "render_error",
    "render_success",
]
