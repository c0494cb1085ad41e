"""A first-come-first-served scheduler over an LRU radix tree, as SGLang runs offline batches: a baseline.

What makes it what it is: prefill goes before decode and they do not mix; a prompt is matched when it is admitted and
its KV enters the tree when its pass is over, so siblings admitted in one pass all compute their prefix; a request is
admitted if its longest output fits beside a share of what those running may still generate, a share that falls while
nothing goes wrong; where slots run out, those that have generated least are retracted to the end of the queue. (With
more than 128 requests waiting SGLang's longest-prefix order is first come first served too.)

Knows: counts of slots. Must not know: plans' orders, pins.
Invariant: the tree and what requests hold outside it are never more than the pool.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from batchllm.errors import ConfigError
from batchllm.sim.kv_pool import Columns, Outcome, StepCount, StepRecorder
from batchllm.sim.lru_tree import LruTree
from batchllm.sim.workload import SimWorkload
from batchllm.tokens import Int64Array

_MAX_RUNNING = 4096
_MAX_PREFILL_TOKENS = 16384
_MAX_NEW_CLIP = 4096
_INITIAL_RATIO, _LEAST_RATIO, _DECAY_STEPS = 0.7, 0.098, 600
_STEPS_AFTER_RETRACTION = 20


class SglangScheduler:
    """Runs a workload to its end.

    Arguments are those of `simulate`, and rows in the order of their arrival; ``max_running`` None: 4096.
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
        self._columns = Columns.of(workload)
        longest = int((self._columns.prompt_len + self._columns.max_new_len).max(initial=0)) + tree.page_size
        if longest >= recorder.kv_capacity_tokens:
            raise ConfigError(f"a request needs up to {longest} KV tokens of {recorder.kv_capacity_tokens}")
        if chunk_tokens < tree.page_size:
            raise ConfigError(f"chunk_tokens {chunk_tokens} is smaller than a page of {tree.page_size}")
        self._waiting = deque(arrival.tolist())
        self._decoding: list[int] = []
        self._in_pieces: int | None = None
        self._ratio = _INITIAL_RATIO
        self._num_loose = 0  # slots of prompts computed in this pass, not yet in the tree

    def run(self) -> Outcome:
        """To the end."""
        while self._waiting or self._decoding or self._in_pieces is not None:
            if not self._prefill():
                self._decode()
        return Outcome(self._recorder, self._columns)

    # Prefill

    def _prefill(self) -> bool:
        """One pass of prompts, if any can be had."""
        count = StepCount()
        passed: list[tuple[int, int, int]] = []  # row, and the tokens [before, after) computed
        num_left = self._chunk_tokens
        room = self._tree.num_available - self._expected_growth()
        if self._in_pieces is not None:
            row = self._in_pieces
            before = int(self._columns.kv_len[row])
            num_tokens = min(self._columns.prefill_len(row) - before, num_left, self._tree.num_available)
            if num_tokens:
                num_left -= num_tokens
                room -= num_tokens + self._longest_output(row)
                passed.append((row, before, before + num_tokens))
                self._take(num_tokens)
        num_input = _MAX_PREFILL_TOKENS
        while self._waiting and num_left > 0 and num_input > 0:
            if len(self._decoding) + len(passed) >= self._max_running:
                break
            row = self._waiting[0]
            prefill_len = self._columns.prefill_len(row)
            before = self._tree.cached_len(row, prefill_len)
            was_available = self._tree.num_available
            self._tree.lock(row)
            locked = was_available - self._tree.num_available
            needed = prefill_len - before + self._longest_output(row)
            if needed + self._tree.page_size >= room - locked:
                self._tree.unlock(row)
                break
            num_tokens = min(prefill_len - before, num_left)
            self._waiting.popleft()
            self._take(num_tokens)
            room -= locked + needed
            num_left -= num_tokens
            num_input -= num_tokens
            passed.append((row, before, before + num_tokens))
        if not passed:
            return False
        self._run_pass(passed, count)
        return True

    def _run_pass(self, passed: list[tuple[int, int, int]], count: StepCount) -> None:
        self._in_pieces = None
        for row, before, after in passed:
            is_end = after == self._columns.prefill_len(row)
            count.prefill(before, after - before, is_end=is_end)
            self._columns.count_computed(row, before, after)
            self._columns.kv_len[row] = after
            if not is_end:
                self._in_pieces = row
        self._record(count, num_running=len(self._decoding) + len(passed))
        for row, before, after in passed:
            self._insert(row, before, after)
            if row != self._in_pieces:
                self._columns.num_generated[row] += 1
                self._decoding.append(row)
        self._finish_ended()

    def _insert(self, row: int, before: int, after: int) -> None:
        """What a pass has computed enters the tree; what a sibling has inserted already is given back."""
        tree = self._tree
        self._give_back(after - before)
        start = 0
        for node in tree.path(row):
            num_had = tree.have(node)
            end = start + num_had + tree.missing(node)
            if start + num_had < min(after, end):
                tree.grow(node, min(after, end) - start - num_had)
            start = end
        leaf = tree.leaf(row)
        if after - start > tree.have(leaf):
            tree.grow(leaf, after - start - tree.have(leaf))

    # Decode

    def _decode(self) -> None:
        num_retracted = 0
        while len(self._decoding) > self._tree.num_available:
            self._retract()
            num_retracted += 1
        if num_retracted:
            generated = int(self._columns.num_generated[self._decoding].sum())
            expected = generated + _STEPS_AFTER_RETRACTION * len(self._decoding)
            self._ratio = min(1.0, expected / (int(self._columns.max_new_len[self._decoding].sum()) + 1))
        else:
            self._ratio = max(self._ratio - (_INITIAL_RATIO - _LEAST_RATIO) / _DECAY_STEPS, _LEAST_RATIO)
        if not self._decoding:
            return
        count = StepCount()
        rows = np.array(self._decoding, np.int64)
        for row in self._decoding:
            self._tree.grow(self._tree.leaf(row), 1)
        self._columns.kv_len[rows] += 1
        count.decode(self._columns.kv_len[rows])
        self._record(count, num_running=len(rows), num_retracted=num_retracted)
        self._columns.num_generated[rows] += 1
        self._finish_ended()

    def _finish_ended(self) -> None:
        ended, self._decoding = self._columns.finish_ended(self._decoding)
        for row in ended:
            self._tree.unlock(row)

    def _retract(self) -> None:
        """The one that has generated least loses what it generated; its prompt stays cached until it is evicted."""
        columns = self._columns
        row = min(self._decoding, key=lambda r: (columns.num_generated[r], -columns.prompt_len[r]))
        self._decoding.remove(row)
        leaf = self._tree.leaf(row)
        shared_len = sum(self._tree.have(node) for node in self._tree.path(row))
        private_len = int(columns.prompt_len[row]) - shared_len
        self._tree.shrink(leaf, max(self._tree.have(leaf) - max(private_len, 0), 0))
        self._tree.unlock(row)
        columns.kv_len[row] = 0
        self._waiting.append(row)

    # Counting

    def _take(self, num_slots: int) -> None:
        self._tree.take(num_slots)
        self._num_loose += num_slots

    def _give_back(self, num_slots: int) -> None:
        self._tree.num_free += num_slots
        self._num_loose -= num_slots

    def _longest_output(self, row: int) -> int:
        left = int(self._columns.max_new_len[row] - self._columns.num_generated[row])
        return min(left, _MAX_NEW_CLIP)

    def _expected_growth(self) -> int:
        rows = np.array(self._decoding, np.int64)
        left = np.minimum(self._columns.max_new_len[rows] - self._columns.num_generated[rows], _MAX_NEW_CLIP)
        return int(left.sum() * self._ratio)

    def _record(self, count: StepCount, *, num_running: int, num_retracted: int = 0) -> None:
        self._recorder.record(
            count.work(),
            num_running=num_running,
            num_waiting=len(self._waiting),
            kv_pinned_tokens=self._tree.num_locked_shared,
            kv_private_tokens=self._tree.num_locked_private + self._num_loose,
            num_retracted=num_retracted,
        )
