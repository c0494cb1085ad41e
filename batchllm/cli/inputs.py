"""What the commands read: the flags that name an input, and its rows."""

from __future__ import annotations

import argparse
import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from batchllm.cli.outcome import say
from batchllm.dataset import BadRow, ColumnMap, Input, Row, open_input, parse_sampling, read_rows
from batchllm.dataset.field_checks import any_json_schema_text, json_schema_text
from batchllm.dataset.scoring import checked
from batchllm.dataset.sources import InputFormat
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError, RowError
from batchllm.offline.ingest import Ingest
from batchllm.offline.job_rows import UNLIMITED, JobRows
from batchllm.offline.row_spool import RowSpool
from batchllm.offline.runtime import Chat
from batchllm.offline.token_store import TokenStore
from batchllm.request import ChatPrompt, Ranking, RankingPrompts, SamplingParams
from batchllm.srt.platforms import host_imports
from batchllm.tokenizer import Tokenizer

NO_MODEL = "-m: the name of the model is empty; give a folder or a hub name, or leave -m out"
INPUT_FORMATS = ("jsonl", "parquet", "hf", "csv")


def add_input_flags(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """The flags of an input of rows."""
    if is_required:
        parser.add_argument(
            "-i",
            "--input",
            required=True,
            metavar="IN",
            help="JSON lines or a JSON array (also gzip, zstd, bz2, xz, lz4; UTF-8, -16 or -32), Parquet, Arrow, "
            "Feather, CSV, a Hugging Face dataset directory, a URL, or - for standard input: "
            "OpenAI batch rows, rows with id and prompt, input_ids or messages, or any columns with --template",
        )
    parser.add_argument("-m", "--model", help="Hugging Face model, a directory or a hub name (default: embedded)")
    parser.add_argument("--demo-model", action="store_true", help="without -m: do not say that the model is for trials")
    parser.add_argument("--input-format", choices=INPUT_FORMATS, help="default: by name and contents")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-column", metavar="COLUMN", help="the prompt of a row is this column")
    prompt.add_argument("--messages-column", metavar="COLUMN", help="the chat of a row is this column")
    prompt.add_argument("--template", metavar="TEXT", help="the prompt of a row, with {column} for its columns")
    parser.add_argument("--id-column", metavar="COLUMN", help="the id of a row is this column (default: id)")
    parser.add_argument(
        "--sampling",
        metavar="JSON",
        help='sampling of rows that say nothing, in SGLang\'s names, e.g. \'{"temperature": 0, "max_new_tokens": 64}\'',
    )


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """The flags of `add_input_flags` by their names, and what else a command may say of rows."""

    input: str
    model: str | None = None
    demo_model: bool = False
    input_format: InputFormat | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    template: str | None = None
    id_column: str | None = None
    sampling: str | None = None
    carry: str | None = None
    schema: str | None = None

    def __post_init__(self) -> None:
        if self.model == "":  # a shell's variable that is not set: the embedded model would answer
            raise ConfigError(NO_MODEL)

    @classmethod
    def of(cls, args: argparse.Namespace) -> InputFlags:
        """Those of a command's flags."""
        given = vars(args)
        return InputFlags(**{field.name: given[field.name] for field in fields(InputFlags) if field.name in given})

    @property
    def checks_schemas(self) -> bool:
        """Answers are checked against the schemas that the grammar does not keep."""
        return self.schema == "check"


def column_map(flags: InputFlags) -> ColumnMap | None:
    """How columns become prompts, where a flag says something about it."""
    carry = () if flags.carry is None else tuple(flags.carry.split(","))
    given = (flags.prompt_column, flags.messages_column, flags.template, flags.id_column)
    if not carry and all(flag is None for flag in given):
        return None
    return ColumnMap(
        id_column=flags.id_column,
        prompt_column=flags.prompt_column,
        messages_column=flags.messages_column,
        template=flags.template,
        carry=carry,
    )


def sampling_defaults(flags: InputFlags) -> SamplingParams:
    """Sampling of rows that say nothing.

    Raises:
        ConfigError: ``--sampling`` is not JSON, or not sampling parameters.
    """
    if flags.sampling is None:
        return SamplingParams()
    try:
        mapping = json.loads(flags.sampling)
        json_schema = any_json_schema_text if flags.checks_schemas else json_schema_text
        return checked(parse_sampling(mapping, defaults=SamplingParams(), json_schema=json_schema))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--sampling: is not JSON: {error}") from error
    except RowError as error:
        raise ConfigError(f"--sampling: {error.message}") from error


def rows_of(flags: InputFlags, source: Input) -> Iterator[Row | BadRow]:
    """The rows of an input, as the flags say they are to be read."""
    defaults = sampling_defaults(flags)
    given = {} if flags.sampling is None else json.loads(flags.sampling)
    chosen = [name for name, value in given.items() if value is not None]
    return read_rows(
        source, defaults=defaults, chosen=chosen, checks_schemas=flags.checks_schemas, columns=column_map(flags)
    )


class _PromptTokenizer:
    """A model's tokenizer for prompts, loaded when there is text: it takes seconds to import.

    Args:
        model: A directory or a hub name; the embedded model when None.

    Attributes:
        is_used: There was text.
    """

    def __init__(self, model: str | None) -> None:
        self._model = model
        self.is_used = False

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        self.is_used = True
        return Tokenizer.from_model(self._model or default_model_path())

    @cached_property
    def _chat_tokenizer(self) -> Any:
        self.is_used = True
        host_imports.prepare_environment()
        with host_imports.quiet():
            from batchllm.srt.managers.chat_tokenizer import (
                tokenizer_of_model,  # seconds to import: torch, and parts of SGLang
            )

            return tokenizer_of_model(self._model or default_model_path())

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        return self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        prompts: list[ChatPrompt | RowError] = self._chat_tokenizer.encode_chats(chats)
        return prompts

    def encode_rankings(self, rankings: Sequence[Ranking]) -> list[RankingPrompts | RowError]:
        found: list[RankingPrompts | RowError] = self._chat_tokenizer.encode_rankings(rankings)
        return found


class Prompts:
    """All prompts of an input, tokenized, for commands that run nothing.

    Attributes:
        rows: The rows that can run.
        samples: The rows of ``table``.
        table: The prompt of each sample.
        bad: The rows that cannot run.
        share_lens: Tokens at the start of each prompt that may be shared; None where no prompt is scored.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        flags = InputFlags.of(args)
        with tempfile.TemporaryDirectory(prefix="batchllm-") as name:
            folder = Path(name)
            source = open_input(flags.input, spool_folder=folder, input_format=flags.input_format)
            self.bad: list[BadRow] = []
            store = TokenStore(None, 1 << 60)
            tokenizer = _PromptTokenizer(flags.model)
            self.rows = JobRows(UNLIMITED, tokenizer, store)
            with closing(RowSpool(folder)) as spool:
                ingest = Ingest(np.zeros(0, np.int64), self.bad.append, spool)
                intake = ingest.load(rows_of(flags, source), lambda: self.rows)
        if tokenizer.is_used and flags.model is None and not flags.demo_model:
            say("no -m MODEL: tokens are counted with the embedded model's tokenizer (--demo-model: say nothing)")
        self.samples, self.table = self.rows.sample_table(None if intake is None else intake.left)
        self.share_lens = None
        if self.rows.scores.has_any:
            self.share_lens = self.rows.scores.share_lens(self.samples.all_rows(), self.table.lengths)
