"""Grammars and stops of planned requests, without a running engine."""

from __future__ import annotations

import logging
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from sglang.srt.constrained import xgrammar_backend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH

from batchllm.prefix_cache.pin_ledger import PinLedger
from batchllm.scheduler.output_length import OutputLengths
from batchllm.srt.constrained import grammars
from batchllm.srt.constrained.grammars import (
    bound_cache,
    bounded_compilers,
    explain_abort,
    hold_stops,
    quiet_row_faults,
)
from batchllm.srt.managers.io_struct import PLANNED_ID
from batchllm.srt.managers.planned_intake import RunReader
from batchllm.srt.managers.schedule_batch import find_stop

_VOCAB = ["a", "b", "</s>"]
_STOP = 2


def not_compiled(message: str) -> Any:
    return FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")


@pytest.mark.parametrize("pattern", ["(?!x)a", "[a", "\\p{L}"])
def test_why_a_grammar_does_not_compile_has_neither_file_nor_clock(pattern: str) -> None:
    """The library's own message, as SGLang hands it on."""
    with pytest.raises(RuntimeError) as caught:
        xgrammar.Grammar.from_regex(pattern)
    said = explain_abort(not_compiled(f"Failed to compile regex grammar: {caught.value}"), has_grammar=False)
    assert said.err_type == "invalid_grammar"
    assert said.message.startswith("regex is refused by the grammar library: Regex parsing error at position ")
    assert ".cc" not in said.message and "[" not in said.message.split("Regex parsing")[0]


@pytest.mark.parametrize(
    ("reason", "has_grammar", "code"),
    [
        (not_compiled("Grammar preprocessing timed out: req.grammar_key=('regex', 'a')"), False, "invalid_grammar"),
        (FINISH_ABORT(), True, "invalid_grammar"),
        (FINISH_ABORT(), False, None),
        (FINISH_ABORT("taken back"), True, None),
        (not_compiled("Aborted by AbortReq."), True, "BadRequestError"),
    ],
)
def test_only_a_grammars_own_fault_is_called_one(reason: Any, has_grammar: bool, code: str | None) -> None:
    assert explain_abort(reason, has_grammar=has_grammar).err_type == code


def test_an_end_that_is_no_abort_stays_as_it_is() -> None:
    reason = FINISH_LENGTH(length=3)
    assert explain_abort(reason, has_grammar=True) is reason


def test_what_a_row_says_is_not_said_in_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    quiet_row_faults()
    backend, request = (
        logging.getLogger(f"sglang.srt.{n}") for n in ("constrained.xgrammar_backend", "managers.schedule_batch")
    )
    backend.error("Hit invalid regex: key_string='['")
    request.error(f"Failed to compile regex grammar: a, self.rid={PLANNED_ID + '0:0'!r}")
    assert caplog.messages == []
    request.error("Failed to compile regex grammar: a, self.rid='of a live one'")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("pattern", "allowed"), [("a*", {0}), ("a", {_STOP})])
def test_stops_are_held_where_the_grammar_goes_on(pattern: str, allowed: set[int]) -> None:
    """Behind one token of at least two: a grammar that may go on must, one that has come to its end may end."""
    info = xgrammar.TokenizerInfo(_VOCAB, stop_token_ids=[_STOP])
    compiled = xgrammar.GrammarCompiler(info).compile_regex(pattern)
    grammar = XGrammarGrammar(xgrammar.GrammarMatcher(compiled), len(_VOCAB), compiled, None)
    hold_stops(grammar, [_STOP], 2)
    grammar.accept_token(0)
    mask = xgrammar.allocate_token_bitmask(1, len(_VOCAB))
    grammar.fill_vocab_mask(mask, 0)
    assert {i for i in range(len(_VOCAB)) if (int(mask[0, 0]) >> i) & 1} == allowed
    if pattern == "a*":
        grammar.accept_token(0)
        grammar.fill_vocab_mask(mask, 0)
        assert (int(mask[0, 0]) >> _STOP) & 1


def test_a_stop_tokens_bit_may_be_the_sign() -> None:
    """Masks are of signed words."""
    mask: Any = torch.full((1, 2), -1, dtype=torch.int32)
    grammar = SimpleNamespace(accepted_tokens=[], fill_vocab_mask=lambda vocab_mask, idx: None)
    hold_stops(grammar, [31, 32], 1)
    grammar.fill_vocab_mask(mask, 0)
    assert mask.tolist() == [[0x7FFFFFFF, -2]]


