"""Rows of ``/v1/responses``, as far as they are text: a chat in other words.

Knows the fields of its bodies, how SGLang makes a chat of them (upstream: ``OpenAIServingResponses``), and the body of
an answer; what a chat asks for beside its messages is in `openai_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchllm.dataset import field_checks as checks
from batchllm.dataset.openai_body import IGNORED, asks_nothing, unknown_name
from batchllm.dataset.records import RowHead
from batchllm.errors import RowError
from batchllm.request import Completion

_OF_A_CHAT = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
        *("stop", "extra_key", "cache_salt", "model", "user", "metadata"),
    }
)
"""Fields that mean the same in a chat's body."""
_OWN = frozenset({"input", "instructions", "max_output_tokens", *_OF_A_CHAT})
_NO_CHANGE: Mapping[str, tuple[Any, ...]] = {
    "truncation": ("disabled",),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
}
"""Values beside null, nothing, false and 0 that ask for what happens anyway."""
_SAID_AGAIN = ("instructions", "max_output_tokens", "temperature", "top_p")
"""Fields of the body that stand in the answer."""
_REFUSED = frozenset(
    {
        *("background", "conversation", "include", "max_tool_calls", "previous_response_id", "prompt", "reasoning"),
        *("request_id", "session_id", "stream", "text", "tool_choice", "tools", "top_logprobs", "truncation"),
        "parallel_tool_calls",
    }
)
_TEXT_PARTS = ("input_text", "output_text", "text")
_ROLES = ("user", "assistant", "system", "developer")
_LIMIT = checks.integer(1)


def as_chat(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The body of a chat that asks the same, and what the answer says again of this body.

    Raises:
        RowError: A field is wrong or unknown, or asks for more than text; its name is said.
    """
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if name in _OF_A_CHAT:
            chat[name] = value
        elif name not in _OWN and name not in IGNORED:
            _check_refused(name, value)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = _LIMIT("max_output_tokens", body["max_output_tokens"])
    chat["messages"] = _messages(body)
    metadata = body.get("metadata")
    return chat, {name: body.get(name) for name in _SAID_AGAIN} | {"metadata": metadata or {}}


def _check_refused(name: str, value: object) -> None:
    if name not in _REFUSED:
        raise unknown_name(name, _OWN)
    if not asks_nothing(name, value) and value not in _NO_CHANGE.get(name, ()):
        raise RowError(
            f"{name}: of /v1/responses only text is answered in batches; leave it out, or ask the live route",
            code="unsupported_parameter",
            param=name,
        )


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Instructions and all that the system says first, as one message; the assistant's side by side as one."""
    given = body.get("input")
    if not given or not isinstance(given, (str, list)):
        raise RowError(
            "input must be a text or a list of messages that is not empty", code="missing_prompt", param="input"
        )
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    said: list[str] = []
    others: list[dict[str, Any]] = []
    if body.get("instructions"):
        said.append(checks.text("instructions", body["instructions"]))
    for position, item in enumerate(items):
        role, content = _message(f"input[{position}]", item)
        if role in ("system", "developer"):
            said += [content] if isinstance(content, str) else [part["text"] for part in content]
        elif role == "assistant" and others and others[-1]["role"] == role:
            others[-1]["content"] = _joined(others[-1]["content"], content)
        else:
            others.append({"role": role, "content": content})
    return [{"role": "system", "content": "\n\n".join(said)}, *others] if said else others


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(filter(None, (first, second)))
    parts = [[{"type": "text", "text": side}] if isinstance(side, str) else side for side in (first, second)]
    return [*parts[0], *parts[1]]


def _message(name: str, item: object) -> tuple[str, Any]:
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        kind = item.get("type") if isinstance(item, dict) else item
        raise RowError(
            f"{name} must be a message, not {checks.show(kind)}: of /v1/responses only text is answered in batches",
            code="unsupported_content",
            param=name,
        )
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise RowError(
            f"{name}.role must be one of {', '.join(_ROLES)}, not {checks.show(role)}",
            code="invalid_messages",
            param=f"{name}.role",
        )
    if isinstance(content, str):
        return role, content
    if not isinstance(content, list):
        raise checks.wrong_type(f"{name}.content", "a text or a list of parts", content)
    for position, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            place = f"{name}.content[{position}]"
            raise RowError(
                f"{place} must be a part of type input_text or output_text; only text is answered in batches",
                code="unsupported_content",
                param=place,
            )
    return role, [{"type": "text", "text": part["text"]} for part in content]


def response_body(head: RowHead, sample: Completion, *, digest: str, model: str, created: int) -> dict[str, Any]:
    """The body of an answer, as OpenAI has it.

    Args:
        sample: The only one.
        digest: Stands in identifiers.
        model: Name to report where the row names none.
        created: Unix seconds to report.
    """
    message = sample.message or {"content": sample.text}
    output: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        thought = {"type": "reasoning_text", "text": message["reasoning_content"]}
        output.append({"id": f"rs_{digest}", "type": "reasoning", "summary": [], "content": [thought]})
    is_cut = sample.finish_reason == "length"
    text: dict[str, Any] = {"type": "output_text", "text": message.get("content") or "", "annotations": []}
    output.append(
        {
            "id": f"msg_{digest}",
            "type": "message",
            "role": "assistant",
            "status": "incomplete" if is_cut else "completed",
            "content": [text],
        }
    )
    num_output = sample.completion_tokens
    return {
        "id": f"resp_{digest}",
        "object": "response",
        "created_at": created,
        "model": head.model or model,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "error": None,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "none",
        "tools": [],
        **(head.answer or {}),
        **({} if sample.note is None else {"note": sample.note}),
        "usage": {
            "input_tokens": sample.prompt_tokens,
            "input_tokens_details": {"cached_tokens": sample.cached_tokens},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sample.prompt_tokens + num_output,
        },
    }
