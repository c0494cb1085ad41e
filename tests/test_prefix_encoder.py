"""Texts that begin alike are encoded once, and every text to the ids that the tokenizer itself gives."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.prefix_encoder import MIN_PIECE_CHARS, PrefixEncoder
from tests import vocabularies
from tests.sizes import sized

CUT_AT_WORDS = {"embedded", "tekken", "qwen", "llama"}
WORDS = [
    *(
        "the",
        "river",
        "runs",
        "x",
        "Sea",
        "café",
        "naïve",
        "don't",
        "12345",
        "3.14",
        "река",
        "川の流れ",
        "🦀",
        "e\u0301",
    ),
    *("<|im_start|>", "<|im_end|>", "<|end|>", "<mask>", "[INST]", "<|im_", "big sea", "\n\n", "\n", "\t", "   ", "--"),
    *("def f(x):\n    return x", "a_b", "ALLCAPS", "ﬁne", "\u00a0", "\r\n", "'s", "'LL", "…", "user\n"),
]


@functools.cache
def backend(name: str) -> Any:
    return vocabularies.ALL[name]()


_words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)
_glue = st.sampled_from([" ", " ", " ", ""])


@st.composite
def texts(draw: st.DrawFn) -> list[str]:
    """A few texts over a few documents, each long enough to be cut."""
    documents = []
    for _ in range(draw(st.integers(1, 2))):
        words, glue = draw(_words), draw(_glue)
        document = glue.join(words)
        documents.append((document + glue) * (2 * MIN_PIECE_CHARS // max(1, len(document)) + 1))
    ends = draw(st.lists(_words.map(" ".join), min_size=1, max_size=4))
    return [draw(st.sampled_from(documents)) + draw(st.sampled_from(["", " ", "\n"])) + end for end in ends]


@pytest.mark.parametrize("name", vocabularies.ALL)
@settings(max_examples=sized(60, 2000), deadline=None)
@given(given_texts=texts())
def test_ids_are_those_of_the_tokenizer(name: str, given_texts: list[str]) -> None:
    """Also of a text whose beginning was seen before, alone or in the same slice."""
    encoder = PrefixEncoder(backend(name))
    expected = [encoding.ids for encoding in backend(name).encode_batch(given_texts, add_special_tokens=False)]
    for _ in range(2):
        assert [list(ids) for ids in encoder.encode(given_texts)] == expected
    assert [list(encoder.encode([text])[0]) for text in given_texts] == expected


@pytest.mark.parametrize("name", vocabularies.ALL)
def test_what_texts_begin_with_is_encoded_once(name: str) -> None:
    """Up to a special token everywhere; in the midst of a text where words are sure to end."""
    document = "<|im_start|>system\n" + "The river runs to the wide sea, and on. " * 100 + "<|im_end|>\n"
    question = "<|im_start|>user\nWhere does it end? Number {}<|im_end|>\n"
    encoder = PrefixEncoder(backend(name))
    encoder.encode([document + question.format(i) for i in range(50)])
    assert encoder.num_encoded_chars < len(document) + 50 * (len(question) + MIN_PIECE_CHARS)
    encoder.num_encoded_chars = 0
    encoder.encode([document.replace("<|im_end|>", "") + f"And {i}?" for i in range(50)])
    is_cut = encoder.num_encoded_chars < 50 * 3 * MIN_PIECE_CHARS
    assert is_cut == (name in CUT_AT_WORDS)


def test_what_is_remembered_is_bounded() -> None:
    encoder = PrefixEncoder(backend("embedded"), cache_chars=20_000)
    for i in range(40):
        encoder.encode([f"{i} " + "word " * 1000 + f"end {j}" for j in range(3)])
        assert sum(map(len, [*encoder._recent, *encoder._older])) <= 20_000 + MIN_PIECE_CHARS


def test_a_tokenizer_that_cuts_texts_off_or_fills_them_up_does_neither_here() -> None:
    own = vocabularies.embedded()
    text = "word " * 50
    expected = own.encode(text).ids
    own.enable_truncation(5)
    own.enable_padding(length=100)
    assert list(PrefixEncoder(own).encode([text])[0]) == expected
