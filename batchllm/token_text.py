"""What one token of a Hugging Face tokenizer stands for: text, or bytes where it is a part of a character.

Knows how tokenizers write bytes in their vocabularies; not models or jobs.

INVARIANT: the tokens of a text, put together as bytes, are the text as the tokenizer decodes it, but for a space that
some tokenizers put before a text and take away again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # what sentencepiece writes for a space


class TokenTexts:
    """Text of tokens by themselves.

    Args:
        hf_tokenizer: A ``transformers`` tokenizer.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        added = getattr(hf_tokenizer, "added_tokens_decoder", None)
        self._added = {i: str(token) for i, token in added.items()} if isinstance(added, dict) else {}
        self._to_bytes = _reader_of(hf_tokenizer)

    def decode(self, token_id: int) -> bytes | str:
        """Text of a token, a space that it begins with included; bytes where they are no whole characters.

        An id that the tokenizer does not have, of a vocabulary that is padded, is "".
        """
        if token_id in self._added:
            return self._added[token_id]
        try:
            if self._to_bytes is None:
                return str(self._hf.decode([token_id]))
            piece = self._to_bytes(token_id)
        except (IndexError, KeyError, OverflowError, ValueError):
            return ""
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return piece


def _reader_of(hf: Any) -> Callable[[int], bytes] | None:
    """Gives the bytes of a token; None where the tokenizer writes them in no way that is known here."""
    mistral: Any = getattr(getattr(getattr(hf, "tokenizer", None), "instruct_tokenizer", None), "tokenizer", None)
    if hasattr(mistral, "id_to_byte_piece"):
        return lambda token_id: bytes(mistral.id_to_byte_piece(token_id, "keep"))
    if hasattr(mistral, "id_to_piece"):
        return lambda token_id: _sentencepiece_bytes(mistral.id_to_piece(token_id))
    decoders = _decoders(hf)
    if "ByteLevel" in decoders or hasattr(hf, "byte_decoder"):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return lambda token_id: _byte_level_bytes(hf.convert_ids_to_tokens(token_id), byte_of)
    if not decoders.isdisjoint({"ByteFallback", "Metaspace"}) or hasattr(hf, "sp_model"):
        return lambda token_id: _sentencepiece_bytes(hf.convert_ids_to_tokens(token_id))
    return None


def _decoders(hf: Any) -> set[str]:
    """Kinds of decoders that a tokenizer of the ``tokenizers`` library goes through."""
    decoder = getattr(getattr(hf, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    stated = json.loads(decoder.__getstate__())
    return {part["type"] for part in stated.get("decoders", [stated])}


def _byte_level_bytes(piece: str | bytes | None, byte_of: dict[str, int]) -> bytes:
    """Bytes of a piece in GPT-2's alphabet, of a printable character for each byte."""
    if piece is None or isinstance(piece, bytes):
        return piece or b""
    if all(character in byte_of for character in piece):
        return bytes(byte_of[character] for character in piece)
    return piece.encode()


def _sentencepiece_bytes(piece: str | bytes | None) -> bytes:
    """Bytes of a piece with marks for spaces, or of one that stands for a single byte."""
    if piece is None or isinstance(piece, bytes):
        return piece or b""
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece.replace(_SPACE_MARK, " ").encode()
