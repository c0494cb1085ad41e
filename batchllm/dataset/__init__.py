"""The dataset room: rows in, rows out.

Reads plain rows and OpenAI batch rows, mixed at will, from JSON lines and tables into `Row` and `BadRow`,
and writes answers and errors back in the formats of the rows. Knows nothing of tokenizers, plans or engines.

INVARIANT: a bad row is data, never an exception that stops the others.
"""

from batchllm.dataset.column_map import ColumnMap
from batchllm.dataset.limits import check_prompt_len, check_token_ids, fit_max_new_tokens
from batchllm.dataset.records import BadRow, Row, RowHead, RowKind, reject
from batchllm.dataset.responses import find_abort, render_error, render_success
from batchllm.dataset.row_ids import RowIds, duplicate_error
from batchllm.dataset.rows import read_rows, read_table
from batchllm.dataset.sampling import parse_sampling
from batchllm.dataset.sources import Input, InputFormat, open_input
from batchllm.dataset.writers import check_writable

__all__ = [
    "BadRow",
    "ColumnMap",
    "Input",
    "InputFormat",
    "Row",
    "RowHead",
    "RowIds",
    "RowKind",
    "check_prompt_len",
    "check_token_ids",
    "check_writable",
    "duplicate_error",
    "find_abort",
    "fit_max_new_tokens",
    "open_input",
    "parse_sampling",
    "read_rows",
    "read_table",
    "reject",
    "render_error",
    "render_success",
]
