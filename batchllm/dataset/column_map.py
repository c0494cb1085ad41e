"""Which columns of an input are the id and the prompt, and which go with the row to the output.

Knows column names, templates and JSON values; not files, Arrow, or what a prompt must look like: the records made
here are checked by `plain_rows` and `openai_rows` like any other.

INVARIANT: a column that was named by the user is used or the row is refused; columns that are neither named nor
fields of a row are ignored. ``score`` and ``continuation`` are fields where ``score`` is an object; in a line whose
prompt is its own ``continuation`` is one anyway.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from batchllm.dataset.field_checks import json_bytes, show
from batchllm.dataset.openai_rows import ROW_FIELDS as OPENAI_FIELDS
from batchllm.dataset.plain_rows import PROMPT_FIELDS, ROW_FIELDS, SCORE_FIELDS
from batchllm.errors import ConfigError, RowError

_JSON_FIELDS = ("input_ids", "messages", "sampling_params", "expected_new_tokens", "body", "score")
"""Fields that may be JSON text: a column of structs gives every row the keys of all."""
_OTHER_FIELDS = ROW_FIELDS.difference(PROMPT_FIELDS)
_MAX_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMap:
    """How the columns of an input become rows. Without arguments: the fields of a row, under their own names.

    Attributes:
        id_column: The row's identifier, instead of ``id`` or ``custom_id``.
        prompt_column: Text to answer.
        messages_column: Chat messages, as a list or its JSON text.
        template: Text to answer, with columns in braces: ``"Summarize: {text}"``; a brace of its own is doubled.
        carry: Columns to repeat in the output; null where a row has no value.

    Raises:
        ConfigError: A template cannot be read, a name is empty or twice there, or there is more than one prompt.
    """

    id_column: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    template: str | None = None
    carry: tuple[str, ...] = ()
    names_prompt: bool = field(init=False, repr=False, compare=False)
    """True where the user said what the prompt is, so that no row is an OpenAI row."""
    _pieces: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sources = {
            "--prompt-column": self.prompt_column,
            "--messages-column": self.messages_column,
            "--template": self.template,
        }
        given = [flag for flag, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: each says what the prompt is; give one of them")
        for flag, name in (("--id-column", self.id_column), *sources.items(), *(("--carry", c) for c in self.carry)):
            if name == "":
                raise ConfigError(f"{flag}: is empty")
        for number, name in enumerate(self.carry):
            if name in self.carry[:number]:
                raise ConfigError(f"--carry {name}: is given twice")
        object.__setattr__(self, "names_prompt", bool(given))
        object.__setattr__(self, "_pieces", () if self.template is None else _parse_template(self.template))

    def columns(self) -> frozenset[str]:
        """Every column that may be read; no other one needs to be loaded."""
        return self.row_columns().union(self.carry)

    def row_columns(self) -> frozenset[str]:
        """Those of `columns` that rows are made of; the others are only carried."""
        fields = _OTHER_FIELDS if self.names_prompt else ROW_FIELDS | OPENAI_FIELDS
        return fields.union(name for flag, name in self._named() if flag != "--carry")

    def check_columns(self, there: Collection[str], where: str) -> None:
        """Checks a table's columns before any row is read.

        Args:
            where: Flag and path of the table, for messages.

        Raises:
            ConfigError: A column that the user named is not there, or none that could be a prompt.
        """
        for flag, name in self._named():
            if name not in there:
                raise ConfigError(f"{flag}: {where} has no column {show(name)}; it has {_listed(there)}")
        if not self.names_prompt and not self.is_openai(there) and not any(name in there for name in PROMPT_FIELDS):
            raise ConfigError(
                f"{where}: has no column prompt, input_ids or messages; name one with --prompt-column or "
                f"--messages-column, or give a --template; it has {_listed(there)}"
            )

    def is_openai(self, columns: Iterable[str]) -> bool:
        """True where the columns are those of an OpenAI batch row; one of them may be missing.

        One alone says nothing: many tables have a ``url`` or a ``body``.
        """
        return not self.names_prompt and len(OPENAI_FIELDS.intersection(columns)) >= len(OPENAI_FIELDS) - 1

    def apply(self, record: dict[str, Any], *, is_openai: bool, is_table: bool = True) -> dict[str, Any]:
        """Makes the record of a plain row or of an OpenAI row.

        Args:
            is_openai: As `is_openai` says of the record.
            is_table: It is a row of a table; False for a line, whose ``continuation`` is nothing but a row's field.

        Raises:
            RowError: A column that the user named has no value in this row, or JSON text is not JSON.
        """
        fields = OPENAI_FIELDS if is_openai else _OTHER_FIELDS if self.names_prompt else ROW_FIELDS
        made = {name: record[name] for name in fields if name in record}
        if not _asks_for_scores(made.get("score")):  # many tables have a score, a number, of their own
            others = SCORE_FIELDS if is_table or self.names_prompt else {"score"}
            made = {name: value for name, value in made.items() if name not in others}
        if self.template is not None:
            made["prompt"] = self._fill_template(record)
        elif self.prompt_column is not None:
            made["prompt"] = _value(record, self.prompt_column)
        elif self.messages_column is not None:
            made["messages"] = _value(record, self.messages_column)
        for name in _JSON_FIELDS:
            value = made.get(name)
            if isinstance(value, str):
                made[name] = _from_text(name, value)
        if isinstance(made.get("messages"), dict):
            made["messages"] = _by_message(made["messages"])
        return made

    def carried(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The columns to repeat in the output; None where none were asked for.

        Raises:
            RowError: A value is nested deeper than can be written.
        """
        if not self.carry:
            return None
        values = {name: record.get(name) for name in self.carry}
        for name, value in values.items():
            if isinstance(value, (dict, list)):
                _json_bytes(name, [[value]])  # as deep as it will lie in the output line
        return values

    def _named(self) -> Iterable[tuple[str, str]]:
        """``(flag, column)`` of every column that the user named."""
        for flag, name in (
            ("--id-column", self.id_column),
            ("--prompt-column", self.prompt_column),
            ("--messages-column", self.messages_column),
            *(("--template", name) for _, name in self._pieces),
            *(("--carry", name) for name in self.carry),
        ):
            if name is not None:
                yield flag, name

    def _fill_template(self, record: dict[str, Any]) -> str:
        parts: list[str] = []
        for literal, name in self._pieces:
            parts.append(literal)
            if name is not None:
                parts.append(_as_text(name, _value(record, name)))
        return "".join(parts)


