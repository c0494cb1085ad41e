"""The paper's method as it was released, in counts (BatchLLM, arXiv 2412.03594, section 4): a rival on equal terms.

Prompts are grouped at one level; a group's prefix is a request of its own that samples nothing, and stays pinned until
the group's last member has ended. A step takes decoding rows, then members whose prefix is there, then the next
prefixes; groups with fewest tokens to prefill come first. A prompt is admitted when it fits what is free, whatever will
be generated; where slots run out, the request admitted last is preempted, to be computed again.

The paper does not say what happens when pinned prefixes leave no room for any member. Here the prefix opened last,
none of whose members runs, is then given up, to be computed again.

Knows: groups, in counts. Must not know: levels, learned lengths.
Invariant: a member runs only while its prefix is there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from batchllm.errors import ConfigError
from batchllm.planner import BatchPlan, exact_cut, greedy_cut
from batchllm.sim.kv_pool import Columns, Outcome, StepCount, StepRecorder
from batchllm.sim.workload import SimWorkload

_MAX_RUNNING = 256 + 100
_WATERMARK = 0.01


@dataclass(slots=True)
class _Group:
    """Members by position; a prompt alone is a group without prefix."""

    prefix_len: int
    members: list[int]
    num_left: int
    num_computed: int = 0  # tokens of the prefix that are there
    num_running: int = 0
    num_decoding: int = 0


def _groups(plan: BatchPlan, *, is_exact_cut: bool) -> list[_Group]:
    """Groups in the paper's order: fewest tokens to prefill first."""
    cut = exact_cut(plan) if is_exact_cut else greedy_cut(plan)
    members: dict[int, list[int]] = {}
    for position, prefix_id in enumerate(cut.request_group.tolist()):
        members.setdefault(prefix_id if prefix_id >= 0 else -1 - position, []).append(position)
    groups, ranks = [], []
    for prefix_id, positions in members.items():
        prefix_len = int(plan.end_len[prefix_id]) if prefix_id >= 0 else 0
        groups.append(_Group(prefix_len, positions, len(positions)))
        ranks.append(prefix_len + int((plan.prompt_lens[positions] - prefix_len).sum()))
    return [groups[i] for i in np.argsort(ranks, kind="stable").tolist()]


