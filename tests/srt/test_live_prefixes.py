"""Claims about what the cache keeps for live requests, on a radix tree without an engine."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from batchllm.srt.mem_cache.allocator import CpuTokenAllocator
from batchllm.srt.mem_cache.live_prefixes import LivePrefixes
from batchllm.srt.mem_cache.radix_cache import PlannedRadixCache

POOL = 1000


class _Cache:
    """A tree whose slots come from a pool of `POOL`."""

    def __init__(self) -> None:
        kwargs: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        self.allocator = CpuTokenAllocator(POOL, page_size=1, **kwargs)
        params: dict[str, Any] = {
            "disable": False,
            "req_to_token_pool": None,
            "token_to_kv_pool_allocator": self.allocator,
            "page_size": 1,
        }
        self.tree = PlannedRadixCache(CacheInitParams(**params))
        self.live = LivePrefixes(self.tree, POOL)
        self.tree.eviction_strategy = self.live

    def compute(self, tokens: array[int], extra_key: str | None = None) -> None:
        slots = self.allocator.alloc(len(tokens))
        assert slots is not None
        result = self.tree.insert(InsertParams(key=RadixKey(tokens, extra_key), value=slots))
        self.allocator.free(slots[: result.prefix_len])

    def start(self, tokens: array[int]) -> None:
        """As a request does that reads what there is and computes the rest."""
        node, num_cached = self.live._match(tokens, None, len(tokens) - 1)
        self.live.read(node, len(tokens) - num_cached)
        self.compute(tokens)

    def evict(self, num_tokens: int) -> None:
        self.tree.evict(EvictParams(num_tokens=num_tokens))


def _tokens(*parts: tuple[int, int]) -> array[int]:
    return array("q", [token for token, num in parts for _ in range(num)])


def test_looking_for_a_prompt_finds_all_but_its_last_token_and_changes_nothing() -> None:
    cache, prompt = _Cache(), _tokens((1, 50), (2, 50))
    cache.compute(prompt)
    num_nodes = len(list(cache.live._walk(prompt, None)))
    assert cache.live.cached_len(prompt, None) == 99
    assert cache.live.cached_len(_tokens((1, 30), (3, 9)), None) == 30
    assert cache.live.cached_len(_tokens((1, 50), (2, 50), (3, 9)), None) == 100
    assert cache.live.cached_len(prompt, "another namespace") == 0
    assert cache.live.cached_len(array("q"), None) == 0
    assert len(list(cache.live._walk(prompt, None))) == num_nodes


def test_what_somebody_waits_for_is_evicted_last() -> None:
    """Though it was used longest ago."""
    cache, wanted = _Cache(), _tokens((1, 100))
    cache.compute(wanted)
    assert cache.live.want(wanted + _tokens((2, 10)), None) == 100
    for i in range(3, 9):
        cache.compute(_tokens((i, 100)))
    cache.evict(600)
    assert cache.live.cached_len(wanted + _tokens((2, 1)), None) == 100
    cache.evict(100)
    assert cache.allocator.available_size() == POOL


def test_what_nobody_waits_for_any_more_is_as_any_other() -> None:
    cache, prompt = _Cache(), _tokens((1, 100))
    cache.compute(prompt)
    waiting = prompt + _tokens((2, 10))
    cache.live.want(waiting, None)
    cache.live.want(waiting, None)
    cache.compute(_tokens((3, 100)))
    cache.live.unwant(waiting, None)
    cache.live.unwant(waiting, None)
    cache.evict(100)
    assert cache.live.cached_len(waiting, None) == 0


def test_what_becomes_cached_while_somebody_waits_for_it_is_kept_too() -> None:
    """The first of a group has computed its prefix; its own tokens behind it may go."""
    cache, prefix = _Cache(), _tokens((1, 100))
    cache.compute(prefix + _tokens((2, 50)))
    cache.live.want_computed(prefix, None, 3)
    cache.compute(_tokens((3, 100)))
    cache.evict(150)
    assert cache.live.cached_len(prefix + _tokens((4, 1)), None) == 100
    for _ in range(3):
        cache.live.unwant(prefix + _tokens((4, 1)), None)
    cache.evict(100)
    assert cache.live.cached_len(prefix + _tokens((4, 1)), None) == 0


def test_part_of_what_one_computed_is_kept_where_only_that_is_wanted() -> None:
    cache = _Cache()
    cache.compute(_tokens((1, 100), (2, 100)))
    cache.live.want(_tokens((1, 100), (3, 10)), None)
    cache.evict(100)
    assert cache.live.cached_len(_tokens((1, 100), (3, 10)), None) == 100
    assert cache.tree.total_size() == 100


def test_what_was_read_again_outlives_what_was_not() -> None:
    """Until twice the pool has been computed since it was read."""
    cache, shared = _Cache(), _tokens((1, 100))
    cache.start(shared + _tokens((2, 50)))
    cache.start(shared + _tokens((3, 50)))
    cache.start(_tokens((4, 100)))
    cache.evict(200)  # both private parts, and what came last
    assert cache.live.cached_len(shared + _tokens((5, 1)), None) == 100
    for i in range(10, 30):
        cache.start(_tokens((i, 100)))
        cache.evict(100 if i < 29 else 0)
    cache.evict(100)
    assert cache.live.cached_len(shared + _tokens((5, 1)), None) == 0
    assert cache.live.cached_len(_tokens((29, 100)), None) == 99


def test_marks_do_not_keep_anything_from_being_evicted() -> None:
    cache, prompt = _Cache(), _tokens((1, POOL))
    cache.compute(prompt)
    cache.live.want(prompt, None)
    cache.evict(POOL)
    assert cache.allocator.available_size() == POOL
    cache.live.unwant(prompt, None)
