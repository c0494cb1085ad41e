"""Checks of single field values: right type, right range, and a message that says what would do.

Knows JSON values only; not which row kind or parameter it checks (the caller passes the name).

INVARIANT: a check returns a clean value or raises `RowError` naming the field; nothing else
escapes, whatever a JSON parser can produce.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from array import array
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import orjson

from batchllm.dataset.schema_support import grammar_schema, schema_problem
from batchllm.dataset.schema_values import misread_escape
from batchllm.errors import RowError

Check = Callable[[str, object], object]
"""``check(name, value)`` returns the clean value or raises `RowError`."""

T = TypeVar("T")

MAX_INT32 = 2**31 - 1
"""Token ids and lengths are int32 everywhere inside."""
MAX_INT64 = 2**63 - 1
MAX_FLOAT32 = float.fromhex("0x1.fffffep+127")
MIN_FLOAT32 = float.fromhex("0x1p-126")
"""The least above 0 that is held with full precision."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = 60
_SHORT.maxother = 60


def show(value: object) -> str:
    """A value for a message: bounded, however large the value is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer with more digits than Python writes
        return f"a {type(value).__name__} that is too large to be shown"


def closest(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where a known name is near, else the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name if isinstance(name, str) else show(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"


def wrong_type(name: str, wanted: str, value: object) -> RowError:
    """The error for a value that is not of the wanted type."""
    return RowError(f"{name} must be {wanted}, not {show(value)}", code="invalid_parameter_type", param=name)


def out_of_range(name: str, wanted: str, value: object) -> RowError:
    """The error for a value of the right type that is too small, too large or empty."""
    return RowError(f"{name} must be {wanted}, not {show(value)}", code="parameter_out_of_range", param=name)


def unboxed(value: Any) -> Any:
    """What a scalar of numpy is in Python; any other value as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value


