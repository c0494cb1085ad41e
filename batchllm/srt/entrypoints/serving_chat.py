"""SGLang's serving of OpenAI's routes; that of chats is behind the live route and behind batches. Runs in the engine's
or the server's process. (Upstream: ``srt/entrypoints/openai/serving_chat.py``, ``serving_completions.py``.)

It differs from SGLang's in three ways: it refuses a chat of which a message's text is not in the prompt, a model of
the name of a loaded adapter, as ``/v1/models`` lists it, is that adapter, and ``echo`` with ``logprobs: 0`` scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_embedding import OpenAIServingEmbedding


class RenderedText(Sequence[int]):
    """Token ids of a rendered prompt, made when somebody looks at them.

    Args:
        text: The prompt.
        encode: Makes ids of a text.
        adds_special_tokens: The tokenizer puts its own special tokens around the text.
        tail: Token ids behind it.
    """

    def __init__(
        self, text: str, encode: Callable[[str], list[int]], *, adds_special_tokens: bool, tail: Sequence[int] = ()
    ) -> None:
        self.text = text
        self.adds_special_tokens = adds_special_tokens
        self.tail = list(tail)
        self._encode = encode

    @cached_property
    def ids(self) -> list[int]:
        """The token ids."""
        return self._encode(self.text) + self.tail

    def __getitem__(self, index: Any) -> Any:
        return self.ids[index]

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, tail: Sequence[int]) -> RenderedText:
        whole = [*self.tail, *tail]
        return RenderedText(self.text, self._encode, adds_special_tokens=self.adds_special_tokens, tail=whole)


class _LazyTokenizer:
    """A tokenizer of transformers that encodes when somebody looks.

    Attributes:
        calls: Conversation and arguments of the last calls of the chat template, two at most.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self.calls: deque[tuple[Any, dict[str, Any]]] = deque(maxlen=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf, name)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        self.calls.append((conversation, kwargs))
        return self._hf.apply_chat_template(conversation, **kwargs)

    def encode(self, text: str, **kwargs: Any) -> RenderedText:
        return RenderedText(
            text,
            lambda text: list(self._hf.encode(text, **kwargs)),
            adds_special_tokens=kwargs.get("add_special_tokens", True),
        )


class _ManagerView:
    """A tokenizer manager with another tokenizer."""

    def __init__(self, manager: Any, tokenizer: Any) -> None:
        self.manager = manager
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)


class _NamedAdapters(OpenAIServingBase):
    """Takes a model of the name of a loaded adapter for that adapter; SGLang would answer by the base model."""

    def _resolve_lora_path(self, request_model: str, explicit_lora_path: Any) -> Any:
        if request_model in self.tokenizer_manager.adapter_ids:
            return request_model
        return super()._resolve_lora_path(request_model, explicit_lora_path)


class _WithNoTops:
    """A tokenizer manager that says so where a scored prompt has no alternatives: SGLang looks for them all the same,
    and its answer, or its stream, would end there.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        async with aclosing(self._manager.generate_request(obj, request)) as outputs:
            async for output in outputs:
                for answer in output if isinstance(output, list) else [output]:
                    if "input_token_logprobs" in answer["meta_info"]:
                        answer["meta_info"].setdefault("input_top_logprobs", None)
                yield output


class ServingCompletion(_NamedAdapters, OpenAIServingCompletion):
    """SGLang's serving of completions; ``logprobs: 0`` gives a repeated prompt log probabilities too, as in a batch."""

    def __init__(self, tokenizer_manager: Any, template_manager: Any) -> None:
        super().__init__(_WithNoTops(tokenizer_manager), template_manager)

    def _convert_to_internal_request(self, request: Any, raw_request: Any = None) -> Any:
        adapted, request = super()._convert_to_internal_request(request, raw_request)
        if request.echo and request.logprobs is not None:
            adapted.logprob_start_len = 0
        return adapted, request


class ServingEmbedding(_NamedAdapters, OpenAIServingEmbedding):
    """SGLang's serving of embeddings."""


class ServingChat(_NamedAdapters, OpenAIServingChat):
    """SGLang's chat serving, which also refuses a chat of which a message's text is not in the prompt."""

    def __init__(self, tokenizer_manager: Any, template_manager: Any) -> None:
        super().__init__(tokenizer_manager, template_manager)
        if tokenizer_manager.tokenizer is not None:
            self.tokenizer_manager = _ManagerView(tokenizer_manager, _LazyTokenizer(tokenizer_manager.tokenizer))

    def _process_messages(self, request: ChatCompletionRequest, is_multimodal: bool) -> Any:
        result = super()._process_messages(request, is_multimodal)
        if isinstance(result.prompt_ids, RenderedText):
            result.prompt_ids = self._finish(result.prompt_ids)
        return result

    def _finish(self, rendered: RenderedText) -> Any:
        return rendered.ids

    def _apply_jinja_template(self, request: ChatCompletionRequest, tools: Any, is_multimodal: bool) -> Any:
        def render(request: ChatCompletionRequest) -> Any:
            return super(ServingChat, self)._apply_jinja_template(request, tools, is_multimodal)

        return _render_checked(request, render)

    def _apply_conversation_template(self, request: ChatCompletionRequest, is_multimodal: bool) -> Any:
        def render(request: ChatCompletionRequest) -> Any:
            return super(ServingChat, self)._apply_conversation_template(request, is_multimodal)

        return _render_checked(request, render)


def _render_checked(request: ChatCompletionRequest, render: Callable[[ChatCompletionRequest], Any]) -> Any:
    """Render, and look for every text in the prompt.

    Raises:
        ValueError: A text makes no difference to the prompt.
    """
    result = render(request)
    rendered = result.prompt_ids
    if not isinstance(rendered, RenderedText):
        return result
    for i, j, text in _texts(request):
        if text.strip() in rendered.text:
            continue
        # A template may write a text in its own way. What it leaves out makes no difference.
        changed = request.model_copy(deep=True)
        message = changed.messages[i]
        if j is None:
            message.content = f"x{text}x"
        else:
            message.content[j].text = f"x{text}x"
        again = render(changed).prompt_ids
        if again.text == rendered.text and again.tail == rendered.tail:
            place = f"messages[{i}].content" + ("" if j is None else f"[{j}]")
            other = 'a list of parts, [{"type": "text", "text": ...}]' if j is None else "one string"
            raise ValueError(f"the text of {place} is not in the prompt; write the content as {other}")
    return result


def _texts(request: ChatCompletionRequest) -> Iterator[tuple[int, int | None, str]]:
    """Each text of a chat, with the number of its message, and of its part where the message has parts."""
    for i, message in enumerate(request.messages):
        content = message.content
        if isinstance(content, str):
            yield i, None, content
        elif content is not None:
            for j, part in enumerate(content):
                if part.type == "text":
                    yield i, j, part.text


class BulkServingChat(ServingChat):
    """Leaves the encoding to whoever encodes many at once: prompts are `RenderedText`."""

    def _finish(self, rendered: RenderedText) -> Any:
        return rendered
