"""Tokens by themselves, in each kind of vocabulary: the bytes of a text's tokens are those of the text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from batchllm.default_model import default_model_path
from batchllm.token_text import TokenTexts
from batchllm.tokenizer import Tokenizer
from tests.sizes import sized

DATA = Path(mistral_common.__file__).parent / "data"
TRAINED_ON = ["the river runs to the sea, the sea is wide", "def run(x):\n    return x + 1\n", "naïve café, 12345"]
TEXTS = [
    "Hello, world",
    "  two spaces\n\n\tand a tab  ",
    "naïve café “quoted”",
    "река, नदी, 川の流れ, 강, نهر",
    "🦀👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301",
    "for i in range(10):\n    print(f'{i:>3}')\n",
    "\u0000\u001f\u007f\ufeff\U0010ffff",
]


def _fast(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def _byte_level() -> Any:
    return Tokenizer.from_model(default_model_path()).hf


def _sentencepiece_like() -> Any:
    """A piece for each byte, marks for spaces, one of which is put before the text and taken away: Llama 2's way."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(TRAINED_ON, trainers.BpeTrainer(vocab_size=400, special_tokens=specials[:3]))
    backend = _with_bytes(backend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(backend)


def _with_bytes(backend: Any) -> Any:
    """The same with a piece for each byte in the vocabulary itself, where they are no added tokens."""
    import json

    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _metaspace() -> Any:
    """Marks for spaces and no bytes: what T5 has."""
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -2.0) for c in "▁abcdefgh"), ("▁a", -1.0)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _fast(backend)


def _mistral(name: str) -> Any:
    from transformers import MistralCommonBackend

    return MistralCommonBackend(tokenizer_path=DATA / name)


MADE = {
    "byte level": _byte_level,
    "sentencepiece": _sentencepiece_like,
    "tekken": functools.partial(_mistral, "tekken_240718.json"),
    "mistral v3": functools.partial(_mistral, "mistral_instruct_tokenizer_240323.model.v3"),
}


@functools.cache
def made(name: str) -> tuple[Any, TokenTexts]:
    hf = MADE[name]()
    return hf, TokenTexts(hf)


def joined(texts: TokenTexts, ids: list[int]) -> str:
    pieces = [texts.decode(token_id) for token_id in ids]
    return b"".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces).decode()


def encode(hf: Any, text: str) -> list[int]:
    return [int(token_id) for token_id in hf.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("name", MADE)
def test_bytes_of_the_tokens_are_the_text(name: str, text: str) -> None:
    hf, texts = made(name)
    ids = encode(hf, text)
    assert joined(texts, ids) in (text, f" {text}")
    assert hf.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=sized(40, 1000), deadline=None)
@given(name=st.sampled_from(sorted(MADE)), text=st.text(max_size=20))
def test_bytes_of_the_tokens_of_any_text_are_as_the_tokenizer_decodes_it(name: str, text: str) -> None:
    hf, texts = made(name)
    ids = encode(hf, text)
    assert joined(texts, ids) in (
        hf.decode(ids, skip_special_tokens=True),
        f" {hf.decode(ids, skip_special_tokens=True)}",
    )


@pytest.mark.parametrize("name", MADE)
def test_half_a_character_is_its_bytes(name: str) -> None:
    """A rare character is in none of the vocabularies: its tokens are bytes, and nothing stands for another one."""
    hf, texts = made(name)
    pieces = [texts.decode(token_id) for token_id in encode(hf, "a\U0001f9ff")]
    parts = [piece for piece in pieces if isinstance(piece, bytes)]
    assert len(parts) >= 2 and b"".join(parts) == "\U0001f9ff".encode()


@pytest.mark.parametrize("name", MADE)
def test_token_with_a_space_before_it_keeps_the_space(name: str) -> None:
    hf, texts = made(name)
    assert joined(texts, encode(hf, "the sea")).endswith(" sea")


def test_special_and_added_tokens_are_their_names() -> None:
    hf, texts = made("byte level")
    assert {texts.decode(token_id) for token_id in hf.all_special_ids} == set(hf.all_special_tokens)
    hf, texts = made("sentencepiece")
    assert texts.decode(hf.convert_tokens_to_ids("<s>")) == "<s>"


@pytest.mark.parametrize("name", MADE)
def test_id_beyond_the_tokenizer_is_nothing(name: str) -> None:
    """Vocabularies of models are padded."""
    hf, texts = made(name)
    assert texts.decode(len(hf) + 50) == ""


def test_marks_without_bytes_are_spaces() -> None:
    hf = _metaspace()
    assert joined(TokenTexts(hf), encode(hf, "a b")) == " a b"