class OneLevelScheduler:
    """Runs a plan's groups to their end.

    Arguments are those of `simulate`; ``max_running`` None: 256 + 100, as released.
    """

    def __init__(
        self,
        workload: SimWorkload,
        plan: BatchPlan,
        recorder: StepRecorder,
        *,
        chunk_tokens: int,
        max_running: int | None,
        is_exact_cut: bool,
        shares_reads: bool,
    ) -> None:
        self._recorder = recorder
        self._chunk_tokens = chunk_tokens
        self._max_running = _MAX_RUNNING if max_running is None else max_running
        self._shares_reads = shares_reads
        self._watermark = int(_WATERMARK * recorder.kv_capacity_tokens)
        self._columns = Columns.of(workload, plan.order)
        longest = int((self._columns.prompt_len + self._columns.max_new_len).max(initial=0))
        if longest > recorder.kv_capacity_tokens - self._watermark:
            raise ConfigError(f"a request needs up to {longest} KV tokens of {recorder.kv_capacity_tokens}")
        self._next_groups = deque(_groups(plan, is_exact_cut=is_exact_cut))
        self._num_behind = plan.num_requests  # members of groups that are not open
        self._opening: deque[_Group] = deque()  # their prefixes are being computed
        self._open: list[_Group] = []
        self._group_of: dict[int, _Group] = {}
        self._ready: deque[int] = deque()
        self._decoding: list[int] = []
        self._in_pieces: list[int] = []
        self._num_pinned = 0
        self._num_private = 0
        self._cached_len: dict[int, int] = {}
        self._num_preempted = 0  # since the last step that computed anything

    def run(self) -> Outcome:
        """To the end."""
        while self._next_groups or self._opening or self._ready or self._decoding or self._in_pieces:
            self._step()
        if self._num_private or self._num_pinned:
            raise RuntimeError(f"{self._num_private} private and {self._num_pinned} pinned slots are left at the end")
        return Outcome(self._recorder, self._columns)

    @property
    def _num_free(self) -> int:
        return self._recorder.kv_capacity_tokens - self._num_pinned - self._num_private

    @property
    def _num_running(self) -> int:
        return len(self._decoding) + len(self._in_pieces)

    def _step(self) -> None:
        count = StepCount()
        has_room = self._num_free >= len(self._decoding)
        while self._num_free < len(self._decoding):
            self._preempt()
        rows = np.array(self._decoding, np.int64)
        self._num_private += len(rows)
        self._columns.kv_len[rows] += 1
        count.decode(self._columns.kv_len[rows])
        if self._shares_reads:
            count.num_saved_reads = sum(max(g.num_decoding - 1, 0) * g.prefix_len for g in self._open)
        budget = self._chunk_tokens - len(rows)
        ended: list[int] = []
        complete: list[_Group] = []
        if has_room:
            budget = self._compute_members(budget, count, ended)
            self._compute_prefixes(budget, count, ended, complete)
        if not count.num_prefill_tokens and not len(rows):
            if has_room:
                self._give_up_a_prefix()
            return
        self._recorder.record(
            count.work(),
            num_running=self._num_running + len(ended),
            num_waiting=len(self._ready) + self._num_behind,
            kv_pinned_tokens=self._num_pinned,
            kv_private_tokens=self._num_private,
            num_open_prefixes=len(self._open) + len(self._opening),
            num_retracted=self._num_preempted,
        )
        self._num_preempted = 0
        for group in complete:
            self._make_ready(group)
        self._columns.num_generated[rows] += 1
        for row in ended:
            self._columns.num_generated[row] += 1
            self._group_of[row].num_decoding += 1
        ended, self._decoding = self._columns.finish_ended(self._decoding + ended)
        for row in ended:
            self._finish(row)

    def _compute_members(self, budget: int, count: StepCount, ended: list[int]) -> int:
        for row in list(self._in_pieces):
            budget -= self._compute(row, budget, count, ended)
        while self._ready and budget > 0 and self._num_running + len(ended) < self._max_running:
            row = self._ready[0]
            group = self._group_of[row]
            prefill_len = self._columns.prefill_len(row)
            # Slots of a prompt are taken whole, as its first chunk runs.
            cached_len = min(group.prefix_len, prefill_len - 1)
            if self._num_free - (prefill_len - cached_len) < self._watermark:
                break
            self._ready.popleft()
            self._cached_len[row] = cached_len
            group.num_running += 1
            self._num_private += prefill_len - cached_len
            self._columns.kv_len[row] = cached_len
            self._in_pieces.append(row)
            budget -= self._compute(row, budget, count, ended)
        return budget

    def _make_ready(self, group: _Group) -> None:
        self._opening.remove(group)
        self._open.append(group)
        self._ready += group.members
        self._num_behind -= len(group.members)

    def _compute_prefixes(self, budget: int, count: StepCount, ended: list[int], complete: list[_Group]) -> None:
        """Open the next groups, unless members are left that find no room."""
        while budget > 0:
            group = next((group for group in self._opening if group not in complete), None)
            if group is None:
                if self._ready or self._num_running >= self._max_running or not self._open_next():
                    return
                continue
            if not group.prefix_len:
                self._make_ready(group)
                budget = self._compute_members(budget, count, ended)
                continue
            num_tokens = min(group.prefix_len - group.num_computed, budget)
            count.prefill(group.num_computed, num_tokens, is_end=False)
            self._columns.num_computed += num_tokens
            group.num_computed += num_tokens
            budget -= num_tokens
            if group.num_computed == group.prefix_len:
                complete.append(group)

    def _open_next(self) -> bool:
        if not self._next_groups or self._num_free - self._next_groups[0].prefix_len < self._watermark:
            return False
        group = self._next_groups.popleft()
        self._num_pinned += group.prefix_len
        self._group_of.update(dict.fromkeys(group.members, group))
        self._opening.append(group)
        return True

    def _compute(self, row: int, budget: int, count: StepCount, ended: list[int]) -> int:
        before = int(self._columns.kv_len[row])
        num_tokens = min(self._columns.prefill_len(row) - before, budget)
        if num_tokens <= 0:
            return 0
        after = before + num_tokens
        is_end = after == self._columns.prefill_len(row)
        count.prefill(before, num_tokens, is_end=is_end)
        self._columns.count_computed(row, before, after)
        self._columns.kv_len[row] = after
        if is_end:
            self._in_pieces.remove(row)
            ended.append(row)
        return num_tokens

    def _slots_of(self, row: int) -> int:
        """Slots that a running member owns: those behind what it found of its prefix when it was let in."""
        num_tokens = max(
            int(self._columns.kv_len[row]), self._columns.prefill_len(row) if row in self._in_pieces else 0
        )
        return num_tokens - self._cached_len[row]

    def _preempt(self) -> None:
        self._num_preempted += 1
        row = self._in_pieces[-1] if self._in_pieces else self._decoding[-1]
        group = self._group_of[row]
        self._num_private -= self._slots_of(row)
        if row in self._in_pieces:
            self._in_pieces.remove(row)
        else:
            self._decoding.remove(row)
            group.num_decoding -= 1
        group.num_running -= 1
        self._columns.kv_len[row] = 0
        self._ready.appendleft(row)

    def _finish(self, row: int) -> None:
        self._num_private -= self._slots_of(row)
        group = self._group_of.pop(row)
        del self._cached_len[row]
        group.num_running -= 1
        group.num_decoding -= 1
        group.num_left -= 1
        if group.num_left == 0:
            self._open.remove(group)
            self._num_pinned -= group.prefix_len

    def _give_up_a_prefix(self) -> None:
        head = self._group_of[self._ready[0]] if self._ready else None
        group = next((g for g in [*self._opening, *self._open[::-1]] if g is not head and not g.num_running), None)
        if group is None:
            raise RuntimeError("nothing runs and nothing fits")
        self._num_pinned -= group.prefix_len
        group.num_computed = 0
        if group in self._opening:
            self._opening.remove(group)
        else:
            self._open.remove(group)
            waiting = set(group.members)
            group.members = [row for row in self._ready if row in waiting]
            self._num_behind += len(group.members)
            self._ready = deque(row for row in self._ready if row not in waiting)
        self._next_groups.appendleft(group)
