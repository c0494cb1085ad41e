"""Checks that the values of this room share: numbers in range, known names, and values read from JSON.

Knows: dataclasses of plain numbers and texts. Must not know: what any of them means.
Invariant: what is wrong is named with its owner, its field and its value.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from batchllm.errors import ConfigError

T = TypeVar("T")

# By the text of an annotation, as `from __future__ import annotations` leaves it.
_JSON_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
_TYPE_NOUNS = {"str": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"}


def check_positive(owner: str, **values: float) -> None:
    """Raise `ConfigError` unless every value is finite and above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{owner}: {name} must be a finite number above 0, not {value}")


def lookup(what: str, name: str, known: Mapping[str, T]) -> T:
    """The entry of that name.

    Raises:
        ConfigError: There is none; names the nearest and lists all.
    """
    if name in known:
        return known[name]
    lowered = {key.lower(): key for key in known}
    # What a name begins with says more than how many letters agree: "a100" is "A100-80GB" rather than "H100".
    close = [key for key in lowered if name and key.startswith(name.lower())]
    close = close or difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.3)
    hint = f" Did you mean {lowered[close[0]]!r}?" if close else ""
    raise ConfigError(f"{what} {name!r} is not known.{hint} Known: {', '.join(known)}")


def from_json(cls: type[T], value: Any, where: str) -> T:
    """A dataclass from what `dataclasses.asdict` and JSON made of it.

    Args:
        cls: A dataclass with fields of type str, bool, int and float only.
        value: The parsed JSON.
        where: Names the value in errors, e.g. ``h200.json: device``.

    Raises:
        ConfigError: Not an object, a field is missing, unknown or of another type, or the class refuses it.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a JSON object, not {type(value).__name__}")
    # A type variable cannot say that its types are dataclasses.
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name!r}; known: {', '.join(known)}")
    given = {}
    for name, spec in known.items():
        if name in value:
            given[name] = checked(value[name], str(spec.type), f"{where}.{name}")
        elif spec.default is MISSING:
            raise ConfigError(f"{where}: field {name!r} is missing")
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def checked(value: Any, type_name: str, where: str) -> Any:
    """The value, if it is of that type: "str", "bool", "int" or "float", which may be written as an int and stays one.

    Raises:
        ConfigError: It is of another type.
    """
    # To Python, true is a number.
    if isinstance(value, bool) != (type_name == "bool") or not isinstance(value, _JSON_TYPES[type_name]):
        raise ConfigError(f"{where} must be {_TYPE_NOUNS[type_name]}, not {value!r}")
    return value
