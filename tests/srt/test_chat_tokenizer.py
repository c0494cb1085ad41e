"""One body, one prompt: chats of batches become the prompts that SGLang's own chat serving makes of them."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

from batchllm.dataset import BadRow, Row, read_rows
from batchllm.errors import RowError
from batchllm.offline.encode import encode_requests
from batchllm.request import ChatOptions, ChatPrompt, Completion, SamplingParams
from batchllm.srt.entrypoints.serving_chat import RenderedText, ServingChat
from batchllm.srt.managers import chat_tokenizer
from batchllm.srt.managers.chat_tokenizer import ChatTokenizer
from tests.sizes import sized
from tests.srt.chat_templates import TEMPLATES, model_with

Body = dict[str, Any]


class Model:
    """A chat template behind batches, behind the live route, and behind that of SGLang itself."""

    def __init__(self, template: str | list[Body], folder: Path, server: Body) -> None:
        path = model_with(template, folder)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.items():
                patch.setitem(chat_tokenizer.SERVER_DEFAULTS, name, value)
            self.batch = chat_tokenizer.tokenizer_of_model(path)
        view = self.batch.serving.tokenizer_manager
        self.live = ServingChat(view.manager, self.batch.serving.template_manager)
        self.stock = OpenAIServingChat(view.manager, self.batch.serving.template_manager)

    def of_stock(self, body: Body) -> list[int] | str:
        return _serve(self.stock, body)

    def of_live(self, body: Body) -> list[int] | str:
        return _serve(self.live, body)

    def of_batch(self, body: Body) -> list[int] | str:
        """Token ids, or why there are none, by the way of rows of files."""
        record = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
        (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams())
        if isinstance(row, BadRow):
            return row.message
        (encoded,) = encode_requests([row.request], self.batch, {})
        return encoded.message if isinstance(encoded, RowError) else list(encoded.ids)


def _serve(serving: OpenAIServingChat, body: Body) -> list[int] | str:
    try:
        request = ChatCompletionRequest(**copy.deepcopy(body))
        refusal = serving._validate_request(request)
        if refusal is not None:
            return str(refusal)
        return list(serving._convert_to_internal_request(request)[0].input_ids)
    except Exception as error:  # whatever it is, the server answers it with an error
        return str(error) or "refused"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    models: dict[str, Model] = {}

    def make(kind: str, **server: Any) -> Model:
        key = f"{kind} {server}"
        if key not in models:
            models[key] = Model(TEMPLATES[kind], tmp_path_factory.mktemp("model"), server)
        return models[key]

    return make


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

_text = st.sampled_from(["Hi", " Name one river. ", "a\n\nb", "é🦀", '{"a": "<b>"}', "<think>\nx</think>\n\nyes"])
_parts = st.lists(_text.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
_call = st.builds(
    lambda arguments, i: {"id": f"c{i}", "type": "function", "function": {"name": "weather", "arguments": arguments}},
    st.sampled_from(['{"city": "Oslo"}', "{}", '{"city": "Øst", "n": [1, 2.5, null]}', "[1]", "no json"]),
    st.integers(0, 3),
)
_nothing = st.sampled_from(
    [{}, {"name": None}, {"refusal": None, "annotations": [], "audio": None}, {"tool_calls": None}]
)


def _message(role: str, content: st.SearchStrategy[Any], more: st.SearchStrategy[Body]) -> st.SearchStrategy[Body]:
    return st.builds(lambda c, m, n: {"role": role, "content": c} | m | n, content, more, _nothing)


_message_of_any = st.one_of(
    _message("user", _text | _parts, st.just({})),
    _message("system", _text | _parts, st.just({})),
    _message("developer", _text, st.just({})),
    _message("assistant", _text | _parts | st.none(), st.just({})),
    _message("assistant", _text | st.none(), st.lists(_call, min_size=1, max_size=2).map(lambda c: {"tool_calls": c})),
    _message("assistant", _text, st.just({"reasoning_content": "because"})),
    _message("tool", _text | _parts, st.just({"tool_call_id": "c0"})),
)
_turns = st.builds(
    lambda system, turns, last: [*system, *[m for turn in turns for m in turn], last],
    st.lists(_message("system", _text, st.just({})), max_size=1),
    st.lists(st.tuples(_message("user", _text, st.just({})), _message("assistant", _text, st.just({}))), max_size=2),
    _message("user", _text | _parts, st.just({})),
)
_fields = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.sampled_from([TOOLS, [], None]),
        "tool_choice": st.sampled_from(
            ["none", "auto", "required", None, {"type": "function", "function": {"name": "weather"}}]
        ),
        "parallel_tool_calls": st.booleans(),
        "reasoning_effort": st.sampled_from([None, "none", "low", "high"]),
        "chat_template_kwargs": st.sampled_from([None, {}, {"enable_thinking": False}, {"enable_thinking": True}]),
        "continue_final_message": st.booleans(),
        "separate_reasoning": st.booleans(),
        "add_generation_prompt": st.just(True),
        "modalities": st.just(["text"]),
        "user": st.none() | st.just("me"),
        "metadata": st.sampled_from([None, {}, {"a": "b"}]),
        "logit_bias": st.sampled_from([None, {}, {"300": 5}]),
        "max_tokens": st.just(3),
    },
)
bodies = st.builds(
    lambda messages, fields: {"model": "m", "messages": messages} | fields,
    st.lists(_message_of_any, min_size=1, max_size=4) | _turns,
    _fields,
)


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(
    max_examples=sized(40, 200),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(body=bodies)
def test_a_body_is_the_same_prompt_in_a_batch_as_live_or_both_refuse_it(
    make: Callable[..., Model], kind: str, body: Body
) -> None:
    """And SGLang's own server gives the same ids, but where a text would be missing from the prompt."""
    model = make(kind)
    live, batch, stock = model.of_live(body), model.of_batch(body), model.of_stock(body)
    if isinstance(live, str):
        assert isinstance(batch, str), (live, batch)
        assert isinstance(stock, str) or "is not in the prompt" in live
    else:
        assert batch == live == stock


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        pytest.param(
            "tools with tojson",
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "content": "3"},
                ]
            },
            '<|im_start|>assistant\n\n<call>weather {"city": "Oslo"}<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n'
            "<|im_start|>assistant\n",
            id="arguments of a tool call are an object",
        ),
        pytest.param(
            "tools with items",
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "content": "3"},
                ]
            },
            "<|im_start|>assistant\n<call weather city=Oslo><|im_end|>\n<|im_start|>tool\n3<|im_end|>\n"
            "<|im_start|>assistant\n",
            id="whose items can be had",
        ),
        pytest.param(
            "string",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n",
            id="parts have a space between them",
        ),
        pytest.param(
            "string",
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n",
            id="a last message of the assistant's is a user's",
        ),
        pytest.param(
            "string",
            {
                "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2,"}],
                "continue_final_message": True,
            },
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2,",
            id="or is gone on with",
        ),
        pytest.param(
            "thinking switch",
            {"messages": [{"role": "user", "content": "1"}], "chat_template_kwargs": {"enable_thinking": False}},
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            id="arguments of the template",
        ),
        pytest.param(
            "thinking switch",
            {"messages": [{"role": "user", "content": "1"}], "reasoning_effort": "none"},
            "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            id="an effort is a switch too",
        ),
    ],
)
def test_a_chat_becomes_this_text(make: Callable[..., Model], kind: str, fields: Body, text: str) -> None:
    model = make(kind)
    assert model.of_batch(fields) == model.batch.hf.encode(text, add_special_tokens=False) == model.of_live(fields)


