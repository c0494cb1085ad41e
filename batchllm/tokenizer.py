"""Text to token ids and back: a Hugging Face tokenizer behind the four things a job needs of it."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from batchllm.errors import ConfigError, RowError
from batchllm.token_text import TokenTexts

needs_no_torch = False
"""Set in a process that wants only tokenizers of transformers: torch is not imported, and there are no models."""


class Tokenizer:
    """Encodes prompts in bulk.

    Args:
        hf_tokenizer: A ``transformers`` tokenizer.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer

    @classmethod
    def from_model(cls, model_path: str) -> Self:
        """The tokenizer of a Hugging Face model, a directory or a hub name.

        Raises:
            ConfigError: There is no such model, or it has no tokenizer.
        """
        if needs_no_torch:
            _import_without_torch()
        from transformers import AutoTokenizer  # seconds to import

        try:
            return cls(AutoTokenizer.from_pretrained(model_path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"-m {model_path}: its tokenizer cannot be loaded: {error}") from error

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[array[int]]:
        """Token ids of each text; special tokens are added as the model wants them."""
        if not texts:
            return []
        encoded = self._hf(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about long prompts: they are refused by name
        )
        return [array("i", ids) for ids in encoded["input_ids"]]

    def render_chats(self, chats: Sequence[Sequence[dict[str, Any]]]) -> list[str | RowError]:
        """Each conversation as text, through the model's chat template, ready for the assistant's turn.

        The template has put the special tokens where they belong: encode without adding them.

        Returns:
            The text, or why there is none, ``chat_template``: there is no template, or it refuses the conversation.
        """
        return [self._render(messages) for messages in chats]

    def _render(self, messages: Sequence[dict[str, Any]]) -> str | RowError:
        from jinja2 import TemplateError

        joined = [message | {"content": _text(message.get("content"))} for message in messages]
        try:
            return str(self._hf.apply_chat_template(joined, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError) as error:
            return RowError(
                f"the model's chat template refuses these messages: {error}",
                code="chat_template",
                param="messages",
            )

    def decode_token(self, token_id: int) -> bytes | str:
        """Text of one token by itself; bytes where it is a part of a character."""
        return self._token_texts.decode(token_id)

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self._hf)


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


def _text(content: Any) -> str:
    """Content of a message as one text; templates of text models do not take parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)
