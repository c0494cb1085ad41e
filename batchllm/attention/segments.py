"""The numba kernels of `plan_layout`: from each sequence's deepest cached prefix to the fields of a layout.

Knows: ids of prefixes, their parents and ends. Must not know: where ids come from, slots of KV.
Invariant: a step costs time linear in its sequences and in the prefixes above them, each climbed over at most twice.
"""

from __future__ import annotations

import numpy as np

from batchllm.compiled import njit
from batchllm.tokens import Int32Array


@njit()
def deepest_cached(
    parent: Int32Array, end: Int32Array, leaf: Int32Array, kv_len: Int32Array, qo_len: Int32Array, node: Int32Array
) -> int:
    """Fill ``node``: of each sequence the deepest prefix in the cache, or -1. Returns a wrong sequence, or -1."""
    for s in range(len(leaf)):
        u = leaf[s]
        num_cached = kv_len[s] - qo_len[s]
        if u < -1 or u >= len(end) or (u >= 0 and end[u] == 0) or qo_len[s] < 0 or num_cached < 0:
            return s
        while u >= 0 and end[u] > num_cached:
            u = parent[u]
        node[s] = u
    return -1


@njit()
def _number_nodes(
    node: Int32Array, parent: Int32Array, end: Int32Array, number: Int32Array
) -> tuple[Int32Array, Int32Array, Int32Array]:
    """The tree of the prefixes that are read in this step, parents before children; node 0 stands above all roots.

    Returns:
        The tree's node of each sequence, and parent and end of each node.
    """
    tree_node = np.zeros(len(node), np.int32)
    ids = np.empty(len(parent) + 1, np.int32)
    above = np.empty(len(parent) + 1, np.int32)
    num_nodes = 1
    above[0] = 0
    for s in range(len(node)):
        top, num_new = node[s], 0
        while top >= 0 and number[top] < 0:
            top = parent[top]
            num_new += 1
        # A second climb: only now is it known how many there are, and the outermost is to come first.
        u = node[s]
        for k in range(num_nodes + num_new - 1, num_nodes - 1, -1):
            number[u], ids[k], above[k] = k, u, k - 1
            u = parent[u]
        if num_new > 0:
            above[num_nodes] = number[top] if top >= 0 else 0
            num_nodes += num_new
        if node[s] >= 0:
            tree_node[s] = number[node[s]]
    ends = np.zeros(num_nodes, np.int32)
    for k in range(1, num_nodes):
        ends[k] = end[ids[k]]
        number[ids[k]] = -1
    return tree_node, above[:num_nodes], ends


@njit()
def _choose_segments(
    above: Int32Array, end: Int32Array, num_readers: Int32Array, min_segment_len: int, max_nested: int
) -> tuple[Int32Array, Int32Array]:
    """From where on the readers of each node are in no segment around it, and in none up to its own end.

    A node is a segment where the two differ.
    """
    num_nodes = len(above)
    # A node all whose readers read the same child has no end of its own.
    is_run_end = np.ones(num_nodes, np.bool_)
    for k in range(1, num_nodes):
        if num_readers[k] == num_readers[above[k]]:
            is_run_end[above[k]] = False
    start, covered = np.zeros(num_nodes, np.int32), np.zeros(num_nodes, np.int32)
    depth = np.zeros(num_nodes, np.int32)
    min_len = np.int64(min_segment_len)
    while True:
        is_too_deep = False
        for k in range(1, num_nodes):
            start[k] = covered[above[k]]
            is_segment = is_run_end[k] and num_readers[k] >= 2 and end[k] - start[k] >= min_len
            covered[k] = end[k] if is_segment else start[k]
            depth[k] = depth[above[k]] + is_segment
            is_too_deep |= depth[k] > max_nested
        if not is_too_deep:
            return start, covered
        min_len *= 2


@njit()
def plan_segments(
    table_rows: Int32Array,
    qo_len: Int32Array,
    kv_len: Int32Array,
    node: Int32Array,
    parent: Int32Array,
    end: Int32Array,
    number: Int32Array,
    min_segment_len: int,
    max_nested: int,
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, Int32Array, Int32Array, Int32Array, Int32Array]:
    """The fields of the layout, in their order."""
    num_sequences = len(node)
    tree_node, above, ends = _number_nodes(node, parent, end, number)
    num_nodes = len(above)

    num_readers = np.zeros(num_nodes, np.int32)
    for s in range(num_sequences):
        num_readers[tree_node[s]] += 1
    # Where the next sequence of a node goes in `order`: behind those that end at the node come those of its children.
    cursor = num_readers.copy()
    for k in range(num_nodes - 1, 0, -1):
        num_readers[above[k]] += num_readers[k]
    first = np.zeros(num_nodes, np.int32)
    for k in range(1, num_nodes):
        first[k] = cursor[above[k]]
        cursor[above[k]] += num_readers[k]
        cursor[k] += first[k]
    start, covered = _choose_segments(above, ends, num_readers, min_segment_len, max_nested)

    qo_indptr = np.zeros(num_sequences + 1, np.int32)
    private_start = np.empty(num_sequences, np.int32)
    order = np.empty(num_sequences, np.int32)
    cursor = first.copy()
    for s in range(num_sequences):
        qo_indptr[s + 1] = qo_indptr[s] + qo_len[s]
        private_start[s] = covered[tree_node[s]]
        order[cursor[tree_node[s]]] = s
        cursor[tree_node[s]] += 1

    segments = np.flatnonzero(covered > start)
    readers, span = np.empty((len(segments), 2), np.int32), np.empty((len(segments), 2), np.int32)
    segment_row = np.empty(len(segments), np.int32)
    for g, k in enumerate(segments):
        readers[g, 0], readers[g, 1] = first[k], first[k] + num_readers[k]
        span[g, 0], span[g, 1] = start[k], covered[k]
        segment_row[g] = table_rows[order[first[k]]]
    return table_rows, qo_indptr, kv_len, order, private_start, readers, span, segment_row
