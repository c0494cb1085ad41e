"""Compiler of grammars that refuses what would end the process. Runs in the scheduler's process.

(Upstream: xgrammar, whose converter of regular expressions takes NUL for their end, and crashes where it is the
beginning.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
from xgrammar import CompiledGrammar, GrammarCompiler, StructuralTag

_NUL = "\0"
_ESCAPED = "\\u0000"


class CheckedCompiler(GrammarCompiler):
    """xgrammar's, with regular expressions looked at before they are compiled, wherever they are.

    Raises:
        RuntimeError: By its methods, as by xgrammar's: SGLang makes an answer of that.
    """

    def compile_regex(self, regex: str) -> CompiledGrammar:
        _check([regex])
        return super().compile_regex(regex)

    def compile_json_schema(self, schema: Any, **options: Any) -> CompiledGrammar:
        _check_json(schema)
        return super().compile_json_schema(schema, **options)

    def compile_structural_tag(self, *args: Any, **options: Any) -> CompiledGrammar:
        tag = args[0]
        _check_json(tag.model_dump_json() if isinstance(tag, StructuralTag) else tag)
        return super().compile_structural_tag(*args, **options)


def _check_json(text: str) -> None:
    if _ESCAPED not in text:
        return
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return  # the library says what is wrong
    _check(_expressions(value))


def _check(expressions: Iterator[str] | list[str]) -> None:
    if any(_NUL in expression for expression in expressions):
        raise RuntimeError(f"a regular expression has a NUL, where the library would end it; write {_ESCAPED}")


def _expressions(value: Any) -> Iterator[str]:
    """Whatever may be a regular expression in a schema or a structural tag."""
    if isinstance(value, list):
        for item in value:
            yield from _expressions(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "pattern" and isinstance(item, str):
                yield item
            if name == "patternProperties" and isinstance(item, dict):
                yield from item
            yield from _expressions(item)
