"""What the rows of a dataset are sorted by: texts that begin alike where prompts do.

Knows rows and how they are read from a table; not tokens, which are made by engines, nor Ray.

INVARIANT: rows whose prompts begin with the same text, or the same token ids, have keys that begin alike, as far as
`MAX_KEY_LEN`; keys of rows with different ids differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from batchllm.dataset import BadRow, ColumnMap, Row, parse_sampling, read_table
from batchllm.dataset.scoring import checked
from batchllm.errors import ConfigError, RowError
from batchllm.request import Request, SamplingParams

MAX_KEY_LEN = 1 << 16
"""Characters of a prompt that are compared."""
_TOKENS_PER_CHARACTER = 0.25
_TIE_LEN = 17
_FIRST_ID = 0x100
_SURROGATES = (0xD800, 0xE000)
"""Code points that no text may have."""


class RowKey(NamedTuple):
    """What is known of a row before it has tokens.

    Attributes:
        key: Its key.
        scale: Tokens that a character of it stands for.
        prompt_len: Tokens of its prompts, about.
        decode_len: Tokens that it is expected to generate, of all its samples.
    """

    key: str
    scale: float
    prompt_len: float
    decode_len: float


class TableReader:
    """How the tables of a dataset are read.

    Args:
        columns: Where the id and the prompt are, and what to carry to the output; None: the fields of a row.
        sampling: Sampling of rows that say nothing, in SGLang's names.

    Raises:
        ConfigError: ``sampling`` is wrong.
    """

    def __init__(self, columns: ColumnMap | None, sampling: Mapping[str, Any] | None) -> None:
        self.columns = ColumnMap() if columns is None else columns
        self._chosen = tuple(sampling or ())
        try:
            self._defaults = checked(parse_sampling(dict(sampling or {}), defaults=SamplingParams()))
        except RowError as error:
            raise ConfigError(f"sampling: {error.message}") from error

    def read(self, table: Any) -> Iterator[Row | BadRow]:
        """The rows of a table that has some, numbered within it; each must give its id."""
        return read_table(table, name="the dataset", defaults=self._defaults, chosen=self._chosen, columns=self.columns)


def row_key(row: Row | BadRow) -> RowKey:
    """The key of a row; a bad one, which costs nothing, has one all the same."""
    if isinstance(row, BadRow):
        return RowKey(_tie(str(row.given_id)), 1.0, 0.0, 0.0)
    request = row.request
    prompts = request.prompts or (request.input_ids or _text_of(request),)
    scale = _TOKENS_PER_CHARACTER if isinstance(prompts[0], str) else 1.0
    num_decoded = request.expected_new_tokens or request.sampling.max_new_tokens
    return RowKey(
        (_namespace(request) + _as_text(prompts[0]))[:MAX_KEY_LEN] + _tie(request.row_id),
        scale,
        scale * sum(map(len, prompts)),
        float(num_decoded * request.sampling.n * len(prompts)),
    )


def shared_len(key: str, other: str) -> int:
    """Characters of prompts that two keys begin with, both."""
    limit = min(len(key), len(other)) - _TIE_LEN
    low = 0
    while low < limit:  # comparing texts is fast, finding where they part is not
        middle = (low + limit + 1) // 2
        if key[low:middle] == other[low:middle]:
            low = middle
        else:
            limit = middle - 1
    return low


def _text_of(request: Request) -> str:
    if request.prompt is not None:
        return request.prompt
    if request.ranking is not None:
        return f"{request.ranking.instruct}\0{request.ranking.query}"
    fields = {} if request.chat is None else request.chat.fields
    tools = orjson.dumps(fields["tools"]).decode() if "tools" in fields else ""  # templates put them in front
    return tools + "\0".join(orjson.dumps(message).decode() for message in request.messages or ())


def _namespace(request: Request) -> str:
    adapter = request.sampling.lora_path or ""
    return f"{adapter}\0{request.namespace}\0" if adapter or request.namespace else ""


def _as_text(prompt: str | Sequence[int]) -> str:
    """A prompt with a character for each token, where it is given as token ids. They sort as the ids do."""
    if isinstance(prompt, str):
        return prompt
    first, end = _SURROGATES
    codes = np.asarray(prompt[:MAX_KEY_LEN], np.int64) + _FIRST_ID
    codes[codes >= first] += end - first
    return codes.clip(max=sys.maxunicode).astype("<u4").tobytes().decode("utf-32-le")


def _tie(row_id: str) -> str:
    """What tells rows of the same prompt apart."""
    return f"\0{xxhash.xxh64_hexdigest(row_id.encode())}"