@pytest.mark.parametrize(
    ("text", "early", "stop", "at"),
    [
        ("abcabc", "", "abc", 0),
        ("abcabc", "abc", "abc", 3),
        ("abcabc", "ab", "abc", 0),  # it was not complete
        ("aab", "a", "aa", 0),
        ("abc", "abc", "c", -1),
        ("né!", "n\ufffd", "é", 1),  # half of it was there
    ],
)
def test_a_stop_string_counts_that_ends_behind_the_early_part(text: str, early: str, stop: str, at: int) -> None:
    assert find_stop(text, early, stop) == at


def reader() -> RunReader:
    config: Any = SimpleNamespace(vocab_size=100, hf_eos_token_id={7, 300})
    return RunReader(PinLedger(), OutputLengths(), _Words(), config, learns_lengths=True)


class _Words:
    """A tokenizer that only counts words, and refuses half characters as the real ones do."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        text.encode()
        return [0] * len(text.split())


KWARGS: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 2, "stop": None, "stop_token_ids": None}


def test_fewest_tokens_are_kept_from_every_end_that_the_model_has() -> None:
    """SGLang forbids the tokenizer's own meanwhile; of the model's others those that its scores are of."""
    params, fault = reader()._sampling_params(KWARGS)
    assert fault is None and params.stop_token_ids == {7}
    params, _ = reader()._sampling_params({**KWARGS, "min_new_tokens": 0})
    assert params.stop_token_ids is None


def test_sampling_that_sglang_refuses_ends_its_own_requests() -> None:
    """An exception would end the scheduler, and everybody with it."""
    params, fault = reader()._sampling_params({**KWARGS, "stop": ["\ud83d"]})
    assert fault is not None and fault.err_type == "invalid_sampling"
    assert params.is_normalized


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("regex", "\0"),
        ("regex", "a\0b"),
        ("json_schema", '{"type": "string", "pattern": "\\u0000"}'),
        ("json_schema", '{"anyOf": [{"type": "object", "patternProperties": {"\\u0000": {"type": "integer"}}}]}'),
        ("structural_tag", '{"type": "structural_tag", "format": {"type": "regex", "pattern": "\\u0000"}}'),
    ],
)
def test_an_expression_with_nul_is_refused_before_it_ends_the_process(kind: str, grammar: str) -> None:
    """The library crashes, or compiles what is in front of it. An escaped NUL is taken."""
    with bounded_compilers():
        info = xgrammar.TokenizerInfo(_VOCAB, stop_token_ids=[_STOP])
        compiler = xgrammar_backend.GrammarCompiler(tokenizer_info=info)
    compile_one = getattr(compiler, f"compile_{kind}")
    with pytest.raises(RuntimeError, match=r"has a NUL, where the library would end it; write \\u0000"):
        compile_one(grammar)
    escaped = grammar.replace("\\u0000", "\\\\u0000").replace("\0", "\\u0000")
    assert compile_one(escaped).memory_size_bytes > 0


def test_a_grammar_for_each_row_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang keeps each one that was ever compiled, and so does the library: what was not used for long is dropped."""
    monkeypatch.setattr(grammars, "MAX_GRAMMARS", 8)
    monkeypatch.setattr(grammars, "MAX_COMPILED_BYTES", 20_000)
    backend = XGrammarGrammarBackend.__new__(XGrammarGrammarBackend)
    with bounded_compilers():
        info = xgrammar.TokenizerInfo(_VOCAB, stop_token_ids=[_STOP])
        backend.grammar_compiler = xgrammar_backend.GrammarCompiler(tokenizer_info=info)
    bound_cache(SimpleNamespace(grammar_backend=backend, cache={}))
    sizes = []
    for i in range(200):
        compiled = backend.grammar_compiler.compile_regex(f"{i:08b}".replace("0", "a").replace("1", "b"))
        backend.set_cache(("regex", str(i)), compiled)
        assert backend.cache.get(("regex", "0")) is not None  # used again and again
        sizes.append(backend.grammar_compiler.get_cache_size_bytes())
    assert len(backend.cache) == 8
    assert {key for _, key in backend.cache} >= {"0", "199"}
    assert max(sizes) <= 2 * 20_000  # it says itself that it may be somewhat more
    assert xgrammar_backend.GrammarCompiler is xgrammar.GrammarCompiler
    bound_cache(None)
