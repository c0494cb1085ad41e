"""Token ids of finished planned requests become the text that SGLang's detokenizer makes of live ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

from batchllm.default_model import default_model_path
from batchllm.srt.managers.detokenizer_manager import BatchDetokenizerManager


def _text(context: list[int], ids: list[int], reason: dict[str, Any], *, known: int | None = None) -> str:
    """The text behind a prompt, by a detokenizer without sockets, whose tokenizer has so many tokens."""
    manager: Any = object.__new__(BatchDetokenizerManager)
    manager.tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    manager.vocab_size = known or len(manager.tokenizer)
    manager.is_tool_call_parser_gpt_oss = False
    output: Any = SimpleNamespace(
        context_ids=[context],
        output_ids=[ids],
        finish_reasons=[reason],
        no_stop_trim=[False],
        skip_special_tokens=[False],
        spaces_between_special_tokens=[True],
    )
    manager.handle_planned_output(output)
    (text,) = output.texts
    return str(text)


def test_a_token_that_the_tokenizer_does_not_have_is_shown_as_token_0() -> None:
    """Generated, in front of a stop string, and in the prompt; models have more tokens than their tokenizers."""
    end = {"type": "length", "length": 2}
    assert _text([806], [806, 806], end) == " might might"
    assert _text([806], [5000, 806], end) == "<|endoftext|> might"
    assert _text([806, 5000], [806, 806], end) == " might might"
    stopped = {"type": "stop", "matched": "mig", "num_early": 1}
    assert _text([806], [5000, 806], stopped) == "<|endoftext|> "
    assert _text([5], [806, 7], end, known=500) == "<|endoftext|>" + _text([5], [7], end)
