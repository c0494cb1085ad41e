"""An LRU prefix cache in counts: which part of each planned prefix, and of each request's own tokens, is there.

Knows: the tree of a plan, slots, order of use. Must not know: tokens, requests' lengths, schedulers.
Invariant: locked + evictable + free slots are the pool; what is evicted has no user, and no resident child.
"""

from __future__ import annotations

from heapq import heappop, heappush

from batchllm.planner import BatchPlan
from batchllm.tokens import page_ceil, page_floor


class LruTree:
    """Nodes are the plan's prefixes, ``0 .. m - 1``, and for each row a leaf of its own, ``m + row``.

    A node holds its first ``have[node]`` slots. A user of a node also uses its ancestors, so whatever was used last
    has parents used at least as late: evicting by last use, deepest first, never takes a parent before its child.

    Args:
        plan: The tree; slots are whole pages of it.
        kv_capacity_tokens: Slots of the KV pool.
        evicts_whole_nodes: Whether a node goes as a whole, or page by page from its end.
    """

    def __init__(self, plan: BatchPlan, kv_capacity_tokens: int, *, evicts_whole_nodes: bool) -> None:
        self.page_size = plan.page_size
        self._num_prefixes = plan.num_prefixes
        self._evicts_whole_nodes = evicts_whole_nodes
        self._parent = plan.parent.tolist()
        self._len = (plan.end_len - plan.start_len).tolist()
        self._prefix_of_row = [-1] * plan.num_requests
        for row, prefix_id in zip(plan.order.tolist(), plan.request_prefix.tolist(), strict=True):
            self._prefix_of_row[row] = prefix_id
        num_nodes = plan.num_prefixes + plan.num_requests
        self._have = [0] * num_nodes
        self._users = [0] * num_nodes
        self._num_uses = [0] * num_nodes
        self._heap: list[tuple[int, int, int, int]] = []
        self._clock = 0
        self.num_free = page_floor(kv_capacity_tokens, self.page_size)
        self.num_evictable = 0
        self.num_locked_private = 0
        self.num_locked_shared = 0

    @property
    def num_available(self) -> int:
        """Slots that can be had at once."""
        return self.num_free + self.num_evictable

    def path(self, row: int) -> list[int]:
        """Prefixes of a row, outermost first."""
        path = []
        node = self._prefix_of_row[row]
        while node >= 0:
            path.append(node)
            node = self._parent[node]
        path.reverse()
        return path

    def leaf(self, row: int) -> int:
        """The row's own node."""
        return self._num_prefixes + row

    def have(self, node: int) -> int:
        """Slots of a node that are there."""
        return self._have[node]

    def missing(self, node: int) -> int:
        """Slots of a prefix that are not there."""
        return int(self._len[node] - self._have[node])

    def cached_len(self, row: int, prefill_len: int, not_yet: frozenset[int] | set[int] = frozenset()) -> int:
        """Tokens of a row's start that are there, in whole pages and never the last one.

        Args:
            row: The row.
            prefill_len: Tokens that it needs.
            not_yet: Nodes whose KV is not computed yet.
        """
        total = 0
        for node in self.path(row):
            if node in not_yet:
                break
            total += self._have[node]
            if self._have[node] < self._len[node]:
                break
        else:
            total += self._have[self.leaf(row)]
        return page_floor(min(total, prefill_len - 1), self.page_size)

    def lock(self, row: int) -> None:
        """The row uses its path: nothing of it is evicted."""
        for node in [*self.path(row), self.leaf(row)]:
            self._num_uses[node] += 1
            self._users[node] += 1
            if self._users[node] == 1:
                self.num_evictable -= self._have[node]
                self._count_locked(node, self._have[node])

    def unlock(self, row: int) -> None:
        """The row has done with its path."""
        self._clock += 1
        for depth, node in enumerate([*self.path(row), self.leaf(row)]):
            self._users[node] -= 1
            if self._users[node] == 0:
                self.num_evictable += self._have[node]
                self._count_locked(node, -self._have[node])
                if self._have[node]:
                    heappush(self._heap, (self._clock, -depth, node, self._num_uses[node]))

    def grow(self, node: int, num_slots: int) -> None:
        """A node in use gets slots; at most ``num_available``."""
        self.take(num_slots)
        self._have[node] += num_slots
        self._count_locked(node, num_slots)

    def shrink(self, node: int, num_slots: int) -> None:
        """A node in use gives slots back at once."""
        self._have[node] -= num_slots
        self._count_locked(node, -num_slots)
        self.num_free += num_slots

    def take(self, num_slots: int) -> None:
        """Take slots out of the pool, evicting what was used least recently if need be."""
        while self.num_free < num_slots:
            entry = heappop(self._heap)
            node = entry[2]
            if self._users[node] or entry[3] != self._num_uses[node]:
                continue  # used again since
            evicted = self._have[node]
            if not self._evicts_whole_nodes:
                evicted = min(evicted, page_ceil(num_slots - self.num_free, self.page_size))
            self._have[node] -= evicted
            self.num_evictable -= evicted
            self.num_free += evicted
            if self._have[node]:
                heappush(self._heap, entry)
        self.num_free -= num_slots

    def _count_locked(self, node: int, num_slots: int) -> None:
        if node < self._num_prefixes:
            self.num_locked_shared += num_slots
        else:
            self.num_locked_private += num_slots
