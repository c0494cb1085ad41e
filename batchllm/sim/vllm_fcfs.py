"""A first-come-first-served scheduler over LRU blocks, as vLLM 0.6.4 runs offline batches: a baseline.

Chunked prefill and prefix caching are on. What makes it what it is: at most 256 requests run; decoding rows come first
in the token budget; a prompt takes budget for its cached tokens too, though only the others are computed; a prompt is
admitted when as many blocks as it has in all could be had, cached ones included, less a watermark of 1 %; a prompt's
blocks are all allocated at its first chunk and count as computed from the next step on; where blocks run out, the
request admitted last is preempted, to be computed again.

Knows: counts of blocks. Must not know: plans' orders, pins.
Invariant: no request overtakes another that came before it, but for those preempted, which go to the front.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from batchllm.errors import ConfigError
from batchllm.sim.kv_pool import Columns, Outcome, StepCount, StepRecorder
from batchllm.sim.lru_tree import LruTree
from batchllm.sim.workload import SimWorkload
from batchllm.tokens import Int64Array, page_ceil, page_floor

_MAX_RUNNING = 256
_WATERMARK = 0.01


class VllmScheduler:
    """Runs a workload to its end.

    Arguments are those of `simulate`, and rows in the order of their arrival; ``max_running`` None: 256.
    """

    def __init__(
        self,
        workload: SimWorkload,
        tree: LruTree,
        recorder: StepRecorder,
        arrival: Int64Array,
        *,
        chunk_tokens: int,
        max_running: int | None,
    ) -> None:
        self._tree = tree
        self._recorder = recorder
        self._chunk_tokens = chunk_tokens
        self._max_running = _MAX_RUNNING if max_running is None else max_running
        self._watermark = int(_WATERMARK * recorder.kv_capacity_tokens)
        self._columns = Columns.of(workload)
        longest = int((self._columns.prompt_len + self._columns.max_new_len).max(initial=0)) + tree.page_size
        if longest > recorder.kv_capacity_tokens - self._watermark:
            raise ConfigError(f"a request needs up to {longest} KV tokens of {recorder.kv_capacity_tokens}")
        if chunk_tokens < tree.page_size:
            raise ConfigError(f"chunk_tokens {chunk_tokens} is smaller than a block of {tree.page_size}")
        self._waiting = deque(arrival.tolist())
        self._decoding: list[int] = []  # in order of admission
        self._prefilling: list[int] = []
        # Of those that prefill: tokens passed, those of them that were cached at the start, and all there are.
        self._progress: dict[int, tuple[int, int, int]] = {}
        self._fresh: set[int] = set()  # nodes allocated in this step, not to be read yet

    def run(self) -> Outcome:
        """To the end."""
        while self._waiting or self._decoding or self._prefilling:
            self._step()
        return Outcome(self._recorder, self._columns)

    def _step(self) -> None:
        self._fresh.clear()
        count = StepCount()
        num_preempted = self._make_room()
        rows = np.array(self._decoding, np.int64)
        kv_len = self._columns.kv_len
        for row in rows[kv_len[rows] % self._tree.page_size == 0].tolist():
            self._tree.grow(self._tree.leaf(row), self._tree.page_size)
        kv_len[rows] += 1
        count.decode(kv_len[rows])
        budget = self._chunk_tokens - len(rows)
        ended: list[int] = []
        for row in list(self._prefilling):
            budget -= self._compute(row, budget, count, ended)
        if not num_preempted:
            self._admit(budget, count, ended)
        self._recorder.record(
            count.work(),
            num_running=len(self._decoding) + len(self._prefilling) + len(ended),
            num_waiting=len(self._waiting),
            kv_pinned_tokens=self._tree.num_locked_shared,
            kv_private_tokens=self._tree.num_locked_private,
            num_retracted=num_preempted,
        )
        self._columns.num_generated[rows] += 1
        for row in ended:
            self._columns.num_generated[row] += 1
        ended, self._decoding = self._columns.finish_ended(self._decoding + ended)
        for row in ended:
            self._release(row)

    def _admit(self, budget: int, count: StepCount, ended: list[int]) -> None:
        tree = self._tree
        while self._waiting and len(self._decoding) + len(self._prefilling) + len(ended) < self._max_running:
            row = self._waiting[0]
            prefill_len = self._columns.prefill_len(row)
            num_slots = page_ceil(prefill_len, tree.page_size)
            if tree.num_available - num_slots < self._watermark or budget < min(prefill_len, tree.page_size):
                return
            self._waiting.popleft()
            cached_len = tree.cached_len(row, prefill_len, self._fresh)
            tree.lock(row)
            for node in tree.path(row):
                if missing := tree.missing(node):
                    tree.grow(node, missing)
                    self._fresh.add(node)
                num_slots -= tree.have(node)
            tree.grow(tree.leaf(row), num_slots - tree.have(tree.leaf(row)))
            self._columns.kv_len[row] = 0
            self._progress[row] = (0, cached_len, prefill_len)
            self._prefilling.append(row)
            budget -= self._compute(row, budget, count, ended)

    def _compute(self, row: int, budget: int, count: StepCount, ended: list[int]) -> int:
        """Pass the next tokens of a prompt; returns what it takes of the budget."""
        passed, cached_len, prefill_len = self._progress[row]
        num_tokens = prefill_len - passed
        if num_tokens > budget:
            num_tokens = page_floor(max(budget, 0), self._tree.page_size)
        if num_tokens == 0:
            return 0
        after = passed + num_tokens
        # A chunk that is cached to its end computes one token all the same.
        begin = max(passed, min(cached_len, after - 1))
        is_end = after == prefill_len
        count.prefill(begin, after - begin, is_end=is_end)
        self._columns.count_computed(row, begin, after)
        self._columns.kv_len[row] = after
        self._progress[row] = (after, cached_len, prefill_len)
        if is_end:
            del self._progress[row]
            self._prefilling.remove(row)
            ended.append(row)
        return num_tokens

    def _make_room(self) -> int:
        """Preempt until decoding rows find their blocks; returns how many were."""
        num_preempted = 0
        page_size = self._tree.page_size
        while True:
            num_full = sum(int(self._columns.kv_len[row]) % page_size == 0 for row in self._decoding)
            if num_full * page_size <= self._tree.num_available:
                return num_preempted
            row = self._prefilling.pop() if self._prefilling else self._decoding.pop()
            self._progress.pop(row, None)
            self._release(row)
            self._waiting.appendleft(row)
            num_preempted += 1

    def _release(self, row: int) -> None:
        """Its whole blocks stay cached until they are evicted; the last one, if not full, is free."""
        leaf = self._tree.leaf(row)
        shared_len = sum(self._tree.have(node) for node in self._tree.path(row))
        whole = page_floor(int(self._columns.kv_len[row]), self._tree.page_size) - shared_len
        self._tree.shrink(leaf, self._tree.have(leaf) - max(whole, 0))
        self._tree.unlock(row)
