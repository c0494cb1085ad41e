"""Chats to prompts in bulk, and answers to messages, as SGLang's server makes them. Runs in the engine's or the
server's process.

Every chat goes through `batchllm.srt.entrypoints.serving_chat.ServingChat`, but for plain ones: messages of nothing but
role and text. SGLang hands these to the chat template as they are, with arguments that depend on the other fields of
the body alone. Once that was seen of one chat, others with the same fields go to the template at once.
"""

from __future__ import annotations

import dataclasses
import threading
from array import array
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import orjson
from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatCompletionResponse
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.server_args import ServerArgs

from batchllm.errors import ConfigError, RowError
from batchllm.offline.runtime import Answer, Chat
from batchllm.request import GRAMMARS, ChatOptions, ChatPrompt, Completion, Ranking, RankingPrompts
from batchllm.srt.entrypoints.serving_chat import BulkServingChat, RenderedText
from batchllm.srt.managers.reranker import Reranker
from batchllm.tokenizer import Tokenizer

Messages = Sequence[dict[str, Any]]
Settings = tuple[tuple[str, Any], ...]
_NO_OPTIONS = ChatOptions()
_PLAIN_KEYS = frozenset({"role", "content"})
_PLAIN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_WAYS = 1024


class _Rendered(NamedTuple):
    """A prompt that is to be encoded, and the token ids behind it."""

    text: str
    adds_special_tokens: bool
    settings: Settings
    tail: array[int] = array("i")


class _PlainWay(NamedTuple):
    """How SGLang renders plain chats with the same other fields.

    Attributes:
        arguments: Arguments of the chat template.
        adds_special_tokens: See `RenderedText`.
        settings: See `ChatPrompt`.
    """

    arguments: dict[str, Any]
    adds_special_tokens: bool
    settings: Settings


