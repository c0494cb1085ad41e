"""One level instead of many: which prefixes to keep if every prompt may read just one.

The attention kernel, and the paper's whole runtime, share one run of tokens per group. A cut
chooses planned prefixes; a prompt reads the deepest chosen one above it, and each chosen prefix is
computed whole, from the first token, by one of its readers.

Knows: a `BatchPlan`. Must not know: tokens, kernels, time.
Invariant: ``greedy_cut(plan).saved_tokens <= exact_cut(plan).saved_tokens <=`` what the plan saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.planner.plan import BatchPlan
from batchllm.tokens import Int32Array, Int64Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupCut:
    """A one-level sharing of the prompts of a plan.

    Attributes:
        prefixes: Chosen planned prefixes, ascending, int32[num_groups].
        request_group: Chosen prefix that each position reads or computes, or -1,
            int32[num_requests].
        saved_tokens: Prompt tokens not computed, against computing every prompt whole.
    """

    prefixes: Int32Array
    request_group: Int32Array
    saved_tokens: int


def exact_cut(plan: BatchPlan) -> GroupCut:
    """The one-level cut that saves most; of equally good ones, the one with fewest prefixes.

    Solves the tree recurrence: below a chosen prefix of ``a`` tokens, node ``u``
    with ``n`` direct prompts saves ``g(u, a) = max(n * a + sum g(c, a), n * d + sum g(c, d) -
    cost(u))``, ``d = end_len(u)``. ``g(u, .)`` is convex and piecewise linear, so it is kept as its
    breakpoints in mergeable heaps: O(m log m) for m prefixes, whatever their height.
    """
    num_direct, cost = _direct_and_cost(plan)
    limits = _choice_limits(plan.parent, plan.end_len, num_direct, cost)
    group = _deepest_chosen(plan.parent, plan.end_len, limits)
    return _cut_of(plan, group, cost)


def greedy_cut(plan: BatchPlan) -> GroupCut:
    """The paper's rule (BatchLLM, Algorithm 1), with the free merge of its reference code.

    Bottom-up, a grandchild ``g`` of node ``D`` by child ``c`` moves up beside ``c`` if
    ``(prompts(g) - 1) * tokens(g) > tokens(c)``; a child left with one branch merges with it. What
    is then below the root is a group each. Looks at one promotion at a time, so it misses those
    that pay only together. O(m) plus one step per promotion.
    """
    num_direct, cost = _direct_and_cost(plan)
    group = _promote(plan.parent, plan.start_len, plan.end_len, num_direct)
    return _cut_of(plan, group, cost)


def _direct_and_cost(plan: BatchPlan) -> tuple[Int64Array, Int64Array]:
    """Prompts with each prefix as their deepest, and tokens lost by choosing it.

    Choosing a prefix costs computing it once. A prompt that is nothing but the prefix computes its
    last page, so each such prompt after the one that computes it all loses a page as well.
    """
    consumers = plan.request_prefix[plan.request_prefix >= 0]
    num_direct = np.bincount(consumers, minlength=plan.num_prefixes)
    whole = (plan.shareable_lens == plan.end_len_of(plan.request_prefix)) & (plan.request_prefix >= 0)
    num_whole = np.bincount(plan.request_prefix[whole], minlength=plan.num_prefixes)
    cost = plan.end_len + np.maximum(num_whole - 1, 0) * plan.page_size
    return num_direct.astype(np.int64), cost.astype(np.int64)


def _cut_of(plan: BatchPlan, group: Int32Array, cost: Int64Array) -> GroupCut:
    """The cut in which the direct prompts of prefix ``p`` read prefix ``group[p]``."""
    request_group = np.append(group, np.int32(-1))[plan.request_prefix]
    num_members = np.bincount(request_group + 1, minlength=plan.num_prefixes + 1)[1:]
    chosen = np.flatnonzero(num_members)
    saved = (num_members[chosen] * plan.end_len[chosen] - cost[chosen]).sum()
    return GroupCut(prefixes=chosen.astype(np.int32), request_group=request_group, saved_tokens=int(saved))


@njit()
def _deepest_chosen(parent: Int32Array, end_len: Int32Array, limits: Int64Array) -> Int32Array:
    """Deepest chosen prefix at or above each: chosen if the one above it ends below its limit."""
    group = np.empty(len(parent), np.int32)
    for p in range(len(parent)):
        above = group[parent[p]] if parent[p] >= 0 else np.int32(-1)
        above_len = end_len[above] if above >= 0 else 0
        group[p] = p if above_len < limits[p] else above
    return group


@njit()
def _merge_heaps(keys: Int64Array, left: Int64Array, right: Int64Array, a: int, b: int) -> int:
    """Meld two skew heaps, smallest key at the top, -1 for none; returns the top."""
    if a < 0 or b < 0:
        return max(a, b)
    if keys[b] < keys[a]:
        a, b = b, a
    top = a
    while True:
        below = right[a]
        right[a] = left[a]
        if below < 0:
            left[a] = b
            return top
        if keys[b] < keys[below]:
            below, b = b, below
        left[a] = below
        a = below


@njit()
def _choice_limits(parent: Int32Array, end_len: Int32Array, num_direct: Int64Array, cost: Int64Array) -> Int64Array:
    """For each prefix, how many tokens must be had from above before choosing it stops paying.

    ``line[u]`` and the breakpoints in the heaps of ``u`` are ``g(u, .)``: at ``a`` tokens from
    above it is ``base + slope * a + sum of rise[k] * max(0, a - at[0, k])``; ``line`` holds base,
    slope, and over those breakpoints the sums of ``rise`` and of ``rise * at``. A breakpoint is in
    two heaps: heap 0 gives up the leftmost, where choosing u wins and g is flat, heap 1 (keys
    negated) the rightmost, past the end of u, where no prefix above u reaches. Given up by one, it
    is dead to the other.
    """
    m = len(parent)
    at, rise, alive = (
        np.empty((2, 2 * m), np.int64),
        np.empty(2 * m, np.int64),
        np.ones(2 * m, np.bool_),
    )
    left, right = np.full((2, 2 * m), -1, np.int64), np.full((2, 2 * m), -1, np.int64)
    top = np.full((2, m), -1, np.int64)
    line, limits = np.zeros((m, 4), np.int64), np.zeros(m, np.int64)
    line[:, 1] = num_direct
    count = 0
    for u in range(m - 1, -1, -1):
        depth = np.int64(end_len[u])
        high = _trim(at[1], left[1], right[1], rise, alive, top[1, u], line[u], depth)
        low = top[0, u]
        base, slope, sum_rise, sum_rise_at = line[u]
        chosen = base + (slope + sum_rise) * depth - sum_rise_at - cost[u]
        if chosen > base:
            low, limit, step = _flatten(at[0], left[0], right[0], rise, alive, low, line[u], chosen)
            limits[u] = limit
            # From here on flat up to limit - 1, then the old line, joined at whole numbers.
            for where, increase in ((limit - 1, step), (limit, line[u, 1] - step)):
                at[0, count], at[1, count], rise[count] = where, -where, increase
                low = _merge_heaps(at[0], left[0], right[0], low, count)
                high = _merge_heaps(at[1], left[1], right[1], high, count)
                line[u, 2] += increase
                line[u, 3] += increase * where
                count += 1
            line[u, 0], line[u, 1] = chosen, 0
        p = parent[u]
        if p >= 0:
            line[p] += line[u]
            top[0, p] = _merge_heaps(at[0], left[0], right[0], top[0, p], low)
            top[1, p] = _merge_heaps(at[1], left[1], right[1], top[1, p], high)
    return limits


@njit()
def _trim(
    key: Int64Array,
    left: Int64Array,
    right: Int64Array,
    rise: Int64Array,
    alive: npt.NDArray[np.bool_],
    high: int,
    line: Int64Array,
    depth: int,
) -> int:
    """Forget the breakpoints at ``depth`` or beyond; ``key`` holds them negated."""
    while high >= 0 and (not alive[high] or -key[high] >= depth):
        if alive[high]:
            alive[high] = False
            line[2] -= rise[high]
            line[3] += rise[high] * key[high]
        high = _merge_heaps(key, left, right, left[high], right[high])
    return high


@njit()
def _flatten(
    key: Int64Array,
    left: Int64Array,
    right: Int64Array,
    rise: Int64Array,
    alive: npt.NDArray[np.bool_],
    low: int,
    line: Int64Array,
    chosen: int,
) -> tuple[int, int, int]:
    """Walk right to the first whole number where not choosing saves ``chosen`` tokens or more.

    Forgets the breakpoints on the way, and leaves in ``line[1]`` the slope there. Returns the heap,
    that number, and by how much not choosing is better there.
    """
    here, value = np.int64(0), line[0]
    while low >= 0:
        if alive[low]:
            there = value + line[1] * (key[low] - here)
            if there >= chosen:
                break
            alive[low] = False
            here, value = key[low], there
            line[1] += rise[low]
            line[2] -= rise[low]
            line[3] -= rise[low] * here
        low = _merge_heaps(key, left, right, left[low], right[low])
    limit = here + (chosen - value + line[1] - 1) // line[1]
    return low, limit, value + line[1] * (limit - here) - chosen


@njit()
def _promote(parent: Int32Array, start_len: Int32Array, end_len: Int32Array, num_direct: Int64Array) -> Int32Array:
    """Where the paper's promotions leave each prefix: the group of its direct prompts, or -1."""
    m = len(parent)
    num_branches, num_prompts = num_direct.copy(), num_direct.copy()
    for p in range(m - 1, -1, -1):
        if parent[p] >= 0:
            num_branches[parent[p]] += 1
            num_prompts[parent[p]] += num_prompts[p]
    under, merged = parent.copy(), np.zeros(m, np.bool_)
    # Children of a node that are settled themselves, as linked lists.
    head, following = np.full(m, -1), np.full(m, -1)
    for c in range(m - 1, -1, -1):
        above, branch, stays = parent[c], head[c], -1
        while branch >= 0:
            upcoming = following[branch]
            gain = (num_prompts[branch] - 1) * (end_len[branch] - end_len[c])
            if num_branches[c] > 1 and gain > end_len[c] - start_len[c]:
                num_branches[c] -= 1
                num_prompts[c] -= num_prompts[branch]
                _move_branch(under, head, following, num_branches, branch, above)
            else:
                stays = branch
            branch = upcoming
        if num_branches[c] > 1:
            if above >= 0:
                following[c], head[above] = head[above], c
            continue
        # One branch is left: it takes this node's place. If it is a prompt, it reads what is above.
        merged[c] = True
        if stays >= 0:
            _move_branch(under, head, following, num_branches, stays, above)
            if above >= 0:
                num_branches[above] -= 1
    group = np.empty(m, np.int32)
    for p in range(m):
        if under[p] >= 0:
            group[p] = group[under[p]]
        else:
            group[p] = -1 if merged[p] else p
    return group


@njit()
def _move_branch(
    under: Int32Array,
    head: Int64Array,
    following: Int64Array,
    num_branches: Int64Array,
    branch: int,
    above: int,
) -> None:
    under[branch] = above
    if above >= 0:
        num_branches[above] += 1
        following[branch], head[above] = head[above], branch
