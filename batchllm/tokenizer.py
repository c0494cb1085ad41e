"""Text to token ids and back: a Hugging Face tokenizer behind the four things a job needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from batchllm.errors import ConfigError, RowError


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
        from transformers import AutoTokenizer  # seconds to import

        try:
            return cls(AutoTokenizer.from_pretrained(model_path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"-m {model_path}: its tokenizer cannot be loaded: {error}") from error

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
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
        return list(encoded["input_ids"])

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation as text, through the model's chat template, ready for the assistant's turn.

        The template has put the special tokens where they belong: encode without adding them.

        Raises:
            RowError: ``chat_template``: there is none, or it refuses this conversation.
        """
        from jinja2 import TemplateError

        joined = [message | {"content": _text(message.get("content"))} for message in messages]
        try:
            return str(self._hf.apply_chat_template(joined, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError) as error:
            raise RowError(
                f"the model's chat template refuses these messages: {error}",
                code="chat_template",
                param="messages",
            ) from error

    def decode_token(self, token_id: int) -> str:
        """Text of one token by itself."""
        return str(self._hf.decode([token_id]))


def _text(content: Any) -> str:
    """Content of a message as one text; templates of text models do not take parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)
