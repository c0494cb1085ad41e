"""SGLang's chat serving, of which batches use what makes prompts of chats and messages of answers. (Upstream:
``srt/entrypoints/openai/serving_chat.py``.)

A chat becomes a prompt in one place, `ServingChat`: behind the live route, and in bulk behind batches. It differs from
SGLang's in one way: it refuses a chat of which a message's text is not in the prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatCompletionResponse
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.parser.template_manager import TemplateManager

from batchllm.errors import ConfigError, RowError
from batchllm.offline.runtime import Answer, Chat
from batchllm.request import GRAMMARS, ChatOptions, ChatPrompt, Completion
from batchllm.tokenizer import Tokenizer

_Settings = tuple[tuple[str, Any], ...]
_NO_OPTIONS = ChatOptions()


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

    def ids(self) -> list[int]:
        """The token ids."""
        return self._encode(self.text) + self.tail

    def __getitem__(self, index: Any) -> Any:
        return self.ids()[index]

    def __len__(self) -> int:
        return len(self.ids())

    def __add__(self, tail: Sequence[int]) -> RenderedText:
        whole = [*self.tail, *tail]
        return RenderedText(self.text, self._encode, adds_special_tokens=self.adds_special_tokens, tail=whole)


class _LazyTokenizer:
    """A tokenizer of transformers that encodes when somebody looks."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hf, name)

    def encode(self, text: str, **kwargs: Any) -> RenderedText:
        return RenderedText(
            text,
            lambda text: list(self._hf.encode(text, **kwargs)),
            adds_special_tokens=kwargs.get("add_special_tokens", True),
        )


class _ManagerView:
    """A tokenizer manager with another tokenizer."""

    def __init__(self, manager: Any, tokenizer: Any) -> None:
        self._manager = manager
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


class ServingChat(OpenAIServingChat):
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
        return rendered.ids()

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


class _BulkServingChat(ServingChat):
    """Leaves the encoding to whoever encodes many at once."""

    def _finish(self, rendered: RenderedText) -> Any:
        return rendered


class ChatTokenizer(Tokenizer):
    """Text and chats to token ids, chats as SGLang's server makes prompts of them.

    Args:
        manager: SGLang's tokenizer manager, or what has a tokenizer, a model config and server arguments as it has.
        template_manager: SGLang's, with the chat template.
    """

    def __init__(self, manager: Any, template_manager: Any) -> None:
        super().__init__(manager.tokenizer)
        self._serving = _BulkServingChat(manager, template_manager)

    @property
    def chat_sampling(self) -> dict[str, Any]:
        """What the model recommends for chats that say nothing of it, by names of `SamplingParams`."""
        return dict(self._serving.default_sampling_params)

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        """Each chat as a prompt that is ready for the assistant's turn.

        Returns:
            The prompt, or why there is none: ``invalid_messages`` or ``chat_template``.
        """
        prompts: list[ChatPrompt | RowError] = []
        late: dict[bool, list[tuple[int, RenderedText, _Settings]]] = {False: [], True: []}
        for messages, options in chats:
            adapted = self._adapt(messages, options or _NO_OPTIONS)
            if isinstance(adapted, RowError):
                prompts.append(adapted)
                continue
            ids, settings = adapted.input_ids, _settings(adapted)
            if isinstance(ids, RenderedText):
                late[ids.adds_special_tokens].append((len(prompts), ids, settings))
                ids = ()
            prompts.append(ChatPrompt(ids=array("i", ids), settings=settings))
        for adds_special_tokens, rendered in late.items():
            encoded = self.encode([text.text for _, text, _ in rendered], add_special_tokens=adds_special_tokens)
            for (i, text, settings), ids in zip(rendered, encoded, strict=True):
                prompts[i] = ChatPrompt(ids=ids + array("i", text.tail), settings=settings)
        return prompts

    def parse_answers(self, answers: Sequence[Answer]) -> list[Completion]:
        """Answers to chats, each with its text as the message that SGLang's server would give.

        Args:
            answers: Fields of the chat's body, and the answer.
        """
        return [completion if completion.error else self._parse(fields, completion) for fields, completion in answers]

    def _parse(self, fields: dict[str, Any], completion: Completion) -> Completion:
        serving = self._serving
        defaults = serving.default_chat_template_kwargs
        fields = {"messages": [], **fields}
        if defaults:  # as `_process_messages` does before it renders
            fields["chat_template_kwargs"] = {**defaults, **fields.get("chat_template_kwargs", {})}
            fields.setdefault("reasoning_effort", defaults.get("reasoning_effort"))
        reason = {"type": completion.finish_reason, "matched": completion.matched_stop}
        numbers = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
        meta_info = {"id": "", "finish_reason": reason, "cached_tokens": 0, "weight_version": "", **numbers}
        answer = {"text": completion.text, "output_ids": completion.output_ids, "meta_info": meta_info}
        response = serving._build_chat_response(ChatCompletionRequest(**fields), [answer], created=0)
        if not isinstance(response, ChatCompletionResponse):
            return completion  # the parser has failed, which SGLang has logged: the text is what there is
        (choice,) = response.choices
        message = choice.message.model_dump(exclude_none=True)
        return msgspec.structs.replace(completion, message=message, finish_reason=choice.finish_reason)

    def _adapt(self, messages: Sequence[dict[str, Any]], options: ChatOptions) -> Any:
        """SGLang's request for a chat, or why there is none."""
        fields = dict(options.fields)
        if "chat_template_kwargs" in fields:
            fields["chat_template_kwargs"] = dict(fields["chat_template_kwargs"])  # SGLang adds to it
        try:
            request = ChatCompletionRequest(messages=messages, **fields)
            refusal = self._serving._validate_request(request)
            if refusal is not None:
                return RowError(refusal, code="invalid_messages", param="messages")
            adapted, _ = self._serving._convert_to_internal_request(request)
        except ValidationError as error:
            return _invalid(error)
        except Exception as error:  # SGLang and templates raise many kinds; whatever it is, it is about this chat
            message = str(error) or type(error).__name__
            return RowError(
                f"the chat template of the model refuses this chat: {message}", code="chat_template", param="messages"
            )
        if adapted.input_ids is None:
            return RowError("the model takes other input than text", code="unsupported_content", param="messages")
        return adapted


