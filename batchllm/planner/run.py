"""A run: consecutive requests of a plan, as they travel to the scheduler. Shared prefixes once, private
suffixes.

Arrays only, so that a run of thousands of requests pickles as a few buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from batchllm.planner.plan import BatchPlan
from batchllm.tokens import Int32Array, Int64Array, TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """Requests ``[first_position, first_position + len(self))`` of a plan, and the prefixes first consumed
    there.

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
        # A job of millions of rows holds these for all of them: no wider than they need be.
        self.max_new_len = max_new_len.astype(np.int32, copy=False)[plan.order]
        no_known_len = np.zeros_like(self.max_new_len)
        self.known_len = no_known_len if known_len is None else known_len.astype(np.int32, copy=False)[plan.order]
        self.task = np.full(len(plan.order), -1, np.int32) if task is None else task[plan.order]
        self.prompt_len = plan.prompt_lens
        total_len: Int64Array = np.add(self.prompt_len, self.max_new_len, dtype=np.int64)
        self.longest_consumer_len = max_over_ranges(total_len, plan.first, plan.num_consumers)
        # An output that may end anywhere counts little: a window too long costs nothing, too short a one an idle pool.
        self.kv_cost = plan.computed_lens() + np.maximum(self.known_len, 1)
        """KV slots that each position is sure to add to the pool, shared prefixes counted at their leader."""

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
            prefix_tokens=_gather(
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
            private_tokens=_gather(tokens, offsets[rows] + shared_len, private_len),
        )


def _gather(tokens: Int32Array, starts: Int64Array, lens: npt.NDArray[np.integer]) -> Int32Array:
    """``tokens[starts[i] : starts[i] + lens[i]]`` of every i, one after the other."""
    offsets = np.zeros(len(lens) + 1, np.int64)
    np.cumsum(lens, out=offsets[1:])
    gathered = np.empty(offsets[-1], np.int32)
    copy_runs(tokens, starts, starts + lens, gathered, offsets[:-1])
    return gathered


@njit(cache=True, nogil=True)
def copy_runs(
    source: Int32Array, starts: Int64Array, ends: Int64Array, target: Int32Array, target_starts: Int64Array
) -> None:
    """Copy ``source[starts[i] : ends[i]]`` to ``target[target_starts[i] :]``, for every i."""
    for i in range(len(starts)):
        # Unsigned, as in `batchllm.tokens.common_len`: five times as fast.
        start, end, to = np.uint64(starts[i]), np.uint64(ends[i]), np.uint64(target_starts[i])
        for k in range(end - start):
            target[to + k] = source[start + k]


def max_over_ranges(values: Int64Array, first: Int64Array, num: Int64Array) -> Int64Array:
    """``values[first[i] : first[i] + num[i]].max()`` of every i; ranges are not empty."""
    if len(first) == 0:
        return np.zeros(0, np.int64)
    # reduceat takes each index up to the next; the sentinel lets a range end at the last value.
    bounds = np.stack([first, first + num], axis=1).ravel()
    longest: Int64Array = np.maximum.reduceat(np.append(values, 0), bounds)[::2]
    return longest