def _asks_for_scores(value: object) -> bool:
    """It is an object, or the JSON text of one."""
    return isinstance(value, dict) or (isinstance(value, str) and value.lstrip().startswith("{"))


def _parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pairs of literal text and the column behind it; the last may have none.

    Raises:
        ConfigError: There is more in braces than a name, or no column at all.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _bad_template(template, f"{error}; write a brace of its own twice") from None
    pieces: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion or any(c in name for c in ".[]")):
            inside = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            raise _bad_template(template, f"{inside} must be the plain name of a column, e.g. {{text}}")
        pieces.append((literal, name))
    if all(name is None for _, name in pieces):
        raise _bad_template(template, "names no column, so that all prompts would be alike; write e.g. {text}")
    return tuple(pieces)


def _bad_template(template: str, what: str) -> ConfigError:
    return ConfigError(f"--template {show(template)}: {what}")


def _value(record: dict[str, Any], name: str) -> Any:
    value = record.get(name)
    if value is None:
        there = [column for column, other in record.items() if other is not None]
        raise RowError(
            f"the row has no value in column {show(name)}; it has {_listed(there)}",
            code="missing_column",
            param=name,
        )
    return value


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _json_bytes(name, value).decode()


def _json_bytes(name: str, value: Any) -> bytes:
    return json_bytes(f"column {show(name)}", value, param=name)


def _from_text(name: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(
            f"{name} is text, and not JSON: {error.msg} at column {error.colno}", code="invalid_column", param=name
        ) from None


def _by_message(columns: dict[str, Any]) -> Any:
    """The list of messages that a struct of equally long lists is: so `datasets` writes a ``Sequence`` of a dict."""
    lens = {len(values) if isinstance(values, list) else None for values in columns.values()}
    if len(lens) != 1 or None in lens:
        return columns
    return [
        {name: value for name, value in zip(columns, values, strict=True) if value is not None}
        for values in zip(*columns.values(), strict=True)
    ]


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _MAX_NAMES_SHOWN} more" if len(listed) > _MAX_NAMES_SHOWN else ""
    return (", ".join(map(show, listed[:_MAX_NAMES_SHOWN])) or "none") + more