def whole(value: Any) -> Any:
    """JSON knows no integers: 8.0 is 8, also where a column of integers became one of doubles. Other values stay."""
    value = unboxed(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def integer(low: int, high: int = MAX_INT32) -> Check:
    """A check for an integer in ``[low, high]``, written in any way; a bool is not one."""

    def check(name: str, value: object) -> int:
        if type(value) is not int:
            value = whole(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong_type(name, "an integer", value)
        if not low <= value <= high:
            raise out_of_range(name, f"an integer from {low} to {high}", value)
        return int(value)

    return check


def number(low: float, high: float = math.inf, *, low_open: bool = False) -> Check:
    """A check for a number in ``[low, high]``, or ``(low, high]`` where ``low_open``, that 32 bits can hold."""
    wanted = f"a number above {low:g}" if low_open else f"a number of at least {low:g}"
    if high != math.inf:
        wanted += f" and at most {high:g}"

    def check(name: str, value: object) -> float:
        value = unboxed(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise wrong_type(name, "a number", value)
        in_range = low < value <= high if low_open else low <= value <= high
        if not in_range:
            raise out_of_range(name, wanted, value)
        # The engine has it in 32 bits: one beyond would end it, and a small one would be 0 there.
        if not -MAX_FLOAT32 <= value <= MAX_FLOAT32 or (low_open and value - low < MIN_FLOAT32):
            raise out_of_range(name, f"{wanted}, as a float of 32 bits", value)
        return float(value)

    return check


_any_number = number(-math.inf)
_MAX_ID_DIGITS = 10


def as_list(value: Any) -> Any:
    """What an array of numpy is as a list; any other value as it is."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return value


def boolean(name: str, value: object) -> bool:
    """Checks for true or false; 0 and 1 are not."""
    value = unboxed(value)
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return value


def top_k(name: str, value: object) -> int:
    """Checks for a positive integer, or -1 or 0 (the whole vocabulary); returns -1 for both."""
    value = whole(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, "an integer", value)
    if not -1 <= value <= MAX_INT32:
        raise out_of_range(name, "-1 (the whole vocabulary) or at least 1", value)
    return int(value) or -1


def stop_strings(name: str, value: object) -> tuple[str, ...] | None:
    """Checks for one string, or a list of non-empty ones; None for an empty string or list, which says nothing."""
    listed = [value] if isinstance(value, str) else as_list(value)
    if listed in ([], (), [""]):
        return None
    if not isinstance(listed, (list, tuple)) or not all(isinstance(s, str) for s in listed):
        raise wrong_type(name, "a string or a list of strings", value)
    if "" in listed:
        raise out_of_range(name, "made of non-empty strings", value)
    return tuple(whole_characters(name, string) for string in listed)


def stop_ids(name: str, value: object) -> tuple[int, ...]:
    """Checks for a list of token ids; it may be empty."""
    value = as_list(value)
    if not isinstance(value, (list, tuple)):
        raise wrong_type(name, "a list of token ids", value)
    value = [whole(item) for item in value]
    if not all(type(i) is int for i in value):
        raise wrong_type(name, "a list of token ids", value)
    if value and not 0 <= min(value) <= max(value) <= MAX_INT32:
        raise out_of_range(name, f"made of token ids from 0 to {MAX_INT32}", value)
    return tuple(value)


def json_schema_text(name: str, value: object) -> str:
    """Checks for a JSON schema that the grammar keeps, as an object or as its JSON text; returns the text."""
    text = any_json_schema_text(name, value)
    problem = schema_problem(text)
    if problem is not None:
        raise RowError(f"{name}: {problem}", code="unsupported_schema", param=name)
    return grammar_schema(text)


def any_json_schema_text(name: str, value: object) -> str:
    """Checks for a JSON schema, as an object or as its JSON text; returns the text.

    Key order is kept: grammar backends emit properties in the order of the schema.
    """
    if isinstance(value, str):
        try:
            parsed = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise _bad_schema(name, f"is not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(parsed, dict):
            raise _bad_schema(name, f"must hold a JSON object, not {show(parsed)}")
        json_bytes(name, parsed, code="invalid_json_schema")
        return exact(value)
    if not isinstance(value, dict):
        raise _bad_schema(name, f"must be a JSON object or its text, not {show(value)}")
    return json_bytes(name, value, code="invalid_json_schema").decode()


def json_bytes(name: str, value: object, *, code: str = "not_json", param: str | None = None, depth: int = 0) -> bytes:
    """The value as JSON.

    Args:
        param: The field at fault, where ``name`` is more than its name.
        depth: Lists to write around the value.

    Raises:
        RowError: It has half a character, a type that JSON has not, or is nested deeper than orjson writes (some 250).
    """
    nested = value
    for _ in range(depth):
        nested = [nested]
    try:
        return orjson.dumps(nested, default=_of_numpy)
    except orjson.JSONEncodeError as error:
        if "surrogate" in str(error):
            whole_texts(name, value)
        raise RowError(f"{name} cannot be written as JSON: {error}", code=code, param=param or name) from None


def _of_numpy(value: object) -> object:
    if (plain := as_list(value)) is value:
        raise TypeError
    return plain


def regex_text(name: str, value: object) -> str:
    """Checks for a regular expression; the grammar library, whose dialect it is, says whether it compiles.

    Only escapes are refused that the library would take for a letter, such as ``\\A`` and ``\\Z``.
    """
    if not isinstance(value, str):
        raise wrong_type(name, "a regular expression", value)
    misread = misread_escape(value)
    if misread is not None:
        raise RowError(
            f"{name}: the grammar takes {misread} for the letter {misread[1]}; drop it, all of an answer matches",
            code="invalid_regex",
            param=name,
        )
    return whole_characters(name, value)


def exact(text: str) -> str:
    """The text without a class of the user's own, which no other process knows."""
    return text if type(text) is str else str.__str__(text)


def whole_characters(name: str, value: str) -> str:
    """Checks that a text can be written as UTF-8: half a surrogate pair is no character.

    Returns:
        The text as a plain str.

    Raises:
        RowError: ``lone_surrogate``, with its place.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name} has half a character, {error.object[error.start]!a}, at {error.start}; write the whole one",
            code="lone_surrogate",
            param=name,
        ) from None
    return exact(value)


def anything(name: str, value: object) -> object:
    """Checks nothing; another one judges the value."""
    return value


_DEEPEST_PLACE = 4
"""Containers around a field of a row, wherever it is written: the longest way is a tool call's in a `RowHead`."""


def writable(name: str, value: object) -> object:
    """Checks that a value can be written as JSON, as deep as it lies in what is written of a row."""
    json_bytes(name, value, depth=_DEEPEST_PLACE)
    return value


def of_type(kind: type[T], wanted: str) -> Callable[[str, object], T]:
    """A check for any value of a type, which ``wanted`` names."""

    def check(name: str, value: object) -> T:
        if not isinstance(value, kind):
            raise wrong_type(name, wanted, value)
        return value

    return check


text = of_type(str, "a string")


def adapter_name(name: str, value: object) -> str | None:
    """Checks for the name of an adapter; an empty one asks for the base model."""
    return whole_characters(name, text(name, value)) or None


def grammar_text(name: str, value: object) -> str:
    """Checks for a grammar as text that is not empty; whether it is one is for the grammar library."""
    if not isinstance(value, str) or not value:
        raise wrong_type(name, "a grammar as text", value)
    return whole_characters(name, value)


def structural_tag_text(name: str, value: object) -> str:
    """Checks for a structural tag, as an object or as its JSON text; returns the text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise wrong_type(name, f"JSON ({error.msg} at column {error.colno})", value) from None
    if not isinstance(value, dict):
        raise wrong_type(name, "an object or its JSON text", value)
    return json_bytes(name, value).decode()


def logit_bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """Checks for an object of token ids, as text, and finite numbers; returns pairs by ascending id."""
    if isinstance(value, tuple):  # as `SamplingParams` has it
        value = dict(value) if all(isinstance(pair, tuple) and len(pair) == 2 for pair in value) else None
    if not isinstance(value, dict):
        raise wrong_type(name, "an object of token ids and numbers", value)
    pairs: dict[int, float] = {}
    for key, bias in value.items():
        text = key if isinstance(key, str) else show(key)
        if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_ID_DIGITS) or int(text) > MAX_INT32:
            raise out_of_range(name, f"an object whose keys are token ids from 0 to {MAX_INT32}", key)
        number = _any_number(f"{name}[{text}]", bias)
        assert isinstance(number, float)
        pairs[int(text)] = number
    return tuple(sorted(pairs.items()))


def whole_texts(name: str, value: object) -> None:
    """Checks that every text inside a JSON value can be written as UTF-8.

    Raises:
        RowError: ``lone_surrogate``, with the place of the text.
    """
    if isinstance(value, str):
        whole_characters(name, value)
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            whole_texts(f"{name}[{position}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            whole_texts(name, key)
            whole_texts(f"{name}.{key}", item)


def token_ids(name: str, value: object) -> array[int]:
    """Checks for a non-empty list of token ids.

    Returns:
        A flat int32 array: a ninth of a list's memory, and numpy reads it without a copy.
    """
    if type(value) is not list:
        value = as_list(value)
        if isinstance(value, (tuple, range, array)):
            value = list(value)
        if not isinstance(value, list):
            raise _bad_ids(name, f"{name} must be a list of token ids, not {show(value)}")
    if not value:
        raise RowError(f"{name} is empty; give at least one token id", code="empty_prompt", param=name)
    try:
        ids = array("i", value)
        least = min(ids)  # a bool would have become 0 or 1
        if least > 1 or (least >= 0 and set(map(type, value)) == {int}):
            return ids
    except (TypeError, OverflowError):
        pass  # what follows says which item it is
    value = [whole(item) for item in value]
    if set(map(type, value)) != {int}:  # exact type: a bool is an int to isinstance
        at, item = next((i, v) for i, v in enumerate(value) if type(v) is not int)
        raise _bad_ids(name, f"{name}[{at}] must be a token id, not {show(item)}")
    if not 0 <= min(value) <= max(value) <= MAX_INT32:
        at, item = next((i, v) for i, v in enumerate(value) if not 0 <= v <= MAX_INT32)
        raise _bad_ids(name, f"{name}[{at}] must be a token id from 0 to {MAX_INT32}, not {show(item)}")
    return array("i", value)


def _bad_schema(name: str, what: str) -> RowError:
    return RowError(f"{name} {what}", code="invalid_json_schema", param=name)


def _bad_ids(name: str, message: str) -> RowError:
    return RowError(message, code="invalid_input_ids", param=name)


def task_name(value: object) -> str:
    """The task that a row names; "" where it names none.

    Raises:
        RowError: It is not a string.
    """
    if value is not None and not isinstance(value, str):
        raise RowError(f"task must be a string, not {show(value)}", code="invalid_task", param="task")
    return exact(value or "")
