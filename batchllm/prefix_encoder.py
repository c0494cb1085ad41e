"""Texts that begin alike to token ids, without encoding what they share again.

A text is cut where its tokens are sure to be cut as well; the ids of each piece are remembered. There are two kinds of
such places:

* before a special token. Added tokens are taken out of a text before anything else is done to it;
* between a word and a space with a word behind it, ASCII letters both, where the tokenizer splits text by a regular
  expression in which a word never goes on over a space (`_WORD_PATTERNS`), and merges only inside of what was split.

Knows tokenizers of the ``tokenizers`` library; not chats, prompts or files.

INVARIANT: the ids are those that the tokenizer itself gives for the whole text.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

MIN_PIECE_CHARS = 512
"""A piece that ends inside a text is at least this long: looking pieces up must cost less than encoding them."""
_DEFAULT_CACHE_CHARS = 64 << 20

_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_PATTERNS = frozenset(
    {
        # Llama 3, GPT-4
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2 and 3
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-4o, gpt-oss, Llama 4
        f"{_LETTERS}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LETTERS}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Mistral's tekken
        f"{_LETTERS}{_UPPER}*{_LOWER}+|{_LETTERS}{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-2, where it is written out
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    }
)
_WORD_END = re.compile(r"[A-Za-z](?= [A-Za-z])")


class PrefixEncoder:
    """Encodes texts, what they begin with once.

    Args:
        backend: A tokenizer of the ``tokenizers`` library.
        cache_chars: About how many characters of pieces to remember.

    Attributes:
        num_encoded_chars: Characters that had to be encoded so far.
    """

    def __init__(self, backend: Any, *, cache_chars: int = _DEFAULT_CACHE_CHARS) -> None:
        self._backend = backend
        added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
        self._special, self._cut_before = _special_tokens(added, is_text=backend.encode_special_tokens)
        self._is_cut_at_words = _is_cut_at_words(backend, added)
        # What was used last, and what was used before that: when the first is full, the second goes.
        self._recent: dict[str, array[int]] = {}
        self._older: dict[str, array[int]] = {}
        self._num_recent_chars = 0
        self._max_recent_chars = cache_chars // 2
        self.num_encoded_chars = 0

    def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """Token ids of each text, without special tokens around it."""
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        parts_of: list[list[array[int]]] = []
        missing: dict[str, list[tuple[int, int]]] = {}  # of each unknown piece the texts that it is in, and where there
        ends: list[str] = []
        for i, text in enumerate(texts):
            parts: list[array[int]] = []
            start = 0
            for end in self._cuts(text):
                piece = text[start:end]
                ids = self._find(piece)
                if ids is None:
                    missing.setdefault(piece, []).append((i, len(parts)))
                parts.append(_NOTHING if ids is None else ids)
                start = end
            ends.append(text[start:])
            parts_of.append(parts)
        encoded = self._encode_new([*missing, *ends])
        for (piece, places), ids in zip(missing.items(), encoded, strict=False):
            self._remember(piece, ids)
            for i, at in places:
                parts_of[i][at] = ids
        last = encoded[len(missing) :]
        return [
            array("i", b"".join([*parts, ids])) if parts else ids for parts, ids in zip(parts_of, last, strict=True)
        ]

    def _encode_new(self, pieces: list[str]) -> list[array[int]]:
        self.num_encoded_chars += sum(map(len, pieces))
        return [array("i", e.ids) for e in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]

    def _find(self, piece: str) -> array[int] | None:
        ids = self._recent.get(piece)
        if ids is None:
            ids = self._older.get(piece)
            if ids is not None:
                self._remember(piece, ids)
        return ids

    def _remember(self, piece: str, ids: array[int]) -> None:
        self._num_recent_chars += len(piece)
        if self._num_recent_chars > self._max_recent_chars:
            self._older, self._recent, self._num_recent_chars = self._recent, {}, len(piece)
        self._recent[piece] = ids

    def _cuts(self, text: str) -> list[int]:
        """Where the text is cut, ascending. What is before a place alone decides whether it is one."""
        cuts: list[int] = []
        if len(text) <= MIN_PIECE_CHARS:
            return cuts
        start = 0
        if self._special is not None:
            for match in self._special.finditer(text):
                at = match.start()
                if at - start >= MIN_PIECE_CHARS and match.group() in self._cut_before:
                    self._cut_words(text, start, at, cuts)
                    cuts.append(at)
                    start = at
        self._cut_words(text, start, len(text), cuts)
        return cuts

    def _cut_words(self, text: str, start: int, end: int, cuts: list[int]) -> None:
        while self._is_cut_at_words and end - start > MIN_PIECE_CHARS:
            match = _WORD_END.search(text, start + MIN_PIECE_CHARS, end)
            if match is None:
                return
            start = match.end()
            cuts.append(start)


_NOTHING: array[int] = array("i")


def _special_tokens(added: Sequence[Any], *, is_text: bool) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """What finds added tokens as the tokenizer does, leftmost and longest, and before which of them to cut.

    A token that takes the space around it along, or must be a word of its own, looks at what is beside it. A token that
    begins like a word could be what is beside it.

    Args:
        added: All added tokens.
        is_text: The tokenizer takes special tokens for text.
    """
    tokens = [token for token in added if not token.normalized and not (is_text and token.special)]
    if not tokens:
        return None, frozenset()
    contents = sorted({token.content for token in tokens}, key=lambda content: (-len(content), content))
    looks_around = {token.content for token in added if token.lstrip or token.rstrip or token.single_word}
    cut_before = {
        c for c in contents if c not in looks_around and not (c[0].isalnum() or c[0] == "_" or c[0].isspace())
    }
    return re.compile("|".join(map(re.escape, contents))), frozenset(cut_before)


def _is_cut_at_words(backend: Any, added: Sequence[Any]) -> bool:
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    if any(_WORD_END.search(token.content) or token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    if backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}:
        return False
    if backend.pre_tokenizer is None:
        return False
    state = _state(backend.pre_tokenizer)
    *splits, last = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if last["type"] != "ByteLevel":
        return False
    if not splits:
        return bool(last["use_regex"])
    return not last["use_regex"] and all(
        split["type"] == "Split"
        and split["pattern"].get("Regex") in _WORD_PATTERNS
        and (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
        for split in splits
    )


def _state(part: Any) -> Any:
    return json.loads(part.__getstate__())
