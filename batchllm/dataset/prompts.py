"""Checks of what a row asks: prompt text, token ids, or chat messages.

Knows the forms a prompt takes in both row kinds; not the rest of the row.

INVARIANT: what passes is a non-empty str, a non-empty int32 array, or a non-empty list of messages
that a chat template can render.
"""

from __future__ import annotations

from array import array
from typing import Any

from batchllm.dataset.field_checks import closest, show, token_ids, whole_characters, whole_texts
from batchllm.errors import RowError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "refusal"})


def check_text(name: str, value: object) -> str:
    """Checks for a non-empty string."""
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string, not {show(value)}", code="invalid_prompt", param=name)
    if not value:
        raise empty_prompt(name)
    return whole_characters(name, value)


def check_completion_prompt(value: object) -> str | array[int]:
    """Checks an OpenAI completions prompt: text, token ids, or a list with exactly one of those."""
    if not isinstance(value, list):
        return check_text("prompt", value)
    if not value:
        raise empty_prompt("prompt")
    if not isinstance(value[0], (str, list)):
        return token_ids("prompt", value)
    if len(value) > 1:
        raise RowError(
            f"prompt holds {len(value)} prompts; write one row for each, with its own custom_id",
            code="multiple_prompts",
            param="prompt",
        )
    only = value[0]
    return token_ids("prompt[0]", only) if isinstance(only, list) else check_text("prompt[0]", only)


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
    whole_texts("messages", value)
    return value


def empty_prompt(name: str) -> RowError:
    """The error for a prompt with nothing in it."""
    return RowError(f"{name} is empty; a row needs something to answer", code="empty_prompt", param=name)


def _check_message(name: str, message: object) -> None:
    if not isinstance(message, dict):
        raise _bad_message(name, f"must be an object with role and content, not {show(message)}")
    for key in message:
        if key not in MESSAGE_KEYS:
            raise _bad_message(name, f"has an unknown key {key!r}{closest(key, MESSAGE_KEYS)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        wanted = ", ".join(sorted(ROLES))
        raise _bad_message(f"{name}.role", f"must be one of {wanted}, not {show(role)}")
    content = message.get("content")
    if isinstance(content, list):
        for position, part in enumerate(content):
            _check_part(f"{name}.content[{position}]", part)
    elif content is None and role == "assistant" and message.get("tool_calls"):
        pass  # an assistant turn that only calls tools has no content
    elif not isinstance(content, str):
        wanted = "a string or a list of text parts"
        raise _bad_message(f"{name}.content", f"must be {wanted}, not {show(content)}")


def _check_part(name: str, part: object) -> None:
    if not isinstance(part, dict):
        raise _bad_message(name, f"must be a text part, not {show(part)}")
    kind = part.get("type")
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
