"""Planned requests that wait to start, in plan order."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter
from typing import Generic, TypeVar, overload

from batchllm.scheduler.view import WaitingRequest

Request = TypeVar("Request", bound=WaitingRequest)


class RequestWindow(Sequence[Request], Generic[Request]):
    """A sorted list whose front is taken often and whose length costs nothing."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        return self._requests[index]

    def add(self, request: Request) -> None:
        """Put it in its place: as good as always the last, for a retracted one the front."""
        if not self._requests or self._requests[-1].plan_order < request.plan_order:
            self._requests.append(request)
        else:
            insort(self._requests, request, key=attrgetter("plan_order"))

    def remove(self, requests: Collection[Request]) -> None:
        """Take these out. Looks no further than the last of them."""
        left = {id(request) for request in requests}
        kept: list[Request] = []
        for index, request in enumerate(self._requests):
            if id(request) in left:
                left.remove(id(request))
            else:
                kept.append(request)
            if not left:
                self._requests[: index + 1] = kept
                return
        self._requests = kept