def tokenizer_of_model(model_path: str) -> ChatTokenizer:
    """The tokenizer of a model that does not run, with the server's default settings.

    Args:
        model_path: A directory or a hub name.

    Raises:
        ConfigError: There is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig

    hf_tokenizer = Tokenizer.from_model(model_path).hf
    try:
        config = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"-m {model_path}: its configuration cannot be read: {error}") from error
    manager = SimpleNamespace(
        tokenizer=hf_tokenizer,
        processor=None,
        served_model_name=model_path,
        model_config=SimpleNamespace(hf_config=config, is_multimodal=False, get_default_sampling_params=dict),
        server_args=SimpleNamespace(**_SERVER_DEFAULTS),
    )
    templates = TemplateManager()
    templates.initialize_templates(manager, model_path)
    return ChatTokenizer(manager, templates)


_SERVER_DEFAULTS: dict[str, Any] = {
    "tool_call_parser": None,
    "reasoning_parser": None,
    "default_chat_template_kwargs": None,
    "context_length": None,
    "enable_cache_report": False,
    "tokenizer_metrics_custom_labels_header": None,
    "tokenizer_metrics_allowed_custom_labels": None,
}
"""Of SGLang's server arguments those that its chat serving reads."""


def _settings(adapted: Any) -> _Settings:
    """What SGLang has decided for a chat that said nothing of its sampling."""
    sampling = adapted.sampling_params
    settings: list[tuple[str, Any]] = []
    if sampling["stop"]:
        stop = sampling["stop"]
        settings.append(("stop", (stop,) if isinstance(stop, str) else tuple(stop)))
    for name in ("skip_special_tokens", "spaces_between_special_tokens"):
        if not sampling[name]:
            settings.append((name, False))
    for name in GRAMMARS:
        if sampling.get(name) is not None:
            settings.append((name, sampling[name]))
    if adapted.require_reasoning:
        settings.append(("require_reasoning", True))
    return tuple(settings)


def _invalid(error: ValidationError) -> RowError:
    """The first thing that SGLang's definition of a chat body finds, with its place."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # A message is one of two types; the error that lies deepest says most.
    first = max(found, key=lambda e: len(e["loc"]))
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if _is_place(p)).lstrip(".")
    param = str(first["loc"][0]) if first["loc"] else None
    return RowError(f"{place or 'the chat'}: {first['msg']}", code="invalid_messages", param=param)


def _is_place(part: int | str) -> bool:
    """Not the name of a type that was tried."""
    return isinstance(part, int) or (part.islower() and part.isidentifier())