def test_a_named_template_of_sglang_s_holds_in_batches_with_its_stop_strings(tmp_path: Path) -> None:
    """``--chat-template chatml``."""
    model = Model(TEMPLATES["string"], tmp_path, {})
    templates = model.batch.serving.template_manager
    templates.load_chat_template(model.batch.serving.tokenizer_manager.manager, "chatml", str(tmp_path))
    body = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}], "stop": "x"}
    assert model.of_batch(body) == model.of_live(body) == model.of_stock(body)
    (prompt,) = model.batch.encode_chats([(body["messages"], None)])
    assert isinstance(prompt, ChatPrompt) and "<|im_end|>" in dict(prompt.settings)["stop"]


def test_default_arguments_of_the_template_hold_in_batches(make: Callable[..., Model]) -> None:
    model = make("thinking switch", default_chat_template_kwargs={"enable_thinking": False})
    body = {"messages": [{"role": "user", "content": "1"}]}
    assert model.of_batch(body) == model.of_live(body)
    assert model.batch.hf.decode(model.of_batch(body)).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("content", ["Hi", "  x y "])
def test_a_text_that_a_template_leaves_out_is_refused_live_and_in_a_batch(
    make: Callable[..., Model], content: str
) -> None:
    """A template that takes parts alone leaves a string out, and SGLang answers what is left."""
    model = make("parts only")
    body = {"messages": [{"role": "user", "content": content}]}
    assert isinstance(model.of_stock(body), list)
    for refusal in (model.of_batch(body), model.of_live(body)):
        assert isinstance(refusal, str)
        assert "the text of messages[0].content is not in the prompt; write the content as a list of parts" in refusal


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("strict roles", [{"role": "user", "content": " x "}]),
        ("thinking switch", [{"role": "assistant", "content": "<think>a</think>"}, {"role": "user", "content": "x"}]),
        ("string", [{"role": "user", "content": ""}, {"role": "user", "content": " \n"}]),
    ],
)
def test_what_a_template_does_to_a_text_is_its_own(make: Callable[..., Model], kind: str, messages: list[Body]) -> None:
    """A text that is trimmed, a thought that is dropped, a text that is empty: nothing is refused."""
    model = make(kind)
    assert model.of_batch({"messages": messages}) == model.of_stock({"messages": messages})


