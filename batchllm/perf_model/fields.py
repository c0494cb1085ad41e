"""Checks that the values of this room share: numbers in range, and known names.

Knows: numbers and names. Must not know: what any of them means.
Invariant: what is wrong is named with its owner, its field and its value.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TypeVar

from batchllm.errors import ConfigError

T = TypeVar("T")


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
