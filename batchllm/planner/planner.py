"""From prompts to plan: the pipeline of this room.

Knows: the steps and their order. Must not know: how each works, or what happens at run time.
Invariant: the same prompts and the same arguments give the same plan, byte for byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from batchllm.errors import WorkloadError
from batchllm.planner.group_order import GroupOrder, order_groups
from batchllm.planner.plan import BatchPlan, deepest_prefix
from batchllm.planner.prefix_tree import PrefixTree, build_prefix_tree
from batchllm.tokens import Int32Array, Int64Array, TokenTable


def plan_batch(
    table: TokenTable,
    *,
    page_size: int = 1,
    namespaces: Int64Array | None = None,
    partitions: Int64Array | None = None,
    decode_lens: npt.NDArray[np.integer] | None = None,
    group_order: GroupOrder = "lexicographic",
) -> BatchPlan:
    """Plan a whole job: order the prompts and name every prefix worth keeping. Validated.

    Linear in the tokens of the table, plus sorting the prompts' first differences. One core sorts until no bucket of
    prompts that agree so far is large (a common system prompt is passed over by it); the rest is sorted on all cores.

    Args:
        table: The prompts; none may be empty. No rows give an empty plan.
        page_size: Tokens of a KV page; only whole pages are shared.
        namespaces: int[num_prompts]; prompts of different namespaces never share.
        partitions: int[num_prompts]; prompts of one partition come together, the lowest number first. Prompts of
            different partitions must be of different namespaces. None: one for all.
        decode_lens: Tokens each row is expected to generate, at least 1, int[num_prompts]. None: 1
            each. They only matter to some group orders.
        group_order: Which of the groups that start at one prefix runs first. Does not change what is
            shared.

    Raises:
        WorkloadError: A prompt is empty (the message names its row), ``page_size`` is below 1,
            ``namespaces`` or ``decode_lens`` does not fit the table, a row is expected to generate
            nothing, or there is no such ``group_order``.
    """
    if page_size < 1:
        raise WorkloadError(f"page_size must be at least 1, not {page_size}")
    if decode_lens is None:
        decode_lens = np.ones(len(table), np.int64)
    prompt_lens = table.lengths.astype(np.int32)
    tree = order_groups(build_prefix_tree(table, namespaces), prompt_lens, decode_lens, group_order, partitions)
    plan = _whole_pages(tree, prompt_lens[tree.order], page_size)
    plan.validate(namespaces=namespaces)
    return plan


def _whole_pages(tree: PrefixTree, prompt_lens: Int32Array, page_size: int) -> BatchPlan:
    """Keep of every tree node the whole pages that its parent does not already have."""
    kept, parent, start_len, end_len = _floor_nodes(
        tree.parent, tree.depth, tree.first, tree.num_prompts, prompt_lens, page_size
    )
    first, num_consumers = tree.first[kept], tree.num_prompts[kept]
    reused = np.minimum(tree.lcp, prompt_lens - 1)
    num_prompt_tokens = int(prompt_lens.sum(dtype=np.int64))
    return BatchPlan(
        num_requests=len(tree.order),
        page_size=page_size,
        order=tree.order,
        prompt_lens=prompt_lens,
        request_prefix=deepest_prefix(parent, first, num_consumers, len(tree.order)),
        parent=parent,
        start_len=start_len,
        end_len=end_len,
        first=first,
        num_consumers=num_consumers,
        num_prompt_tokens=num_prompt_tokens,
        optimal_prefill_tokens=num_prompt_tokens - int((reused - reused % page_size).sum(dtype=np.int64)),
    )


@njit(cache=True, nogil=True)
def _floor_nodes(
    parent: Int32Array,
    depth: Int32Array,
    first: Int64Array,
    num_prompts: Int64Array,
    prompt_lens: Int32Array,
    page_size: int,
) -> tuple[Int64Array, Int32Array, Int32Array, Int32Array]:
    """Nodes that stay, and their new parents, starts and ends."""
    kept, kept_parent = np.empty(len(depth), np.int64), np.empty(len(depth), np.int32)
    start_len, end_len = np.empty(len(depth), np.int32), np.empty(len(depth), np.int32)
    # The kept node that a node's consumers have: itself, or its parent's if it was dropped.
    stand_in = np.empty(len(depth), np.int32)
    count = 0
    for v in range(len(depth)):
        above = stand_in[parent[v]] if parent[v] >= 0 else np.int32(-1)
        start = end_len[above] if above >= 0 else np.int32(0)
        # Prompts that end at a node come first in it, in every group order, so the last is longer
        # than the node if any is. If none is, all are duplicates, and nobody can read the last
        # token, which each must compute.
        longest = prompt_lens[first[v] + num_prompts[v] - 1]
        usable = depth[v] if longest > depth[v] else depth[v] - 1
        end = usable - usable % page_size
        stand_in[v] = above
        if end > start:
            kept[count], kept_parent[count] = v, above
            start_len[count], end_len[count] = start, end
            stand_in[v] = count
            count += 1
    return (
        kept[:count].copy(),
        kept_parent[:count].copy(),
        start_len[:count].copy(),
        end_len[:count].copy(),
    )