def test_other_fields_of_a_body_make_another_prompt_whatever_came_before(make: Callable[..., Model]) -> None:
    """Plain chats take a shorter way once SGLang was seen to render one with the same other fields."""
    model = make("thinking switch")
    plain = [{"role": "user", "content": "1"}]
    off = ChatOptions(fields={"chat_template_kwargs": {"enable_thinking": False}})
    chats = [(plain, None), (plain, off), (plain, None), (plain, off), ([{"role": "user", "content": "2"}], off)]
    prompts = model.batch.encode_chats(chats)
    ids = [list(prompt.ids) for prompt in prompts if isinstance(prompt, ChatPrompt)]
    assert ids[0] == ids[2] != ids[1] == ids[3] and len(ids[4]) == len(ids[3]) and ids[4] != ids[3]
    assert [list(p.ids) for chat in chats for p in ChatTokenizer.encode_chats(model.batch, [chat])] == ids


USER = {"role": "user", "content": "W?"}
ANSWERS = [
    "Hi.",
    "<think>\nHm.\n</think>\n\nHi.",
    "Hm.\n</think>\n\nHi.",
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    'Hm</think>I look.<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    '<tool_call>\n{"name": "weather", "arguments"',
    '[{"name": "weather", "parameters": {"city": "Oslo"}}]',
]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "required"},
        {"separate_reasoning": False, "tools": TOOLS},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [USER, {"role": "assistant", "content": "<think>I"}], "continue_final_message": True},
        {"messages": [USER, {"role": "assistant", "content": "I"}], "continue_final_message": True, "tools": TOOLS},
    ],
    ids=["plain", "tools", "no tool", "a tool", "reasoning in the text", "no reasoning", "midst of it", "goes on"],
)
@pytest.mark.parametrize("default_kwargs", [None, {"enable_thinking": False}], ids=["", "thinking off by default"])
def test_an_answer_becomes_the_message_that_the_server_gives(
    make: Callable[..., Model], fields: Body, default_kwargs: Body | None
) -> None:
    """By the same parsers, of the same fields; but for the ids of tool calls, which are random there."""
    server = {"tool_call_parser": "qwen25", "reasoning_parser": "qwen3", "default_chat_template_kwargs": default_kwargs}
    model = make("tools with tojson", **server)
    body = {"messages": [USER]} | fields
    for text in ANSWERS:
        completion = Completion(
            index=0,
            text=text,
            output_ids=(1, 2),
            finish_reason="stop",
            prompt_tokens=3,
            cached_tokens=0,
            matched_stop=2,
        )
        row = read_one(body)
        (parsed,) = model.batch.parse_answers([(row.head.chat or {}, completion)])
        assert (_without_ids(parsed.message or {}), parsed.finish_reason, parsed.matched_stop) == _choice_of(
            model.stock, body, text
        )


