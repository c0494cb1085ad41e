"""Grammars of planned requests: why one cannot be used, and how long one must go on. Runs in the scheduler's process.

(Upstream: ``srt/constrained``.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import types
from collections import OrderedDict
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from batchllm.srt.managers.io_struct import INVALID_GRAMMAR, PLANNED_ID

MAX_GRAMMARS = 512
MAX_COMPILED_BYTES = 256 << 20
_NOT_COMPILED = re.compile(r"Failed to compile (\w+) grammar: (.*)", re.DOTALL)
_TIMED_OUT = "Grammar preprocessing timed out"
_PLACE_IN_LIBRARY = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_NAMES = {"json": "json_schema"}


def explain_abort(reason: Any, *, has_grammar: bool) -> Any:
    """Why a request was aborted: where its grammar is at fault, in words for the row and with a code; else as it is.

    Args:
        reason: SGLang's finish reason.
        has_grammar: The request was running by a grammar.
    """
    if not isinstance(reason, FINISH_ABORT) or reason.err_type == INVALID_GRAMMAR:
        return reason
    found = _NOT_COMPILED.match(reason.message)
    if found is not None:
        name = _NAMES.get(found[1], found[1])
        said = _PLACE_IN_LIBRARY.sub("", found[2]).strip()
        message = f"{name} is refused by the grammar library: {said}"
    elif reason.message.startswith(_TIMED_OUT):
        message = "the grammar takes too long to compile; make it smaller"
    elif has_grammar and reason.status_code is None and reason.message == FINISH_ABORT().message:
        message = "the grammar cannot be followed: no token of this model goes on from here"
    else:
        return reason
    return FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, INVALID_GRAMMAR)


def quiet_row_faults() -> None:
    """Keep out of the log what SGLang says, as errors, of planned requests with such a grammar: their rows say it."""
    for name in ("constrained.xgrammar_backend", "managers.schedule_batch"):
        logging.getLogger(f"sglang.srt.{name}").addFilter(_is_no_row_fault)


def _is_no_row_fault(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not (said.startswith("Hit invalid ") or f"self.rid={PLANNED_ID!r}"[:-1] in said)


class _LastUsed(OrderedDict[Any, Any]):
    """Compiled grammars by what they are of, of the last `MAX_GRAMMARS` that were used."""

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            self.move_to_end(key)
        return super().get(key, default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > MAX_GRAMMARS:
            self.popitem(last=False)


@contextlib.contextmanager
def bounded_compilers() -> Iterator[None]:
    """Compilers of the grammar library that are made in here forget what was not used for long; rows may each have a
    grammar of their own.
    """
    from sglang.srt.constrained import xgrammar_backend

    from batchllm.srt.constrained.checked_compiler import CheckedCompiler

    before = xgrammar_backend.GrammarCompiler
    xgrammar_backend.GrammarCompiler = functools.partial(CheckedCompiler, cache_limit_bytes=MAX_COMPILED_BYTES)
    try:
        yield
    finally:
        xgrammar_backend.GrammarCompiler = before


def bound_cache(backend: Any) -> None:
    """Have SGLang, too, forget grammars that were not used for long.

    Args:
        backend: SGLang's grammar backend; None where there is none.
    """
    while backend is not None:
        backend.cache = _LastUsed()
        backend = getattr(backend, "grammar_backend", None)  # inside one that lets reasoning go first


def hold_stops(grammar: Any, stop_ids: list[int], num_tokens: int) -> None:
    """Let a grammar end only behind so many tokens, or where nothing else goes on.

    SGLang forbids stop tokens by their scores, whatever the grammar: where it allows only those, nothing would be left.

    Args:
        grammar: xgrammar's; others end where they end.
        stop_ids: Tokens that end an answer.
        num_tokens: Fewest tokens before one of them.
    """
    if not hasattr(grammar, "accepted_tokens"):
        return
    fill = grammar.fill_vocab_mask

    def fill_without_stops(self: Any, vocab_mask: Any, idx: int) -> None:
        fill(vocab_mask, idx)
        if len(self.accepted_tokens) >= num_tokens:
            return
        row = vocab_mask[idx]
        before = row.clone()
        for token_id in stop_ids:
            row[token_id // 32] &= ~(1 << token_id % 32) if token_id % 32 < 31 else 0x7FFFFFFF
        if not row.any():
            row.copy_(before)

    grammar.fill_vocab_mask = types.MethodType(fill_without_stops, grammar)
