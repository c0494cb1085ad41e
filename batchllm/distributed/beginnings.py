"""What requests begin with, as the router of live requests knows it: bodies that come by HTTP, and rows of batches.

Knows which fields of a request are computed, and in which order. Must not know engines, plans or HTTP.

INVARIANT: a row for which there are bytes has those of the live request that asks the same. Memory is that of
`_MAX_PIECES`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from typing import Any

import orjson

from batchllm.distributed.live_router import LiveRouter, pieces_of
from batchllm.request import Request
from batchllm.tokens import Int64Array

_FIELDS = ("lora_path", "tools", "system", "messages", "prompt", "text", "input_ids", "query", "input", "items")
"""Fields of bodies that say what is computed, in the order in which a prompt has them."""
_MAX_PIECES = 250_000
_MAX_PIECES_OF_A_ROW = 64
"""Rows that have so much in common have all they need to be found by."""


def of_body(body: bytes) -> bytes:
    """What of a request's body is computed; empty where the body has nothing of it."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:  # the engine says what is wrong with it
        return b""
    return _of_fields(fields) if isinstance(fields, dict) else b""


def of_request(request: Request) -> bytes:
    """The same of a row; empty for those that no live request is like: of several prompts, of rankings."""
    prompt = list(request.input_ids) if request.input_ids is not None else request.prompt
    fields = {
        "model": request.model,
        "tools": None if request.chat is None else request.chat.fields.get("tools"),
        "messages": request.messages,
        "prompt": prompt,
    }
    return _of_fields({name: value for name, value in fields.items() if value is not None})


def _of_fields(fields: Mapping[str, Any]) -> bytes:
    model = fields.get("model")
    adapter = model.partition(":")[2] if isinstance(model, str) else ""
    try:
        parts = [orjson.dumps(fields[name], option=orjson.OPT_SORT_KEYS) for name in _FIELDS if name in fields]
    except orjson.JSONEncodeError:  # nested deeper than orjson writes
        return b""
    return b"\n".join([adapter.encode(errors="replace"), *parts]) if parts else b""


class BatchBeginnings:
    """Finds, while the rows of a batch are read, which beginnings several rows have. When an engine is given the first
    row with such a beginning, the router is told. One thread reads rows, another one gives them to engines.

    Args:
        router: Learns which engine has which beginning.
    """

    def __init__(self, router: LiveRouter) -> None:
        self._router = router
        self._first_with: OrderedDict[int, int] = OrderedDict()  # piece -> place of the first row that has it
        self._num_kept = 0
        self._shared: dict[int, list[int]] = {}  # place of a row -> those of its pieces that a later row has too

    def add(self, place: int, request: Request) -> None:
        """The next row of the input.

        Args:
            place: Where in the input it is, from 0.
            request: What it asks.
        """
        pieces = list(islice(pieces_of(of_request(request)), _MAX_PIECES_OF_A_ROW))
        for i, piece in enumerate(pieces):
            first = self._first_with.get(piece)
            if first is None:
                self._first_with.update(dict.fromkeys(pieces[i:], place))
                break
            known = len(self._shared.get(first, ()))
            if i >= known and self._num_kept <= _MAX_PIECES:
                self._num_kept += i + 1 - known
                self._shared[first] = pieces[: i + 1]
        while len(self._first_with) > _MAX_PIECES:  # a later row counts as the first with it
            self._first_with.popitem(last=False)

    def give(self, places: Int64Array, engine: int) -> None:
        """An engine is given the rows at these places of the input."""
        if not self._shared:
            return
        for place in places.tolist():
            if (pieces := self._shared.get(place)) is not None:
                self._router.learn(pieces, engine)
