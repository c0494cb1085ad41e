"""Checks of what a row asks: prompt text, token ids, or chat messages.

Knows the forms a prompt takes in both row kinds; not the rest of the row.

INVARIANT: what passes is a non-empty str, a non-empty int32 array, or a non-empty list of messages with roles and
content. Everything else of a message is for SGLang's chat serving to judge.
"""

from __future__ import annotations

from array import array
from typing import Any

from batchllm.dataset.field_checks import closest, show, token_ids, whole_characters, writable
from batchllm.errors import RowError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "latest_reminder"})
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "tools"})
_PASSED_OVER = frozenset({"annotations", "id"})
"""Says nothing to a model: where an answer had its facts from."""
_OTHER_PARTS = frozenset({"thinking", "reasoning", "tool_reference"})


_NOTHING: tuple[object, ...] = (None, "", [], {}, False)


def check_text(name: str, value: object) -> str:
    """Checks for a non-empty string."""
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string, not {show(value)}", code="invalid_prompt", param=name)
    if not value:
        raise empty_prompt(name)
    return whole_characters(name, value)


def check_prompts(name: str, value: object) -> str | array[int] | list[str | array[int]]:
    """Checks text, token ids, or a list of either, of which a body of OpenAI's answers each."""
    if not isinstance(value, list):
        return check_text(name, value)
    if not value:
        raise empty_prompt(name)
    if not isinstance(value[0], (str, list)):
        return token_ids(name, value)
    is_ids = isinstance(value[0], list)
    return [
        token_ids(f"{name}[{i}]", item) if is_ids else check_text(f"{name}[{i}]", item) for i, item in enumerate(value)
    ]


def prompt_fields(prompts: str | array[int] | list[str | array[int]]) -> dict[str, Any]:
    """The field of a request that holds what `check_prompts` gives; of a list of one that one."""
    if isinstance(prompts, list) and len(prompts) > 1:
        return {"prompts": prompts}
    (only,) = prompts if isinstance(prompts, list) else [prompts]
    return {"prompt" if isinstance(only, str) else "input_ids": only}


def check_messages(value: object) -> list[dict[str, Any]]:
    """Checks chat messages; returns them as they are.

    Text parts are not joined here: whether a chat template wants parts or one string is known
    where the template is.
    """
    if not isinstance(value, list):
        raise _bad_message("messages", f"must be a list of messages, not {show(value)}")
    if not value:
        raise empty_prompt("messages")
    for position, message in enumerate(value):
        _check_message(f"messages[{position}]", message)
    return value


def empty_prompt(name: str) -> RowError:
    """The error for a prompt with nothing in it."""
    return RowError(f"{name} is empty; a row needs something to answer", code="empty_prompt", param=name)


def _check_message(name: str, message: object) -> None:
    if not isinstance(message, dict):
        raise _bad_message(name, f"must be an object with role and content, not {show(message)}")
    for key, value in message.items():
        if key not in MESSAGE_KEYS and key not in _PASSED_OVER and value not in _NOTHING:
            raise _bad_message(name, f"has an unknown key {show(key)}{closest(key, MESSAGE_KEYS)}")
        if not isinstance(value, str):
            writable(f"{name}.{key}", value)
    role = message.get("role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        wanted = ", ".join(sorted(ROLES))
        raise _bad_message(f"{name}.role", f"must be one of {wanted}, not {show(role)}")
    content = message.get("content")
    if isinstance(content, list):
        for position, part in enumerate(content):
            _check_part(f"{name}.content[{position}]", part)
    elif content is None and role.lower() != "user":
        pass  # a turn that only calls tools has no content, and others may have none
    elif not isinstance(content, str):
        wanted = "a string or a list of text parts"
        raise _bad_message(f"{name}.content", f"must be {wanted}, not {show(content)}")


def _check_part(name: str, part: object) -> None:
    if not isinstance(part, dict):
        raise _bad_message(name, f"must be a text part, not {show(part)}")
    kind = part.get("type")
    if isinstance(kind, str) and kind in _OTHER_PARTS:
        return
    if kind != "text":
        raise RowError(
            f"{name} is a part of type {show(kind)}; only text parts can be answered",
            code="unsupported_content",
            param=name,
        )
    if not isinstance(part.get("text"), str):
        raise _bad_message(f"{name}.text", f"must be a string, not {show(part.get('text'))}")


def _bad_message(name: str, what: str) -> RowError:
    return RowError(f"{name} {what}", code="invalid_messages", param=name)
