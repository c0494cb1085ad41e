"""SGLang's radix cache with planned prefixes pinned in it. Runs in the scheduler's process. (Upstream:
``srt/mem_cache/radix_cache.py``.)

The `PinLedger` says who still needs a planned prefix; this class holds its KV. A pin is one extra
``inc_lock_ref``, so SGLang's own accounting (and its strict memory checks) sees pinned KV as protected. A
planned request owns its slots like this, in ``req_to_token[slot]``::

    0 ........................ cache_protected_len .................. kv_allocated_len
    [ planned prefixes: the tree's, pinned )[ private prompt and output: the request's )

The private part is freed when the request finishes and never becomes a leaf of the tree. Requests outside any
plan are SGLang's as ever: their KV is kept and evicted, in the order of `batchllm.srt.mem_cache.live_prefixes`. Nothing
pinned is evicted for them, but pins that no running request reads are given up where a live request has no room
otherwise: their next consumer computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, registered_radix_cache_backends

from batchllm.errors import ConfigError
from batchllm.prefix_cache.pin_ledger import NO_PREFIX, PinLedger, PrefixState
from batchllm.scheduler.admission import reusable_len
from batchllm.scheduler.decision import SettledDecision
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.mem_cache.shared_prefixes import SharedPrefixes
from batchllm.tokens import page_floor

BACKEND_NAME = "batchllm"
_MIN_PURGE = 1024


def create(ctx: TreeCacheBuildContext) -> PlannedRadixCache:
    """Factory for ``--radix-cache-backend batchllm``.

    Raises:
        ConfigError: The model or a flag needs a cache that plans cannot pin in.
    """
    if ctx.is_hybrid_swa or ctx.is_hybrid_ssm:
        raise ConfigError(
            f"{ctx.server_args.model_path}: models with sliding-window or state-space layers are not "
            "supported by --radix-cache-backend batchllm; run them with `python -m sglang.launch_server`"
        )
    if ctx.disable_radix_cache:
        raise ConfigError("--disable-radix-cache: a planned cache cannot be switched off; drop the flag")
    return PlannedRadixCache(ctx.params)


def register() -> None:
    """Make ``--radix-cache-backend batchllm`` known to SGLang in this process. Does nothing the second
    time.
    """
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    if BACKEND_NAME not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND_NAME, create)


class _Pin:
    """A resident planned prefix: its node in the tree, and its slots from the start of the prompt."""

    __slots__ = ("indices", "node")

    def __init__(self, node: TreeNode, indices: torch.Tensor) -> None:
        self.node = node
        self.indices = indices


def _path(node: TreeNode) -> Iterator[TreeNode]:
    """``node`` and what is above it."""
    while node is not None:
        yield node
        node = node.parent


class PlannedRadixCache(RadixCache):
    """Radix cache that computes each planned prefix once and keeps it until its last consumer has
    finished.

    Attributes:
        readers: Who reads which nodes; told of those that go. Nobody until it is set.
        settled: The scheduler's last decision, if it lacked room: it ends when a request frees its KV.
        num_given_up_tokens: Tokens of planned prefixes that were given up for live requests.
        yields_to_live: Whether eviction may go on with pinned prefixes once no planned request runs.
    """

    def __init__(self, params: Any) -> None:
        self.ledger = PinLedger()
        self._pins: dict[int, _Pin] = {}
        self._reading: set[PlannedReq] = set()
        self._missed: set[int] = set()  # prefixes of which a consumer was aborted
        self._given_up: set[int] = set()  # prefixes that live requests took, and nobody has computed again
        # What nobody may need any more, released without all having read it, by its number.
        self._withdrawn: dict[int, TreeNode] = {}
        self._purge_at = _MIN_PURGE
        self.num_given_up_tokens = 0
        self.readers = SharedPrefixes.empty()
        self.settled = SettledDecision()
        self.yields_to_live = False
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.ledger.clear()
        self._pins.clear()
        self._reading.clear()
        self._missed.clear()
        self._given_up.clear()
        self._withdrawn.clear()
        self.readers.remove_all_nodes()

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """A planned follower gets its prefix without a walk of the tree; everyone else is matched as ever."""
        req = params.req
        if not isinstance(req, PlannedReq) or req.prefix_id == NO_PREFIX:
            return super().match_prefix(params)
        found = self.ledger.lookup(req.prefix_id)
        if found.missing_ids:
            return super().match_prefix(params)
        cached_len = reusable_len(found.resident_len, req.share_len, self.page_size)
        # Locking the root is a no-op: the pin holds the prefix until this very request has finished.
        return MatchResult(
            device_indices=self._pins[found.resident_id].indices[:cached_len],
            last_device_node=self.root_node,
            last_host_node=self.root_node,
            best_match_node=self.root_node,
        )

    def start(self, req: PlannedReq) -> None:
        """``req`` has been taken into a step: the prefixes that it reads stay until it gives up its KV."""
        self._reading.add(req)

    def lead(self, req: PlannedReq, prefix_ids: tuple[int, ...]) -> int:
        """``req`` has been admitted and computes these prefixes, outermost first.

        Returns:
            Tokens of them that had been computed before, and were given up for live requests.
        """
        for prefix_id in prefix_ids:
            self.ledger.start_computing(prefix_id)
        req.led_prefix_ids = list(prefix_ids)
        again = self._given_up.intersection(prefix_ids)
        self._given_up -= again
        num_cached = len(req.prefix_indices)  # what was given up may still be there
        return sum(min(self.ledger.num_tokens(i), max(self.ledger.end_len(i) - num_cached, 0)) for i in again)

    def insert_led_prefixes(self, req: PlannedReq) -> None:
        """Pin the prefixes that ``req`` leads and whose last token the coming step computes.

        The slots are allocated and the forward pass that fills them is launched before any that reads them,
        so followers may match them from the next step on, before this one's result is known.
        """
        while req.led_prefix_ids:
            prefix_id = req.led_prefix_ids[0]
            end_len = self.ledger.end_len(prefix_id)
            if end_len > req.extend_range.end:
                return
            self._pin(req, prefix_id, end_len)
            del req.led_prefix_ids[0]

    def _pin(self, req: PlannedReq, prefix_id: int, end_len: int) -> None:
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        key = RadixKey(req.origin_input_ids[:end_len], req.extra_key)
        indices = row[:end_len].to(dtype=torch.int64, copy=True)
        result = self.insert(InsertParams(key=key, value=indices))
        protected_len = req.cache_protected_len
        if result.prefix_len > protected_len:
            # Someone else (another job) has put the same tokens there since this request was matched: read
            # those.
            self.token_to_kv_pool_allocator.free_segment(
                indices[protected_len : result.prefix_len], start_pos=protected_len
            )
            indices = super().match_prefix(MatchPrefixParams(key=key)).device_indices
            self.req_to_token_pool.write((req.req_pool_idx, slice(protected_len, end_len)), indices[protected_len:])
        self.inc_lock_ref(result.last_device_node)
        self._pins[prefix_id] = _Pin(result.last_device_node, indices)
        req.cache_protected_len = max(protected_len, end_len)
        self.ledger.mark_resident(prefix_id)

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """A planned request's private KV stays its own; a prompt in pieces goes on after the last one."""
        if not isinstance(req, PlannedReq):
            super().cache_unfinished_req(req, chunked=chunked)
        elif chunked:
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
            req.prefix_indices = row[: req.extend_range.end].to(dtype=torch.int64, copy=True)

    def keep_computed(self, req: PlannedReq) -> int:
        """Leave in the tree what a planned prompt in pieces has computed of its prefixes; anyone may evict it.

        Returns:
            Tokens that it has computed beside those: they are lost when it gives up its KV.
        """
        num_computed, start = len(req.prefix_indices), req.cache_protected_len
        end = min(num_computed, self.ledger.end_len(req.led_prefix_ids[-1])) if req.led_prefix_ids else start
        end = page_floor(end, self.page_size)
        if end <= start:
            return num_computed - start
        key = RadixKey(req.origin_input_ids[:end], req.extra_key)
        indices = req.prefix_indices[:end]
        result = self.insert(InsertParams(key=key, value=indices))
        if result.prefix_len > start:  # somebody else has put the same tokens there
            self.token_to_kv_pool_allocator.free_segment(indices[start : result.prefix_len], start_pos=start)
        self._set_withdrawn(result.last_device_node)
        req.cache_protected_len = end
        return num_computed - end

    def cache_finished_req(self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """Free a planned request's private KV; if it has finished, also what nobody needs any more.

        SGLang calls this for a retracted request too: that one keeps its claim on its prefixes.
        """
        self.settled.invalidate()
        if not isinstance(req, PlannedReq):
            super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
            return
        private = self.req_to_token_pool.req_to_token[req.req_pool_idx, req.cache_protected_len : kv_len_to_handle]
        # The row is reused by the next request while a free group may still hold this.
        self.token_to_kv_pool_allocator.free_segment(
            private.to(dtype=torch.int64, copy=True), start_pos=req.cache_protected_len
        )
        self._reading.discard(req)
        self.dec_lock_ref(req.last_node)
        for prefix_id in req.led_prefix_ids:
            self.ledger.abandon(prefix_id)
        req.led_prefix_ids = []
        if req.finished():
            self.count_off(req)

    def count_off(self, req: PlannedReq) -> None:
        """``req`` needs its prefixes no more: release those that it was the last to need."""
        if req.is_counted_off:
            return
        req.is_counted_off = True
        if isinstance(req.finished_reason, FINISH_ABORT):
            self._missed.update(self.ledger.path(req.prefix_id))
        for prefix_id in self.ledger.finish_consumer(req.prefix_id):
            node = self._unpin(prefix_id)
            if prefix_id in self._missed:  # the job may come again, with what is left of it
                self._set_withdrawn(node)
            else:
                self._free_upward(node)

    def release_job(self, job_id: int) -> None:
        """Nothing more will read this job's prefixes for it. Their KV stays until it is evicted or `free_withdrawn`:
        a job that is planned anew comes before the old one is closed.
        """
        for prefix_id in self.ledger.release_job(job_id):
            self._set_withdrawn(self._unpin(prefix_id))
        self._missed = {prefix_id for prefix_id in self._missed if prefix_id in self.ledger}
        self._given_up = {prefix_id for prefix_id in self._given_up if prefix_id in self.ledger}

    def _set_withdrawn(self, node: TreeNode) -> None:
        self._withdrawn[node.id] = node
        if len(self._withdrawn) >= self._purge_at:  # a server may have a job open for months
            self._withdrawn = {i: node for i, node in self._withdrawn.items() if self._is_in_tree(node)}
            self._purge_at = max(_MIN_PURGE, 2 * len(self._withdrawn))

    def free_withdrawn(self) -> None:
        """Free what jobs that were withdrawn have left behind, as far as nobody else holds it."""
        for node in self._withdrawn.values():
            if self._is_in_tree(node):
                self._free_upward(node)
        self._withdrawn.clear()

    def _is_in_tree(self, node: TreeNode) -> bool:
        """It has not been evicted."""
        return node.parent.children.get(node.key.child_key(self.page_size)) is node

    def make_room(self, total_len: int, node: TreeNode, pool_tokens: int) -> bool:
        """Give up pins until a request would fit into the pool if all that runs had finished.

        Args:
            total_len: Slots that the request needs, prompt and output.
            node: What it reads ends here; that is not given up.
            pool_tokens: Slots of the pool.

        Returns:
            Whether any was given up.
        """
        path = set(_path(node))
        num_read = max((self.ledger.end_len(i) for i, pin in self._pins.items() if pin.node in path), default=0)
        num_missing = total_len - num_read + self.ledger.num_pinned_tokens - pool_tokens
        return num_missing > 0 and self._give_up_pins(num_missing, path) > 0

    def _give_up_pins(self, num_tokens: int, spared: set[TreeNode] | None = None) -> int:
        """Let so many pinned tokens become evictable, of prefixes that no running request reads, last in plan first.

        Their next consumer computes them again, unless they are still there.

        Returns:
            Pinned tokens given up; fewer where there are no more.
        """
        read = {prefix_id for req in self._reading for prefix_id in self.ledger.path(req.prefix_id)}
        num_given_up = 0
        # Numbers grow with jobs, with the plan, and from parents to children.
        for prefix_id in sorted(self._pins, reverse=True):
            if num_given_up >= num_tokens:
                break
            is_spared = spared is not None and self._pins[prefix_id].node in spared
            if prefix_id not in read and not is_spared and self.ledger.may_give_up(prefix_id):
                num_given_up += self.ledger.num_tokens(prefix_id)
                self.ledger.give_up(prefix_id)
                self._given_up.add(prefix_id)
                self._unpin(prefix_id)
        self.num_given_up_tokens += num_given_up
        return num_given_up

    def evict(self, params: EvictParams) -> EvictResult:
        missing = params.num_tokens - self.evictable_size_
        if missing > 0 and self.yields_to_live and not self._reading:  # planned requests are retracted first
            self._give_up_pins(missing)
        return super().evict(params)

    def _unpin(self, prefix_id: int) -> TreeNode:
        node = self._pins.pop(prefix_id).node
        self.dec_lock_ref(node)
        return node

    def _free_upward(self, node: TreeNode) -> None:
        """Free ``node`` and then its ancestors, as far as nothing locks or continues them."""
        while node is not self.root_node and node.lock_ref == 0 and not node.children:
            parent = node.parent
            self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
            self._delete_leaf(node)
            self._record_remove_event(node)
            node = parent

    def _delete_leaf(self, node: TreeNode) -> None:
        super()._delete_leaf(node)
        self.readers.remove_node(node)

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        node = super()._split_node(key, child, split_len)
        # The marks of `batchllm.srt.mem_cache.live_prefixes`.
        node.num_waiting = getattr(child, "num_waiting", 0)
        node.read_at = getattr(child, "read_at", None)
        return node

    def check_integrity(self) -> None:
        """Check every invariant of ledger and pins; expensive, for tests and debugging.

        Raises:
            AssertionError: Naming the prefix that breaks one.
        """
        self.ledger.check_integrity()
        for prefix_id, pin in self._pins.items():
            assert self.ledger.state(prefix_id) is PrefixState.RESIDENT, f"prefix {prefix_id} pinned in vain"
            assert len(pin.indices) == self.ledger.end_len(prefix_id), f"prefix {prefix_id} has wrong slots"
            node, num_tokens = pin.node, 0
            assert node.lock_ref > 0, f"prefix {prefix_id} is not locked"
            while node is not self.root_node:
                num_tokens += len(node.key)
                node = node.parent
            assert num_tokens == len(pin.indices), f"prefix {prefix_id} ends elsewhere in the tree"
