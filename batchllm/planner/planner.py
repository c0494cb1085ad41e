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
from batchllm.planner.run import copy_runs
from batchllm.tokens import Int32Array, Int64Array, TokenTable


def plan_batch(
    table: TokenTable,
    *,
    page_size: int = 1,
    namespaces: Int64Array | None = None,
    partitions: Int64Array | None = None,
    decode_lens: npt.NDArray[np.integer] | None = None,
    group_order: GroupOrder = "lexicographic",
    share_lens: npt.NDArray[np.integer] | None = None,
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
        share_lens: Tokens at the start of each prompt that may be shared, int[num_prompts], 1 to all of them: of a
            prompt that is scored from token ``i``, ``max(i, 1)``. It computes the last of them itself, whose logits
            say how likely token ``i`` is, and all that is behind. None: all of every prompt.

    Raises:
        WorkloadError: A prompt is empty (the message names its row), ``page_size`` is below 1,
            ``namespaces``, ``decode_lens`` or ``share_lens`` does not fit the table, a row is expected to generate
            nothing, or there is no such ``group_order``.
    """
    if page_size < 1:
        raise WorkloadError(f"page_size must be at least 1, not {page_size}")
    if decode_lens is None:
        decode_lens = np.ones(len(table), np.int64)
    prompt_lens = table.lengths.astype(np.int32)
    # What is shared is planned as if prompts ended where sharing does.
    shared, sharing_lens = table, prompt_lens
    if share_lens is not None:
        _check_share_lens(share_lens, prompt_lens)
        sharing_lens = share_lens.astype(np.int32, copy=False)
        shared = _beginnings(table, sharing_lens)
    tree = order_groups(build_prefix_tree(shared, namespaces), sharing_lens, decode_lens, group_order, partitions)
    limits = None if share_lens is None else sharing_lens[tree.order]
    plan = _whole_pages(tree, prompt_lens[tree.order], limits, page_size)
    plan.validate(namespaces=namespaces)
    return plan


def _beginnings(table: TokenTable, lengths: Int32Array) -> TokenTable:
    """The first ``lengths[i]`` tokens of each row i, a copy."""
    offsets = np.zeros(len(table) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.empty(offsets[-1], np.int32)
    starts = table.offsets[:-1]
    copy_runs(table.tokens, starts, starts + lengths, tokens, offsets[:-1])
    return TokenTable(tokens=tokens, offsets=offsets)


def _check_share_lens(share_lens: npt.NDArray[np.integer], prompt_lens: Int32Array) -> None:
    if share_lens.shape != prompt_lens.shape or not np.issubdtype(share_lens.dtype, np.integer):
        raise WorkloadError(
            f"share_lens must be {len(prompt_lens)} integers, not {share_lens.dtype} of shape {share_lens.shape}"
        )
    wrong = np.flatnonzero((share_lens < 1) | (share_lens > prompt_lens))
    if len(wrong):
        row = wrong[0]
        raise WorkloadError(
            f"row {row} has a share_len of {share_lens[row]}; it must be from 1 to its {prompt_lens[row]} tokens"
        )


def _whole_pages(tree: PrefixTree, prompt_lens: Int32Array, share_lens: Int32Array | None, page_size: int) -> BatchPlan:
    """Keep of every tree node the whole pages that its parent does not already have.

    Args:
        tree: Of the shareable part of the prompts.
        prompt_lens: Tokens of the whole prompt at each position.
        share_lens: Those of its shareable part; None where that is all of every prompt.
        page_size: Tokens of a page.
    """
    sharing_lens = prompt_lens if share_lens is None else share_lens
    kept, parent, start_len, end_len = _floor_nodes(
        tree.parent, tree.depth, tree.first, tree.num_prompts, sharing_lens, page_size
    )
    first, num_consumers = tree.first[kept], tree.num_prompts[kept]
    reused = np.minimum(tree.lcp, sharing_lens - 1)
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
        share_lens=share_lens,
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