@pytest.mark.parametrize(("chosen", "kind"), [(None, "string"), ("other", "thinking switch")])
def test_of_several_templates_of_a_model_the_chosen_one_or_the_first_is_taken(
    make: Callable[..., Model], tmp_path: Path, chosen: str | None, kind: str
) -> None:
    """Without an engine too."""
    named = [{"name": name, "template": TEMPLATES[of]} for name, of in (("default", "string"), ("other", kind))]
    model = Model(named, tmp_path, {"hf_chat_template_name": chosen})
    body = {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}
    assert model.of_batch(body) == model.of_stock(body) == make(kind).of_stock(body)


@pytest.mark.parametrize("flag", ["reasoning_parser", "tool_call_parser"])
def test_an_answer_that_a_parser_fails_on_is_kept_and_says_so(
    make: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    model = make("tools with tojson", tool_call_parser="qwen25", reasoning_parser="qwen3")
    monkeypatch.setattr(model.batch.serving, flag, "no such parser")
    completion = Completion(
        index=0, text="Hi.", output_ids=(1,), finish_reason="stop", prompt_tokens=3, cached_tokens=0, note="a note"
    )
    (kept,) = model.batch.parse_answers([({"tools": TOOLS}, completion)])
    assert (kept.text, kept.message, kept.finish_reason) == ("Hi.", None, "stop")
    assert (kept.note or "").startswith("a note; the answer could not be parsed, its content is the whole text: ")


def test_a_prompt_that_somebody_looks_at_is_encoded_once() -> None:
    calls: list[str] = []

    def encode(text: str) -> list[int]:
        calls.append(text)
        return [1, 2, 3]

    rendered = RenderedText("abc", encode, adds_special_tokens=False, tail=[4])
    assert [list(rendered), len(rendered), rendered[-1]] == [[1, 2, 3, 4], 4, 4]
    assert calls == ["abc"]


def read_one(body: Body) -> Row:
    record = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams())
    assert isinstance(row, Row), row
    return row


def _choice_of(serving: OpenAIServingChat, body: Body, text: str) -> tuple[Body, str, int | None]:
    """The message, and what ended it."""
    request = ChatCompletionRequest(**copy.deepcopy(body))
    serving._convert_to_internal_request(request)  # it fills in what the server's flags say
    meta_info = {"id": "x", "finish_reason": {"type": "stop", "matched": 2}, "prompt_tokens": 3, "completion_tokens": 2}
    answer = {"text": text, "output_ids": [1, 2], "meta_info": meta_info | {"weight_version": "", "cached_tokens": 0}}
    (choice,) = serving._build_chat_response(request, [answer], 0).choices
    return _without_ids(choice.message.model_dump(exclude_none=True)), choice.finish_reason, choice.matched_stop


def _without_ids(message: Body) -> Body:
    calls = [{name: value for name, value in call.items() if name != "id"} for call in message.get("tool_calls", [])]
    return message | ({"tool_calls": calls} if calls else {})
