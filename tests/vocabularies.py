"""Vocabularies of the `tokenizers` library: the embedded one, Mistral's tekken, and small ones of other kinds."""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

import mistral_common
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from batchllm.default_model import default_model_path

MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"
TRAINED_ON = ["the river runs to the sea, the sea is wide", "def run(x):\n    return x + 1\n", "naïve café, 12345"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")


def embedded() -> Any:
    """GPT-2's splitting, 4,096 tokens."""
    return tokenizers.Tokenizer.from_file(f"{default_model_path()}/tokenizer.json")


@functools.cache
def _tekken() -> str:
    data = json.loads((MISTRAL_DATA / "tekken_240911.json").read_text())
    config = data["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in data["vocab"][:size]}
    merges = []
    for token, rank in ranks.items():
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks)
        merges += [(rank, a, b) for _, _, a, b in pairs]
    merges.sort(key=lambda merge: merge[0])
    shown = _byte_alphabet()
    text = {token: "".join(shown[byte] for byte in token) for token in ranks}
    model = models.BPE(
        vocab={text[token]: rank for token, rank in ranks.items()},
        merges=[(text[a], text[b]) for _, a, b in merges],
        ignore_merges=True,
    )
    backend = tokenizers.Tokenizer(model)
    _split(backend, config["pattern"])
    return str(backend.to_str())


def tekken() -> Any:
    """131,072 tokens, of Mistral's newer models."""
    backend = tokenizers.Tokenizer.from_str(_tekken())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"])
    return backend


def byte_level(pattern: str, *, normalizer: Any = None) -> Any:
    """A small vocabulary with the splitting of a model family."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizer
    _split(backend, pattern)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TRAINED_ON, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend


def sentencepiece_like() -> Any:
    """Marks for spaces, merges over words, as Llama 2."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(TRAINED_ON, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"]))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend


def with_tokens_that_look_around() -> Any:
    """Added tokens that take spaces along, must be words of their own, or contain a space."""
    backend = embedded()
    backend.add_tokens([tokenizers.AddedToken("river", single_word=True), tokenizers.AddedToken("big sea")])
    backend.add_special_tokens(
        [tokenizers.AddedToken("<|end|>", rstrip=True), tokenizers.AddedToken("<mask>", lstrip=True)]
    )
    return backend


def _split(backend: Any, pattern: str) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


ALL = {
    "embedded": embedded,
    "tekken": tekken,
    "qwen": functools.partial(byte_level, QWEN_PATTERN, normalizer=normalizers.NFC()),
    "llama": functools.partial(byte_level, LLAMA_PATTERN),
    "another pattern": functools.partial(byte_level, r"\w+ ?|\s+|[^\w\s]+"),
    "sentencepiece": sentencepiece_like,
    "tokens that look around": with_tokens_that_look_around,
}
