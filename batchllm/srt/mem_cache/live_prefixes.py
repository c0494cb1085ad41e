"""What of the radix tree live requests need: those that wait for it, and those that have read it. Runs in the
scheduler's process.

Marks nodes of the tree; nothing is locked by a mark, so nothing can be in anybody's way. Knows tokens and nodes. Must
not know the queue, or why a request waits.

INVARIANT: marks are hints. What is evicted loses them, what is split passes them on, and a wrong one costs at most a
prefix computed again.
"""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.evict_policy import EvictionStrategy
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from batchllm.tokens import page_floor

_KEPT_POOLS = 2
"""What was read again stays ahead of what was not, until so many times the pool has been computed since."""


class LivePrefixes(EvictionStrategy):
    """Which part of the tree waiting requests will read, and in which order to evict: that part last.

    Before it goes what has been read since it was computed, and first, by least recent use, what nobody has.

    Args:
        tree: The cache; `batchllm.srt.mem_cache.radix_cache.PlannedRadixCache` passes marks on.
        pool_tokens: Slots of the KV pool.
    """

    def __init__(self, tree: RadixCache, pool_tokens: int) -> None:
        self._tree = tree
        self._kept_tokens = _KEPT_POOLS * pool_tokens
        self._num_computed = 0

    def get_priority(self, node: TreeNode) -> tuple[bool, bool, float]:
        read_at = getattr(node, "read_at", None)
        is_read = read_at is not None and self._num_computed - read_at < self._kept_tokens
        return (getattr(node, "num_waiting", 0) > 0, is_read, node.last_access_time)

    def cached_len(self, tokens: array[int], extra_key: str | None) -> int:
        """Tokens of a prompt that the tree holds, all but the last at most. Leaves the tree as it is."""
        end_len, last = 0, max(len(tokens) - 1, 0)
        for node, num_matched in self._walk(tokens, extra_key):
            end_len += num_matched
            if num_matched < len(node.key):
                break
        page_size = self._tree.page_size
        return min(end_len, page_floor(last, page_size))

    def want(self, tokens: array[int], extra_key: str | None) -> int:
        """A request that waits will read what there is of this prompt.

        Returns:
            Tokens that there are.
        """
        node, num_cached = self._match(tokens, extra_key, len(tokens) - 1)
        while node is not self._tree.root_node:
            node.num_waiting = getattr(node, "num_waiting", 0) + 1
            node = node.parent
        return num_cached

    def unwant(self, tokens: array[int], extra_key: str | None) -> None:
        """It waits no more."""
        for node, num_matched in self._walk(tokens, extra_key):
            if num_matched == len(node.key):
                node.num_waiting = max(getattr(node, "num_waiting", 0) - 1, 0)

    def want_computed(self, tokens: array[int], extra_key: str | None, num_waiting: int) -> None:
        """The tree has new tokens that end with these, and so many wait for them."""
        node, _ = self._match(tokens, extra_key, len(tokens))
        node.num_waiting = num_waiting

    def read(self, node: TreeNode, num_computed: int) -> None:
        """A request that has started reads the path to ``node``, and computes so many tokens of its own."""
        self._num_computed += num_computed
        while node is not self._tree.root_node:
            node.read_at = self._num_computed
            node = node.parent

    def _match(self, tokens: array[int], extra_key: str | None, limit: int) -> tuple[TreeNode, int]:
        found: Any = RadixCache.match_prefix(
            self._tree, MatchPrefixParams(key=RadixKey(tokens[: max(limit, 0)], extra_key))
        )
        return found.last_device_node, len(found.device_indices)

    def _walk(self, tokens: array[int], extra_key: str | None) -> Any:
        """(node, how much of it matches) along a prompt."""
        node, start, page_size = self._tree.root_node, 0, self._tree.page_size
        while len(tokens) - start >= page_size:
            key = RadixKey(tokens[start : start + page_size], extra_key).child_key(page_size)
            node = node.children.get(key)
            if node is None:
                return
            num_matched = node.key.match(RadixKey(tokens[start : start + len(node.key)], extra_key), page_size)
            yield node, num_matched
            if num_matched < len(node.key):
                return
            start += num_matched
