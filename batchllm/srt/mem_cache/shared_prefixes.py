"""Which prefix each row of the request-to-token table reads from: what the attention of a step plans by. Runs in the
scheduler's process.

Of a planned request it is a prefix of the plan; of a live one the node of the radix tree that it was matched to when it
started. Nodes split: whoever was matched to the longer node before reads it by itself until it ends, nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.mem_cache.radix_cache import TreeNode

from batchllm.attention.layout import PrefixPaths
from batchllm.prefix_cache.pin_ledger import NO_PREFIX, PinLedger
from batchllm.scheduler.admission import reusable_len
from batchllm.srt.managers.schedule_batch import PlannedReq


class SharedPrefixes:
    """Kept by the scheduler as requests start and prefixes are released, read by the attention backend.

    Args:
        ledger: Knows each prefix's path.
        num_table_rows: Rows of the request-to-token table.
        page_size: Tokens of a page of the cache.

    Attributes:
        paths: Parents and ends of the prefixes that some row reads.
        leaf: [num_table_rows] int32: id in ``paths`` of the deepest prefix of the request in a row, or -1.
    """

    def __init__(self, ledger: PinLedger, num_table_rows: int, page_size: int) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._ids: dict[int, int] = {}
        self._node_ids: dict[TreeNode, int] = {}
        self.paths = PrefixPaths()
        self.leaf = np.full(num_table_rows, -1, np.int32)

    @classmethod
    def empty(cls) -> SharedPrefixes:
        """Where nothing is shared."""
        return cls(PinLedger(), num_table_rows=0, page_size=1)

    def leaf_of(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Ids in ``paths`` for these table rows."""
        return self.leaf[rows] if len(self.leaf) else np.full(len(rows), -1, np.int32)

    def start(self, reqs: list[Any]) -> None:
        """These requests hold their table rows now."""
        for req in reqs:
            is_planned = isinstance(req, PlannedReq)
            self.leaf[req.req_pool_idx] = self._id(req.prefix_id) if is_planned else self._node_id(req.matched_node)

    def remove_node(self, node: TreeNode) -> None:
        """This node is no longer in the tree; no request in a table row reads it any more."""
        path_id = self._node_ids.pop(node, None)
        if path_id is not None:
            self.paths.release(path_id)

    def remove_all_nodes(self) -> None:
        """The tree is empty."""
        for node in list(self._node_ids):
            self.remove_node(node)

    def drop_released(self) -> None:
        """Forget the prefixes that the ledger has released; no request in a table row reads them any more."""
        for prefix_id in [prefix_id for prefix_id in self._ids if prefix_id not in self._ledger]:
            path_id = self._ids.pop(prefix_id)
            if path_id >= 0:
                self.paths.release(path_id)

    def _node_id(self, node: TreeNode | None) -> int:
        """Id of the path to a node of the tree: -1 for its root, or where nothing was matched."""
        if node is None or node.parent is None:
            return -1
        if node not in self._node_ids:
            new = []
            while node.parent is not None and node not in self._node_ids:
                new.append(node)
                node = node.parent
            parent = self._node_ids.get(node, -1)
            end_len = _end_len(node)
            for node in reversed(new):
                end_len += len(node.key)
                parent = self._node_ids[node] = self.paths.add(parent, end_len)
        return self._node_ids[node]

    def _id(self, prefix_id: int) -> int:
        if prefix_id == NO_PREFIX:
            return -1
        if prefix_id not in self._ids:
            parent, start = -1, 0
            for ancestor in reversed(self._ledger.path(prefix_id)):
                # A prompt that ends with the prefix computes its last token, or page, in slots of its own.
                end_len = self._ledger.end_len(ancestor)
                end = reusable_len(end_len, end_len, self._page_size)
                if ancestor not in self._ids:
                    self._ids[ancestor] = self.paths.add(parent, end) if end > start else -1
                parent, start = self._ids[ancestor], end
        return self._ids[prefix_id]


def _end_len(node: TreeNode) -> int:
    """Tokens from the start of the prompt to the end of a node of the tree."""
    end_len = 0
    while node.parent is not None:
        end_len += len(node.key)
        node = node.parent
    return end_len
