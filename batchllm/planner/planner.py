"""From prompts to a plan, and from a plan to the runs that travel to the scheduler.

Knows: the steps of planning and their order. Must not know: how each works, or what happens at run time.
Invariant: the same prompts and the same arguments give the same plan, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import WorkloadError
from batchllm.planner.group_order import GroupOrder, order_groups
from batchllm.planner.plan import BatchPlan, deepest_prefix
from batchllm.planner.prefix_tree import PrefixTree, build_prefix_tree
from batchllm.tokens import Int32Array, Int64Array, TokenTable, check_integers, gather_runs, starts_of


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
        beginnings = gather_runs(table.tokens, table.offsets[:-1], sharing_lens)
        shared = TokenTable(tokens=beginnings, offsets=starts_of(sharing_lens))
    tree = order_groups(build_prefix_tree(shared, namespaces), sharing_lens, decode_lens, group_order, partitions)
    limits = None if share_lens is None else sharing_lens[tree.order]
    plan = _whole_pages(tree, prompt_lens[tree.order], limits, page_size)
    plan.validate(namespaces=namespaces)
    return plan


def _check_share_lens(share_lens: npt.NDArray[np.integer], prompt_lens: Int32Array) -> None:
    check_integers("share_lens", share_lens, len(prompt_lens))
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


@njit(nogil=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """Requests ``[first_position, first_position + len(self))`` of a plan, and the prefixes first consumed
    there: shared prefixes once, private suffixes. Arrays only, so that thousands of requests pickle as a few buffers.

    Attributes:
        first_position: Plan position of the first request.
        first_prefix: Plan number of the first prefix; numbers are consecutive.
        prefix_parent: Plan number of each prefix's parent, -1 without one. Shape ``[num_prefixes]``.
        prefix_start_len: Tokens before each prefix. Shape ``[num_prefixes]``.
        prefix_end_len: Tokens up to each prefix's end. Shape ``[num_prefixes]``.
        prefix_num_consumers: Requests of the whole plan that read it. Shape ``[num_prefixes]``.
        prefix_longest_consumer_len: Most KV slots one of them occupies. Shape ``[num_prefixes]``.
        prefix_end_position: Plan position right behind the last of them. Shape ``[num_prefixes]``.
        prefix_tokens: Tokens ``[start_len, end_len)`` of each prefix, one after the other.
        request_prefix: Deepest prefix of each request, -1 without one. Shape ``[num_requests]``.
        request_max_new_len: Most tokens each may generate. Shape ``[num_requests]``.
        request_known_len: Tokens each will generate, 0 where that is not known. Shape ``[num_requests]``.
        request_task: Number of the task that each names, -1 for none. Shape ``[num_requests]``.
        request_share_len: Tokens at the start of each that may be shared. Shape ``[num_requests]``.
        request_row: Row of each request in the job's token table. Shape ``[num_requests]``.
        private_len: Tokens of each request after its deepest prefix. Shape ``[num_requests]``.
        private_tokens: Those tokens, one request after the other.
    """

    first_position: int
    first_prefix: int
    prefix_parent: Int32Array
    prefix_start_len: Int32Array
    prefix_end_len: Int32Array
    prefix_num_consumers: Int64Array
    prefix_longest_consumer_len: Int64Array
    prefix_end_position: Int64Array
    prefix_tokens: Int32Array
    request_prefix: Int32Array
    request_max_new_len: Int64Array
    request_known_len: Int64Array
    request_task: Int32Array
    request_share_len: Int32Array
    request_row: Int64Array
    private_len: Int64Array
    private_tokens: Int32Array

    def __len__(self) -> int:
        return len(self.request_prefix)


class RunCutter:
    """Cuts a plan into runs.

    Args:
        plan: The plan.
        table: The prompts that it was made for.
        max_new_len: Most tokens that each row may generate. Shape ``[num_requests]``, by row.
        known_len: Tokens that each row will generate, 0 where not known. None: nowhere. Same shape.
        task: Number of the task that each row names, -1 for none. None: none does. Same shape.
    """

    def __init__(
        self,
        plan: BatchPlan,
        table: TokenTable,
        max_new_len: npt.NDArray[np.integer],
        known_len: npt.NDArray[np.integer] | None = None,
        task: Int32Array | None = None,
    ) -> None:
        self.plan = plan
        self.table = table
        self.max_new_len = _in_order(max_new_len, plan)
        self.known_len = _in_order(_same(0, plan) if known_len is None else known_len, plan)
        self.task = _in_order(_same(-1, plan) if task is None else task, plan)
        self.prompt_len = plan.prompt_lens
        total_len: Int64Array = np.add(self.prompt_len, self.max_new_len, dtype=np.int64)
        self.longest_consumer_len = max_over_ranges(total_len, plan.first, plan.num_consumers)

    @property
    def kv_cost(self) -> Int32Array:
        """KV slots that each position is sure to add to the pool, shared prefixes counted at their leader."""
        # An output that may end anywhere counts little: a window too long costs nothing, too short a one an idle pool.
        cost: Int32Array = self.plan.computed_lens() + np.maximum(self.known_len, 1)
        return cost

    def cut(self, first: int, last: int) -> PlannedRun:
        """The run of positions ``[first, last)``."""
        plan, tokens, offsets = self.plan, self.table.tokens, self.table.offsets
        first_prefix, last_prefix = np.searchsorted(plan.first, [first, last])
        prefixes = slice(first_prefix, last_prefix)
        leader_offset = offsets[plan.order[plan.first[prefixes]]]
        rows = plan.order[first:last]
        request_prefix = plan.request_prefix[first:last]
        # Not -1 as an index: a plan may have no prefix at all.
        shared_len = np.zeros(last - first, np.int64)
        has_prefix = request_prefix >= 0
        shared_len[has_prefix] = plan.end_len[request_prefix[has_prefix]]
        private_len = self.prompt_len[first:last] - shared_len
        return PlannedRun(
            first_position=first,
            first_prefix=int(first_prefix),
            prefix_parent=plan.parent[prefixes],
            prefix_start_len=plan.start_len[prefixes],
            prefix_end_len=plan.end_len[prefixes],
            prefix_num_consumers=plan.num_consumers[prefixes],
            prefix_longest_consumer_len=self.longest_consumer_len[prefixes],
            prefix_end_position=plan.first[prefixes] + plan.num_consumers[prefixes],
            prefix_tokens=gather_runs(
                tokens,
                leader_offset + plan.start_len[prefixes],
                plan.end_len[prefixes] - plan.start_len[prefixes],
            ),
            request_prefix=request_prefix,
            request_max_new_len=self.max_new_len[first:last].astype(np.int64),
            request_known_len=self.known_len[first:last].astype(np.int64),
            request_task=self.task[first:last],
            request_share_len=plan.shareable_lens[first:last],
            request_row=rows,
            private_len=private_len,
            private_tokens=gather_runs(tokens, offsets[rows] + shared_len, private_len),
        )


def _same(value: int, plan: BatchPlan) -> Int32Array:
    return np.broadcast_to(np.int32(value), plan.num_requests)


def _in_order(of_rows: npt.NDArray[np.integer], plan: BatchPlan) -> Int32Array:
    """A number of each row, by position; a number that all rows have stays one, however many they are."""
    column = of_rows.astype(np.int32, copy=False)
    return column if column.strides == (0,) else column[plan.order]


def max_over_ranges(values: Int64Array, first: Int64Array, num: Int64Array) -> Int64Array:
    """``values[first[i] : first[i] + num[i]].max()`` of every i; ranges are not empty."""
    if len(first) == 0:
        return np.zeros(0, np.int64)
    # reduceat takes each index up to the next; the sentinel lets a range end at the last value.
    bounds = np.stack([first, first + num], axis=1).ravel()
    return np.maximum.reduceat(np.append(values, 0), bounds)[::2]
