"""Where the rows of a batch go, where there are several engines."""

from __future__ import annotations

from typing import Protocol

from batchllm.request import Request
from batchllm.tokens import Int64Array


class Placement(Protocol):
    """Is told what the rows of a batch ask, and which engine is given which of them."""

    def add(self, place: int, request: Request) -> None:
        """The next row of the input is at this place."""

    def give(self, places: Int64Array, engine: int) -> None:
        """An engine is given the rows at these places."""
