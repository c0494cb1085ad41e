"""SGLang's queue of live requests, in our order. Runs in the scheduler's process. (Upstream:
``srt/managers/scheduler.py``'s ``waiting_queue``.)

`LiveOrder` says who starts next, `LivePrefixes` keeps what they will read; this file tells both of every request that
comes and goes. The queue itself stays SGLang's.

INVARIANT: whoever is in SGLang's queue is in the order: all enter by `add`, and whoever has left is found missing.
"""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.mem_cache.common import maybe_cache_unfinished_req

from batchllm.scheduler.live_order import LiveOrder
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.mem_cache.live_prefixes import LivePrefixes
from batchllm.srt.mem_cache.radix_cache import PlannedRadixCache

_AHEAD_SHARE = 8
"""Groups are begun side by side while their prefixes are less than this part of the pool."""


class LiveQueue:
    """The order of the live requests that wait.

    Args:
        tree_cache: The KV.
        pool_tokens: Slots of the KV pool.
    """

    def __init__(self, tree_cache: PlannedRadixCache, pool_tokens: int) -> None:
        self._tree_cache = tree_cache
        self._pool_tokens = pool_tokens
        self._order: LiveOrder[Any] = LiveOrder(tree_cache.page_size)
        self._prefixes = LivePrefixes(tree_cache, pool_tokens)
        self._prompts: dict[Any, array[int]] = {}
        if tree_cache.eviction_policy == "lru":
            tree_cache.eviction_strategy = self._prefixes

    def add(self, req: Any) -> None:
        """This request has entered SGLang's queue."""
        prompt = req.origin_input_ids + req.output_ids if _is_plain(req) else array("q")
        self._prompts[req] = prompt
        num_cached = self._prefixes.want(prompt, req.extra_key) if prompt else 0
        self._order.add(req, prompt, req.extra_key, num_cached)

    def drop_gone(self, waiting: list[Any]) -> None:
        """Forget those that have left SGLang's queue without having started."""
        if len(waiting) == len(self._order):
            return
        left = set(waiting)
        for req in [req for req in self._order if req not in left]:
            self._remove(req, has_started=False)

    def choose(self, *, max_requests: int, max_tokens: int, chunked_req: Any) -> list[Any]:
        """Those to start in the coming step, in order; the others are not to start in it."""
        beside = None
        if chunked_req is not None and _is_plain(chunked_req):
            done = len(chunked_req.prefix_indices)
            beside = (chunked_req.origin_input_ids, chunked_req.extra_key, done)
        return self._order.choose(
            lambda req: self._prefixes.cached_len(self._prompts[req], req.extra_key),
            max_requests=max_requests,
            max_tokens=max_tokens,
            max_ahead_tokens=self._pool_tokens // _AHEAD_SHARE,
            beside=beside,
        )

    def num_uncached(self, req: Any) -> int:
        """Tokens of a request in the order that are to be computed when it starts."""
        prompt = self._prompts[req]
        num_all = len(req.origin_input_ids) + len(req.output_ids)
        return num_all - min(self._prefixes.cached_len(prompt, req.extra_key), num_all - 1)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all that wait."""
        return self._order.num_tokens

    def start(self, req: Any, *, is_whole: bool) -> None:
        """``req`` is in the coming step, with its slots allocated.

        Args:
            req: Added before.
            is_whole: The step computes all that is left of its prompt: the tree has it from now on.
        """
        prompt, num_cached = self._prompts[req], req.cache_protected_len
        ends = [(end, num - 1) for end, num in self._order.group_ends(req) if end > num_cached and num > 1]
        self._remove(req, has_started=True)
        req.matched_node = req.last_node
        self._prefixes.read(req.last_node, len(req.full_untruncated_fill_ids) - num_cached)
        if not is_whole or not prompt:
            return
        maybe_cache_unfinished_req(req, self._tree_cache)
        for end, num_waiting in ends:
            self._prefixes.want_computed(prompt[:end], req.extra_key, num_waiting)

    def complete(self, req: Any) -> None:
        """The coming step computes the last piece of a prompt, if it is live: others may read it in the next."""
        if _is_plain(req) and not isinstance(req, PlannedReq):
            maybe_cache_unfinished_req(req, self._tree_cache)

    def _remove(self, req: Any, *, has_started: bool) -> None:
        self._order.remove(req, has_started=has_started)
        self._prefixes.unwant(self._prompts.pop(req), req.extra_key)


def _is_plain(req: Any) -> bool:
    """Whether its prompt is all that its KV depends on, and all of it may be read from the cache."""
    return (
        req.session is None
        and req.multimodal_inputs is None
        and req.input_embeds is None
        and req.positional_embed_overrides is None
        and not (req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids) - 1)
    )
