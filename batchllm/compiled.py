"""Functions that numba compiles, and keeps for the next process where it finds a place for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As ``numba.njit(cache=True, **options)``; without a cache where neither the folder of the file nor the user's
    cache folder can be written, as in a container whose file system is read-only: numba would refuse then.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return numba.njit(**options)(function)

    return decorate
