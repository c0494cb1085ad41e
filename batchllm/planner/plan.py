"""The plan of a batch: in which order prompts run, and which prefixes they share.

Knows: positions, planned prefixes, pages, and what it means for a plan to be sound. Must not know:
how the plan was found, KV slots, time. The scheduler, the cache and the simulator all rely on this
contract.
Invariant: whoever runs the prompts in ``order``, keeps each planned prefix from its first consumer
to its last, and computes nothing it can read, computes ``optimal_prefill_tokens`` prompt tokens, and
``num_lost_tokens`` more where the order was chosen for another reason than reuse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.errors import PlanError
from batchllm.planner.prefix_tree import enclosing_interval
from batchllm.tokens import Int32Array, Int64Array, TokenTable, common_len

_PREFIX_DTYPES = {
    "parent": np.int32,
    "start_len": np.int32,
    "end_len": np.int32,
    "first": np.int64,
    "num_consumers": np.int64,
}
_REQUEST_DTYPES = {"order": np.int64, "prompt_lens": np.int32, "request_prefix": np.int32}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchPlan:
    """What runs in which order and what is shared. The plan owns its arrays: they become read-only.

    A *position* counts requests in plan order from 0. Planned prefixes are numbered in depth-first
    preorder. The consumers of prefix ``p`` are exactly the positions ``first[p] .. first[p] +
    num_consumers[p] - 1``; the first of them, its leader, computes it. Two prefixes' consumers are
    nested or disjoint. Compare two plans by `fingerprint`.

    Attributes:
        num_requests: Prompts planned, n.
        page_size: Tokens of a KV page; prefixes are whole pages.
        order: Position -> row of the TokenTable, a permutation, int64[n].
        prompt_lens: Tokens of the prompt at each position, int32[n].
        request_prefix: Deepest planned prefix each position consumes, or -1, int32[n].
        parent: Prefix that a prefix continues, or -1, int32[m].
        start_len: Where a prefix starts: its parent's ``end_len``, or 0, int32[m].
        end_len: Tokens from the start of the prompt to the prefix's end, int32[m].
        first: Position of the first consumer, int64[m].
        num_consumers: Positions that consume the prefix, at least 2, int64[m].
        num_prompt_tokens: Tokens of all prompts.
        optimal_prefill_tokens: Fewest prompt tokens any schedule can compute, sharing whole pages
            and computing at least the last token of every prompt.
        num_lost_tokens: Prompt tokens that this plan computes beyond that, because its order parts
            what shares (`fair_order`).
        share_lens: Tokens at the start of each prompt that others may have in common with it, 1 to all of them, the
            last of which it computes itself; what is behind them is computed for this prompt alone, since it is
            scored. int32[n]; None: all of every prompt.
    """

    num_requests: int
    page_size: int
    order: Int64Array
    prompt_lens: Int32Array
    request_prefix: Int32Array
    parent: Int32Array
    start_len: Int32Array
    end_len: Int32Array
    first: Int64Array
    num_consumers: Int64Array
    num_prompt_tokens: int
    optimal_prefill_tokens: int
    num_lost_tokens: int = 0
    share_lens: Int32Array | None = None

    def __post_init__(self) -> None:
        for _, array in self._arrays():
            array.setflags(write=False)

    def _arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name in (*_REQUEST_DTYPES, *_PREFIX_DTYPES):
            yield name, getattr(self, name)
        if self.share_lens is not None:
            yield "share_lens", self.share_lens

    @property
    def num_prefixes(self) -> int:
        """Planned prefixes, m."""
        return len(self.parent)

    @property
    def optimal_reuse(self) -> float:
        """Share of the prompt tokens that need not be computed, 0 to 1."""
        if self.num_prompt_tokens == 0:
            return 0.0
        return 1.0 - self.optimal_prefill_tokens / self.num_prompt_tokens

    @property
    def shareable_lens(self) -> Int32Array:
        """Tokens at the start of each prompt that may be shared, int32[num_requests]."""
        return self.prompt_lens if self.share_lens is None else self.share_lens

    def read_prefix(self) -> Int32Array:
        """Deepest prefix each position finds computed, that is consumes but does not lead, or -1.

        Returns:
            int32[num_requests].
        """
        read: Int32Array = _read_prefix(self.request_prefix, self.parent, self.first)
        return read

    def computed_lens(self) -> Int32Array:
        """Prompt tokens each position must compute under the plan, a leader its prefixes too.

        Returns:
            int32[num_requests]; they add up to ``optimal_prefill_tokens`` and ``num_lost_tokens``.
        """
        readable = self.end_len_of(self.read_prefix())
        reused = np.minimum(readable, self.shareable_lens - 1)
        computed: Int32Array = self.prompt_lens - (reused - reused % self.page_size)
        return computed

    def end_len_of(self, prefix: Int32Array) -> Int32Array:
        """Where each of some prefixes ends, and 0 for -1: int32, of the shape given."""
        return np.append(self.end_len, np.int32(0))[prefix]

    def fingerprint(self) -> str:
        """32 hex digits: those of equal plans, and of no others, are equal, on every machine."""
        digest = hashlib.blake2b(b"batchllm.BatchPlan/1", digest_size=16)
        numbers = (
            self.num_requests,
            self.page_size,
            self.num_prefixes,
            self.num_prompt_tokens,
            self.optimal_prefill_tokens,
        )
        digest.update(np.array(numbers, dtype="<i8").tobytes())
        for _, array in self._arrays():
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def validate(self, table: TokenTable | None = None, namespaces: Int64Array | None = None) -> None:
        """Check every invariant of the contract, and with the prompts at hand, every shared token.

        Args:
            table: The prompts planned; None checks the plan against itself only.
            namespaces: int[num_requests], as given to ``plan_batch``.

        Raises:
            PlanError: The first violated invariant, and the position or prefix that violates it.
        """
        _check_arrays(self)
        _check_order(self)
        _check_prefixes(self)
        _check_consumers(self)
        _check_totals(self)
        if table is not None:
            _check_tokens(self, table)
        if namespaces is not None:
            _check_namespaces(self, namespaces)


def _require(holds: npt.NDArray[np.bool_], noun: str, invariant: str, **values: Any) -> None:
    """Raise, naming the first offender of ``noun`` and its ``values``, unless all hold."""
    if holds.all():
        return
    where = int(np.argmin(holds))
    shown = ", ".join(f"{name}={array[where]}" for name, array in values.items())
    raise PlanError(f"{noun} {where}: {invariant} ({shown})")


def _check_arrays(plan: BatchPlan) -> None:
    for dtypes, length in (
        (_REQUEST_DTYPES, plan.num_requests),
        (_PREFIX_DTYPES, plan.num_prefixes),
    ):
        for name, dtype in dtypes.items():
            array = getattr(plan, name)
            if array.dtype != dtype or array.shape != (length,):
                raise PlanError(f"{name} must be {np.dtype(dtype)}[{length}], not {array.dtype}{array.shape}")
    share_lens = plan.share_lens
    if share_lens is not None and (share_lens.dtype != np.int32 or share_lens.shape != (plan.num_requests,)):
        raise PlanError(f"share_lens must be int32[{plan.num_requests}], not {share_lens.dtype}{share_lens.shape}")
    if plan.page_size < 1:
        raise PlanError(f"page_size must be at least 1, not {plan.page_size}")


def _check_order(plan: BatchPlan) -> None:
    n = plan.num_requests
    inside = (plan.order >= 0) & (plan.order < n)
    _require(inside, "position", f"order must name one of {n} rows", order=plan.order)
    position_of = np.full(n, -1, dtype=np.int64)
    position_of[plan.order] = np.arange(n)
    # A row listed twice keeps its later position only.
    once = position_of[plan.order] == np.arange(n)
    _require(once, "position", "order must list every row once", order=plan.order)


def _check_prefixes(plan: BatchPlan) -> None:
    index = np.arange(plan.num_prefixes)
    parent, start, end = plan.parent, plan.start_len, plan.end_len
    _require(
        (parent >= -1) & (parent < index),
        "prefix",
        "parent must be -1 or an earlier prefix",
        parent=parent,
    )
    expected = plan.end_len_of(parent)
    _require(start == expected, "prefix", "start_len must be the parent's end_len or 0", start_len=start)
    _require(end > start, "prefix", "end_len must exceed start_len", start_len=start, end_len=end)
    _require(
        end % plan.page_size == 0,
        "prefix",
        f"end_len must be whole pages of {plan.page_size} tokens",
        end_len=end,
    )


def _check_consumers(plan: BatchPlan) -> None:
    first, num = plan.first, plan.num_consumers
    _require(num >= 2, "prefix", "num_consumers must be at least 2", num_consumers=num)
    _require(
        (first >= 0) & (first <= plan.num_requests - num),
        "prefix",
        f"consumers must be among {plan.num_requests} positions",
        first=first,
        num_consumers=num,
    )
    _require(
        np.append(True, first[1:] >= first[:-1])[: len(first)],
        "prefix",
        "prefixes must be in depth-first preorder, so first cannot decrease",
        first=first,
    )
    enclosing = enclosing_interval(first, num)
    _require(
        plan.parent == enclosing,
        "prefix",
        "consumers must be nested in the parent's and in no other prefix's",
        parent=plan.parent,
        first=first,
        num_consumers=num,
    )
    _require(
        plan.request_prefix == deepest_prefix(plan.parent, first, num, plan.num_requests),
        "position",
        "request_prefix must be the deepest prefix with this consumer",
        request_prefix=plan.request_prefix,
    )
    needed = np.maximum(plan.end_len_of(plan.request_prefix), 1)
    _require(
        plan.prompt_lens >= needed,
        "position",
        "prompt_lens must be at least 1 and cover the prefix consumed",
        prompt_lens=plan.prompt_lens,
        request_prefix=plan.request_prefix,
    )
    _require(
        (plan.shareable_lens >= needed) & (plan.shareable_lens <= plan.prompt_lens),
        "position",
        "share_lens must be at least 1, cover the prefix consumed, and be no more than the prompt",
        prompt_lens=plan.prompt_lens,
        share_lens=plan.shareable_lens,
        request_prefix=plan.request_prefix,
    )


def _check_totals(plan: BatchPlan) -> None:
    if plan.num_lost_tokens < 0:
        raise PlanError(f"num_lost_tokens must be at least 0, not {plan.num_lost_tokens}")
    computed_name = "optimal_prefill_tokens" + (" + num_lost_tokens" if plan.num_lost_tokens else "")
    for name, stated, counted in (
        ("num_prompt_tokens", plan.num_prompt_tokens, plan.prompt_lens),
        (computed_name, plan.optimal_prefill_tokens + plan.num_lost_tokens, plan.computed_lens()),
    ):
        total = int(counted.sum(dtype=np.int64))
        if stated != total:
            raise PlanError(f"{name} is {stated}, but the positions add up to {total}")


def _check_tokens(plan: BatchPlan, table: TokenTable) -> None:
    if len(table) != plan.num_requests:
        raise PlanError(f"the plan has {plan.num_requests} requests, the table {len(table)}")
    _require(
        plan.prompt_lens == table.lengths[plan.order],
        "position",
        "prompt_lens must be the length of the row it runs",
        prompt_lens=plan.prompt_lens,
        order=plan.order,
    )
    # A prefix is exact if every consumer but the first agrees with the position before it.
    read = plan.read_prefix()
    wrong = int(_first_mismatch(table.tokens, table.offsets, plan.order, plan.end_len_of(read)))
    if wrong >= 0:
        prefix = int(read[wrong])
        raise PlanError(
            f"position {wrong}: row {plan.order[wrong]} does not start with the "
            f"{plan.end_len[prefix]} tokens of prefix {prefix}, as row {plan.order[wrong - 1]} does"
        )


def _check_namespaces(plan: BatchPlan, namespaces: Int64Array) -> None:
    if namespaces.shape != (plan.num_requests,):
        raise PlanError(f"the plan has {plan.num_requests} requests, namespaces the shape {namespaces.shape}")
    planned = namespaces[plan.order]
    same = np.append(True, planned[1:] == planned[:-1])[: len(planned)]
    _require(
        same | (plan.read_prefix() < 0),
        "position",
        "consumers of a prefix must be of one namespace",
        request_prefix=plan.request_prefix,
    )


@njit(nogil=True)
def deepest_prefix(parent: Int32Array, first: Int64Array, num_consumers: Int64Array, num_requests: int) -> Int32Array:
    """Deepest prefix over each position, or -1; prefixes are nested and in preorder.

    Args:
        parent: int32[num_prefixes], -1 for none.
        first: First position covered, int64[num_prefixes].
        num_consumers: Positions covered, int64[num_prefixes].
        num_requests: Positions there are.

    Returns:
        int32[num_requests].
    """
    deepest = np.empty(num_requests, np.int32)
    current, upcoming = -1, 0
    for i in range(num_requests):
        while current >= 0 and first[current] + num_consumers[current] <= i:
            current = parent[current]
        while upcoming < len(first) and first[upcoming] == i:
            current = upcoming
            upcoming += 1
        deepest[i] = current
    return deepest


@njit(nogil=True)
def _read_prefix(request_prefix: Int32Array, parent: Int32Array, first: Int64Array) -> Int32Array:
    read = request_prefix.copy()
    for i in range(len(read)):
        # Each prefix is climbed over by its leader only: linear in requests and prefixes.
        while read[i] >= 0 and first[read[i]] == i:
            read[i] = parent[read[i]]
    return read


@njit(nogil=True)
def _first_mismatch(tokens: Int32Array, offsets: Int64Array, order: Int64Array, shared_lens: Int32Array) -> int:
    """First position that lacks ``shared_lens`` tokens of the one before it, or -1."""
    for i in range(1, len(order)):
        need = np.int64(shared_lens[i])
        if common_len(tokens, offsets[order[i - 1]], tokens, offsets[order[i]], need) < need:
            return i
    return -1
