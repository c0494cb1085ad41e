"""Text to token ids and back: a Hugging Face tokenizer behind the things that a job needs of it."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from batchllm.errors import ConfigError
from batchllm.prefix_encoder import PrefixEncoder
from batchllm.token_text import TokenTexts

needs_no_torch = False
"""Set in a process that wants only tokenizers of transformers: torch is not imported, and there are no models."""

_NOTHING_AROUND: tuple[array[int], array[int]] = (array("i"), array("i"))
_PROBES = ("a", "b 7")


class Tokenizer:
    """Encodes prompts in bulk.

    Args:
        hf_tokenizer: A ``transformers`` tokenizer.

    Attributes:
        hf: The same.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self.hf = hf_tokenizer

    @classmethod
    def from_model(cls, model_path: str) -> Self:
        """The tokenizer of a Hugging Face model, a directory or a hub name.

        Raises:
            ConfigError: There is no such model, or it has no tokenizer.
        """
        check_is_there(model_path)
        if needs_no_torch:
            _import_without_torch()
        from transformers import AutoTokenizer  # seconds to import

        try:
            return cls(AutoTokenizer.from_pretrained(model_path))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())  # it may be of several lines
            raise ConfigError(f"-m {model_path}: its tokenizer cannot be loaded: {reason}") from error

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        """Token ids of each text; special tokens are added as the model wants them."""
        if not texts:
            return []
        around = self._around if add_special_tokens else _NOTHING_AROUND
        if self._encoder is None or around is None:
            return self._encode_whole(texts, add_special_tokens=add_special_tokens)
        encoded = self._encoder.encode(texts)
        before, behind = around
        return [before + ids + behind for ids in encoded] if before or behind else encoded

    def _encode_whole(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[array[int]]:
        encoded = self.hf(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about long prompts: they are refused by name
        )
        return [array("i", ids) for ids in encoded["input_ids"]]

    @cached_property
    def _encoder(self) -> PrefixEncoder | None:
        """None where the tokenizer is not one of the ``tokenizers`` library, or does something else beside."""
        if not getattr(self.hf, "is_fast", False):
            return None
        encoder = PrefixEncoder(self.hf.backend_tokenizer)
        is_all = encoder.encode(_PROBES) == self._encode_whole(_PROBES, add_special_tokens=False)
        return encoder if is_all else None

    @cached_property
    def _around(self) -> tuple[array[int], array[int]] | None:
        """The special tokens that are put before and behind a text; None where that is not all that is done."""
        bare, whole = (
            self._encode_whole(_PROBES, add_special_tokens=add_special_tokens) for add_special_tokens in (False, True)
        )
        for at in range(len(whole[0]) - len(bare[0]) + 1):
            before, behind = whole[0][:at], whole[0][at + len(bare[0]) :]
            if all(before + ids + behind == full for ids, full in zip(bare, whole, strict=True)):
                return before, behind
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.hf.decode(list(ids), skip_special_tokens=True))

    def decode_token(self, token_id: int) -> bytes | str:
        """Text of one token by itself; bytes where it is a part of a character."""
        return self._token_texts.decode(token_id)

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self.hf)


def is_meant_as_path(model_path: str) -> bool:
    """Whether a name that is no folder was meant to be one.

    Names on the Hub are ``name`` or ``owner/name``; those of other stores have a scheme.
    """
    if "://" in model_path:
        return False
    return model_path.startswith((".", "/", "~")) or model_path.count("/") > 1


def check_is_there(model_path: str) -> None:
    """Refuse a folder that does not exist.

    Raises:
        ConfigError: There is none.
    """
    if is_meant_as_path(model_path) and not os.path.exists(model_path):
        raise ConfigError(f"-m {model_path}: there is no such folder; give a model's folder, or its name on the Hub")


def _import_without_torch() -> None:
    """Import what tokenizers need of transformers without torch, which it would import as well."""
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that there is no torch
    sys.modules["torch"] = None  # type: ignore[assignment] # "not found", as the documentation of sys.modules says
    try:
        from transformers import AutoTokenizer  # noqa: F401 - imported for the one who asks next
        from transformers.utils import is_torch_available

        is_torch_available()  # asked once, and remembered
    finally:
        del sys.modules["torch"]