class ChatTokenizer(Tokenizer):
    """Text and chats to token ids, chats as SGLang's server makes prompts of them.

    Args:
        manager: SGLang's tokenizer manager, or what has a tokenizer, a model config and server arguments as it has.
        template_manager: SGLang's, with the chat template.

    Attributes:
        serving: What makes prompts and messages.
    """

    def __init__(self, manager: Any, template_manager: Any) -> None:
        super().__init__(manager.tokenizer)
        self.serving = BulkServingChat(manager, template_manager)
        self._model_path = str(getattr(manager.model_config, "model_path", ""))
        self._ways: dict[bytes, _PlainWay] = {}  # by the other fields of a body
        self._lock = threading.RLock()  # several jobs may encode at once, and `serving` notes one call after the other

    @property
    def chat_sampling(self) -> dict[str, Any]:
        """What the model recommends for chats that say nothing of it, by names of `SamplingParams`."""
        return dict(self.serving.default_sampling_params)

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt | RowError]:
        """Each chat as a prompt that is ready for the assistant's turn.

        Returns:
            The prompt, or why there is none: ``invalid_messages`` or ``chat_template``.
        """
        keys: dict[int, bytes] = {}  # by the identity of options, which many chats share
        prompts = [self._render(messages, options or _NO_OPTIONS, keys) for messages, options in chats]
        for adds_special_tokens in (False, True):
            late = [
                (i, prompt)
                for i, prompt in enumerate(prompts)
                if isinstance(prompt, _Rendered) and prompt.adds_special_tokens == adds_special_tokens
            ]
            encoded = self.encode([prompt.text for _, prompt in late], add_special_tokens=adds_special_tokens)
            for (i, prompt), ids in zip(late, encoded, strict=True):
                prompts[i] = ChatPrompt(ids=ids + prompt.tail if prompt.tail else ids, settings=prompt.settings)
        return prompts  # type: ignore[return-value] # none is _Rendered any more

    def _render(
        self, messages: Messages, options: ChatOptions, keys: dict[int, bytes]
    ) -> ChatPrompt | _Rendered | RowError:
        plain = _plain(messages)
        if plain is None:
            return self._serve(messages, options)
        key = keys.get(id(options))
        if key is None:
            key = keys[id(options)] = orjson.dumps(options.fields)
        way = self._ways.get(key)
        if way is None:
            return self._serve_and_learn(plain, options, key)
        try:
            text = self.hf.apply_chat_template(plain, **way.arguments)
        except Exception:  # SGLang may go another way then, or says what is wrong
            return self._serve(messages, options)
        if not all(message["content"].strip() in text for message in plain):
            return self._serve(messages, options)
        return _Rendered(text, way.adds_special_tokens, way.settings)

    def _serve_and_learn(self, plain: Messages, options: ChatOptions, key: bytes) -> ChatPrompt | _Rendered | RowError:
        calls = self.serving.tokenizer_manager.tokenizer.calls
        with self._lock:
            calls.clear()
            prompt = self._serve(plain, options)
            # More than one call: SGLang has tried different arguments, which may depend on the chat.
            if isinstance(prompt, _Rendered) and not prompt.tail and len(calls) == 1 and calls[0][0] == plain:
                if len(self._ways) >= _MAX_WAYS:
                    self._ways.clear()
                self._ways[key] = _PlainWay(calls[0][1], prompt.adds_special_tokens, prompt.settings)
            return prompt

    def _serve(self, messages: Messages, options: ChatOptions) -> ChatPrompt | _Rendered | RowError:
        """The way of every chat: through SGLang's serving."""
        with self._lock:
            adapted = self._adapt(messages, options)
        if isinstance(adapted, RowError):
            return adapted
        ids, settings = adapted.input_ids, _settings(adapted)
        if isinstance(ids, RenderedText):
            return _Rendered(ids.text, ids.adds_special_tokens, settings, array("i", ids.tail))
        return ChatPrompt(ids=array("i", ids), settings=settings)

    @cached_property
    def _reranker(self) -> Reranker:
        return Reranker(self.hf, self._model_path)

    def encode_rankings(self, rankings: Sequence[Ranking]) -> list[RankingPrompts | RowError]:
        """Each ranking as the prompts of a reranker, or why there are none."""
        found = [self._reranker.prompts(ranking) for ranking in rankings]
        encoded = iter(self.encode([text for texts in found if not isinstance(texts, RowError) for text in texts]))
        prompts: list[RankingPrompts | RowError] = []
        for texts in found:
            if isinstance(texts, RowError):
                prompts.append(texts)
                continue
            ids = [next(encoded) for _ in texts]
            prompts.append(
                RankingPrompts(
                    ids=array("i", b"".join(ids)), lengths=tuple(map(len, ids)), labels=self._reranker.labels
                )
            )
        return prompts

    def parse_answers(self, answers: Sequence[Answer]) -> list[Completion]:
        """Answers to chats, each with its text as the message that SGLang's server would give.

        Args:
            answers: Fields of the chat's body, and the answer.
        """
        return [completion if completion.error else self._parse(fields, completion) for fields, completion in answers]

    def _parse(self, fields: dict[str, Any], completion: Completion) -> Completion:
        reason = {"type": completion.finish_reason, "matched": completion.matched_stop}
        numbers = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
        meta_info = {"id": "", "finish_reason": reason, "cached_tokens": 0, "weight_version": "", **numbers}
        answer = {"text": completion.text, "output_ids": completion.output_ids, "meta_info": meta_info}
        try:
            # The ids stand for the prompt, so that nothing is rendered: SGLang fills in what the server's flags say.
            request = self._request([], {**fields, "input_ids": [0]})
            self.serving._convert_to_internal_request(request)
            response = self.serving._build_chat_response(request, [answer], created=0)
        except Exception as error:  # parsers raise many kinds; whatever it is, it is about this answer
            return _with_note(completion, str(error) or type(error).__name__)
        if not isinstance(response, ChatCompletionResponse):
            return _with_note(completion, "the reasoning parser failed")  # SGLang has logged how
        (choice,) = response.choices
        message = choice.message.model_dump(exclude_none=True)
        return msgspec.structs.replace(
            completion, message=message, finish_reason=choice.finish_reason, matched_stop=choice.matched_stop
        )

    def _request(self, messages: Messages, fields: dict[str, Any]) -> ChatCompletionRequest:
        # One of the limits on the output must be there: to look for the other one gives a warning, which takes long.
        body = {"max_completion_tokens": 1, "messages": messages, **fields}
        if "chat_template_kwargs" in body:
            body["chat_template_kwargs"] = dict(body["chat_template_kwargs"])  # SGLang adds to it
        return ChatCompletionRequest(**body)

    def _adapt(self, messages: Messages, options: ChatOptions) -> Any:
        """SGLang's request for a chat, or why there is none."""
        try:
            request = self._request(messages, options.fields)
            refusal = self.serving._validate_request(request)
            if refusal is not None:
                return RowError(refusal, code="invalid_messages", param="messages")
            adapted, _ = self.serving._convert_to_internal_request(request)
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
        adapter_ids={},
        tokenizer=hf_tokenizer,
        processor=None,
        served_model_name=model_path,
        model_config=SimpleNamespace(hf_config=config, is_multimodal=False, get_default_sampling_params=dict),
        server_args=SimpleNamespace(**SERVER_DEFAULTS),
    )
    templates = TemplateManager()
    templates.initialize_templates(manager, model_path)
    return ChatTokenizer(manager, templates)


SERVER_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(ServerArgs) if field.default is not dataclasses.MISSING
}
"""SGLang's server arguments, as they are unless a flag says otherwise."""


def _with_note(completion: Completion, problem: str) -> Completion:
    """The completion as it is, which says that it was not looked through."""
    note = f"the answer could not be parsed, its content is the whole text: {problem}"
    return msgspec.structs.replace(completion, note="; ".join(filter(None, (completion.note, note))))


def _plain(messages: Messages) -> Messages | None:
    """The messages, where they have nothing but role and text, and the last is not the assistant's; else None.

    What is null is not there. SGLang makes a user's message of a last one of the assistant's.
    """
    plain = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str) or role not in _PLAIN_ROLES:
            return None
        if len(message) > len(_PLAIN_KEYS):
            if any(value is not None for key, value in message.items() if key not in _PLAIN_KEYS):
                return None
            message = {"role": role, "content": content}
        plain.append(message)
    return plain if plain and plain[-1]["role"] != "assistant" else None


def _settings(adapted: Any) -> Settings:
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
