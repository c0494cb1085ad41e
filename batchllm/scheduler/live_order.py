"""In which order do live requests start? A plan over all that wait, kept up to date as they come and go.

A prefix tree of the waiting prompts. The walk goes on where the last one that started was: its nearest relatives first,
then their neighbours; of several groups one whose prefix is cached first, then the one that more wait for, then the
older one. A request that would compute what another of the same step computes is held back to the next step.

Knows: tokens, namespaces, counts. Must not know: KV slots, clocks, what a request is; the caller says how much of a
prompt is cached. The same calls give the same order on every rank.

INVARIANT: whoever has been passed over by 64 and twice as many as waited at once since the oldest one came goes
first. An arrival or departure costs time in its tokens and the depth of the tree, a choice in what it chooses; neither
in how many wait.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar, cast

import numpy as np

from batchllm.tokens import page_floor

Request = TypeVar("Request", bound=Hashable)

MIN_SHARED_LEN = 32
"""Tokens that are worth waiting a step for, or changing the order for."""
_MAX_PASSED_OVER = 64


class _Node:
    """Tokens ``source[parent.end_len:end_len]`` below its parent, and how many requests wait under it."""

    __slots__ = (
        "children",
        "end_len",
        "heap",
        "key",
        "num_cached",
        "num_waiting",
        "parent",
        "requests",
        "seq",
        "source",
    )

    def __init__(self, parent: _Node | None, key: tuple[Hashable, int], source: array[int], end_len: int, seq: int):
        self.parent = parent
        self.key = key  # in the parent's children: namespace and first token
        self.source = source
        self.end_len = end_len
        self.seq = seq
        self.num_waiting = 0
        self.num_cached = 0  # tokens from the start of the prompt that were cached when last looked at
        self.requests: dict[Hashable, None] = {}  # whose prompts end here
        self.children: dict[tuple[Hashable, int], _Node] = {}
        # (rank, number, child); an entry that is no longer true of its child is dropped when it comes up.
        self.heap: list[tuple[tuple[bool, int, int], int, _Node]] = []

    def rank(self) -> tuple[bool, int, int]:
        """Among its siblings; smaller goes first."""
        assert self.parent is not None
        start = self.parent.end_len
        is_cached = min(self.num_cached, self.end_len) - start >= min(MIN_SHARED_LEN, self.end_len - start) > 0
        return (not is_cached, -self.num_waiting, self.seq)

    def path(self) -> list[_Node]:
        """From the root to this node."""
        node: _Node | None = self
        path = []
        while node is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        return path


@dataclass(slots=True)
class _Entry:
    node: _Node
    prompt_len: int
    seq: int
    num_started_before: int


@dataclass(slots=True)
class _Walk(Generic[Request]):
    """One choice of requests: where it is, and where it must not come again."""

    path: list[_Node]
    chosen: dict[Request, None] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    popped: dict[int, _Node] = field(default_factory=dict)
    requests: dict[int, Iterator[Hashable]] = field(default_factory=dict)

    def is_held(self, path: list[_Node]) -> bool:
        return any(id(node) in self.done for node in path)


class LiveOrder(Generic[Request]):
    """The live requests that wait.

    Args:
        page_size: KV is shared in pages of this many tokens.

    Attributes:
        num_tokens: Prompt tokens of all that wait.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._root = _Node(None, (None, 0), array("q"), 0, 0)
        self._entries: dict[Request, _Entry] = {}  # oldest first
        self._last = self._root  # where the last one that started was
        self._numbers = count(1)
        self._num_started = 0
        # (number of an arrival, how many waited then), of each the next larger one dropped.
        self._peaks: deque[tuple[int, int]] = deque()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: Request) -> bool:
        return request in self._entries

    def __iter__(self) -> Iterator[Request]:
        """Oldest first."""
        return iter(self._entries)

    def add(self, request: Request, tokens: array[int], namespace: Hashable, num_cached: int) -> None:
        """A request waits from now on.

        Args:
            request: Not here yet.
            tokens: Its prompt, of type "q"; not changed while it waits. Empty for one that shares with nobody.
            namespace: Prompts of different namespaces share nothing.
            num_cached: Tokens of it that are cached now.
        """
        seq = next(self._numbers)
        node = self._descend(tokens, namespace, seq) if tokens else self._alone(seq)
        node.requests[request] = None
        self._entries[request] = _Entry(node, len(tokens), seq, self._num_started)
        self.num_tokens += len(tokens)
        self._change(node, 1)
        self._note_cached(node, num_cached)
        while self._peaks and self._peaks[-1][1] <= len(self._entries):
            self._peaks.pop()
        self._peaks.append((seq, len(self._entries)))

    def remove(self, request: Request, *, has_started: bool) -> None:
        """A request waits no more; if it has started, its prompt is cached now, or will be in the coming step."""
        entry = self._entries.pop(request)
        node = entry.node
        del node.requests[request]
        self.num_tokens -= entry.prompt_len
        if has_started:
            self._num_started += 1
            self._last = node
            self._note_cached(node, entry.prompt_len)
        self._change(node, -1)
        while self._last.num_waiting == 0 and self._last.parent is not None:
            self._last = self._last.parent
        if not self._entries:
            self._peaks.clear()

    def choose(
        self,
        cached_len: Callable[[Request], int],
        *,
        max_requests: int,
        max_tokens: int,
        max_ahead_tokens: int,
        beside: tuple[array[int], Hashable, int] | None = None,
    ) -> list[Request]:
        """Requests to start in the coming step, in order.

        Args:
            cached_len: How much of a request's prompt is cached.
            max_requests: No more requests than these.
            max_tokens: No more, once these have so many tokens to compute.
            max_ahead_tokens: No more, once these compute so many tokens that others are held back for: those come
                first then.
            beside: Tokens, namespace and cached length of a prompt in pieces that the step goes on with.

        Returns:
            None of them computes `MIN_SHARED_LEN` tokens or more that another computes, or any that ``beside`` does.
        """
        walk: _Walk[Request] = _Walk(self._last.path())
        if beside is not None:
            self._hold_beside(walk, *beside)
        overdue = self._overdue()
        num_tokens = num_ahead = 0
        while len(walk.chosen) < max_requests and num_tokens < max_tokens and num_ahead < max_ahead_tokens:
            request = next(overdue, None)
            if request is not None:
                path = self._entries[request].node.path()
                if walk.is_held(path):
                    continue
                walk.path = path
            else:
                request = self._next(walk)
                if request is None:
                    break
            num_cached = cached_len(request)
            num_tokens += self._entries[request].prompt_len - num_cached
            self._note_cached(walk.path[-1], num_cached)
            walk.chosen[request] = None
            num_ahead += self._hold(walk, num_cached)
        for node in walk.popped.values():
            self._push(node)
        return list(walk.chosen)

    def group_ends(self, request: Request) -> list[tuple[int, int]]:
        """The groups that a waiting request is in, outermost first: where each ends, and how many wait in it."""
        return [(node.end_len, node.num_waiting) for node in self._entries[request].node.path()[1:]]

    # The tree

    def _alone(self, seq: int) -> _Node:
        node = self._root.children[self, seq] = _Node(self._root, (self, seq), array("q"), 0, seq)
        return node

    def _descend(self, tokens: array[int], namespace: Hashable, seq: int) -> _Node:
        """The node at which a prompt ends; made where there is none."""
        node = self._root
        while node.end_len < len(tokens) or node is self._root:
            key = (namespace, tokens[node.end_len])
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(node, key, tokens, len(tokens), seq)
                return child
            end_len = _common_len(child.source, tokens, node.end_len, min(child.end_len, len(tokens)))
            node = child if end_len == child.end_len else self._split(child, end_len)
        return node

    def _split(self, child: _Node, end_len: int) -> _Node:
        parent = child.parent
        assert parent is not None
        middle = _Node(parent, child.key, child.source, end_len, child.seq)
        middle.num_waiting, middle.num_cached = child.num_waiting, child.num_cached
        parent.children[child.key] = middle
        child.key = (child.key[0], child.source[end_len])
        middle.children[child.key] = child
        child.parent = middle
        self._push(middle)
        self._push(child)
        return middle

    def _change(self, node: _Node, num: int) -> None:
        """So many more wait at ``node``."""
        while node.parent is not None:
            node.num_waiting += num
            if node.num_waiting:
                self._push(node)
            else:
                del node.parent.children[node.key]
            node = node.parent
        node.num_waiting += num

    def _note_cached(self, node: _Node, num_cached: int) -> None:
        """So much of the path to ``node`` is cached."""
        while node.parent is not None:
            before = node.rank()
            node.num_cached = min(num_cached, node.end_len)
            if node.rank() != before:
                self._push(node)
            node = node.parent

    def _push(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None
        heap = parent.heap
        heappush(heap, (node.rank(), next(self._numbers), node))
        if len(heap) > 4 * len(parent.children) + 16:
            heap[:] = [(child.rank(), next(self._numbers), child) for child in parent.children.values()]
            heapify(heap)

    # The walk

    def _overdue(self) -> Iterator[Request]:
        """Those that have been passed over too often, oldest first."""
        max_passed_over = None
        for request, entry in self._entries.items():
            if max_passed_over is None:
                while self._peaks[0][0] < entry.seq:
                    self._peaks.popleft()
                max_passed_over = _MAX_PASSED_OVER + 2 * self._peaks[0][1]
            if self._num_started - entry.num_started_before < max_passed_over:
                return
            yield request

    def _next(self, walk: _Walk[Request]) -> Request | None:
        while walk.path:
            node = walk.path[-1]
            # A node does not know what kind of requests its tree is of.
            requests = cast(Iterator[Request], walk.requests.setdefault(id(node), iter(node.requests)))
            for request in requests:
                if request not in walk.chosen:
                    return request
            child = self._pop_child(walk, node)
            if child is not None:
                walk.path.append(child)
            else:
                walk.done.add(id(node))
                walk.path.pop()
        return None

    def _pop_child(self, walk: _Walk[Request], node: _Node) -> _Node | None:
        while node.heap:
            rank, _, child = heappop(node.heap)
            if child.parent is node and child.num_waiting and rank == child.rank():
                walk.popped[id(child)] = child
                if id(child) not in walk.done:
                    return child
        return None

    def _hold(self, walk: _Walk[Request], num_cached: int) -> int:
        """Hold back whoever shares more with the request at the end of the path than is cached.

        Returns:
            How much more that is, 0 where nobody is held back.
        """
        for depth, node in enumerate(walk.path):
            if self._is_more(node.end_len, num_cached):
                walk.done.add(id(node))
                del walk.path[depth:]
                return node.end_len - num_cached if node.num_waiting > 1 else 0
        return 0

    def _hold_beside(self, walk: _Walk[Request], tokens: array[int], namespace: Hashable, num_cached: int) -> None:
        node = self._root
        while node.end_len < len(tokens):
            child = node.children.get((namespace, tokens[node.end_len]))
            if child is None:
                return
            end_len = _common_len(child.source, tokens, node.end_len, min(child.end_len, len(tokens)))
            if page_floor(end_len, self._page_size) > num_cached:
                walk.done.add(id(child))
                walk.path = walk.path[: walk.path.index(child)] if child in walk.path else walk.path
                return
            if end_len < child.end_len:
                return
            node = child

    def _is_more(self, shared_len: int, num_cached: int) -> bool:
        return page_floor(shared_len, self._page_size) >= num_cached + MIN_SHARED_LEN


def _common_len(a: array[int], b: array[int], start: int, stop: int) -> int:
    """The first position in ``[start, stop)`` at which they differ, or ``stop``."""
    differs = np.frombuffer(a, np.int64)[start:stop] != np.frombuffer(b, np.int64)[start:stop]
    return start + int(differs.argmax()) if differs.any() else stop
