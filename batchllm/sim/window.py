"""The window of planned requests: those that were submitted and do not run yet.

Knows: a plan, in counts, and what its requests look like to the policy. Must not know: tokens, steps, time.
Invariant: the window is in plan order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

import numpy as np

from batchllm.planner import BatchPlan
from batchllm.planner.planner import RunCutter
from batchllm.prefix_cache import PinLedger
from batchllm.scheduler.feed_window import Feed
from batchllm.scheduler.output_length import EstimateColumns, OutputEstimate, OutputLengths, draws
from batchllm.tokens import Int64Array

_plan_order = attrgetter("plan_order")


class PlannedRequest:
    """A request of the plan as the policy sees it while it waits (`scheduler.WaitingRequest`), and its prefixes.

    Attributes:
        shared_len: Tokens of KV that it reads from planned prefixes while it runs.
        led: Planned prefixes that it still computes, outermost first.
        pinned_ids: Planned prefixes that it reads while it runs.
    """

    __slots__ = (
        "_share_len",
        "is_ready",
        "led",
        "lora_id",
        "num_generated",
        "output",
        "pinned_ids",
        "plan_order",
        "prefix_id",
        "prompt_len",
        "shared_len",
        "total_len",
    )

    def __init__(
        self, position: int, prefix_id: int, prompt_len: int, output: OutputEstimate, share_len: int | None = None
    ) -> None:
        self.plan_order = (0, position)
        self.prefix_id = prefix_id
        self.prompt_len = prompt_len
        # The last token is never stored.
        self.total_len = prompt_len + output.max_new_len - 1
        self.output = output
        self._share_len = share_len if share_len is not None and share_len < prompt_len else None
        self.num_generated = 0
        self.is_ready = True
        self.lora_id: str | None = None  # which adapter answers changes nothing here
        self.shared_len = 0
        self.led: list[int] = []
        self.pinned_ids: list[int] = []

    @property
    def position(self) -> int:
        """Where it is in the plan."""
        return self.plan_order[1]

    @property
    def prefill_len(self) -> int:
        """Tokens it must have KV for before it decodes."""
        return self.prompt_len + self.num_generated

    @property
    def share_len(self) -> int:
        """Tokens at its start that it may share: all, or those before its scores."""
        return self.prefill_len if self._share_len is None else self._share_len


class PlanWindow:
    """Walks the plan and keeps requests coming.

    Args:
        plan: The plan of the rows.
        cutter: Knows limits, lengths and tasks of the rows.
        feed: Says what comes next.

    Attributes:
        ledger: Told of each prefix when its first consumer comes.
        lengths: Knows kinds of requests.
        waiting: What has come and has not been admitted.
        kind: Kind of each position's output, once it has come, int64[num_requests].
    """

    def __init__(self, plan: BatchPlan, cutter: RunCutter, feed: Feed) -> None:
        self._plan = plan
        self._cutter = cutter
        self._feed = feed
        self.ledger = PinLedger()
        self.lengths = OutputLengths()
        self.waiting: list[PlannedRequest] = []
        self.kind = np.zeros(plan.num_requests, np.int64)

    def estimates(self, positions: Int64Array) -> EstimateColumns:
        """What is known of the output lengths of some that have come."""
        max_new_len = self._cutter.max_new_len[positions].astype(np.int64)
        known_len = np.minimum(self._cutter.known_len[positions], max_new_len)
        return EstimateColumns(max_new_len, known_len, self.kind[positions], draws(positions))

    @property
    def longest_total_len(self) -> int:
        """Most KV slots that any request of the plan may occupy."""
        if not self._plan.num_requests:
            return 0
        return int((self._cutter.prompt_len + self._cutter.max_new_len).max()) - 1

    @property
    def is_done(self) -> bool:
        """Everything has been submitted and has finished."""
        return self._feed.is_done

    def refill(self) -> bool:
        """Take in more of the plan, if enough of the window is free. Returns whether any came."""
        positions = self._feed.take_next()
        if positions is not None:
            self._take_in(*positions)
        return positions is not None

    def start(self, request: PlannedRequest) -> None:
        """It has been admitted."""
        index = bisect_left(self.waiting, request.plan_order, key=_plan_order)
        assert self.waiting[index] is request
        del self.waiting[index]

    def put_back(self, request: PlannedRequest) -> None:
        """It has lost its KV and waits again, in its place."""
        insort(self.waiting, request, key=_plan_order)

    def finish(self, position: int) -> None:
        """It has ended."""
        self._feed.finish([position])

    def _take_in(self, first: int, last: int) -> None:
        plan, cutter = self._plan, self._cutter
        first_prefix, last_prefix = np.searchsorted(plan.first, [first, last]).tolist()
        for prefix_id in range(first_prefix, last_prefix):
            self.ledger.add(
                prefix_id,
                parent_id=int(plan.parent[prefix_id]),
                start_len=int(plan.start_len[prefix_id]),
                end_len=int(plan.end_len[prefix_id]),
                num_consumers=int(plan.num_consumers[prefix_id]),
                longest_consumer_len=int(cutter.longest_consumer_len[prefix_id]) - 1,
                end_order=(0, int(plan.first[prefix_id] + plan.num_consumers[prefix_id])),
            )
        for position in range(first, last):
            task = int(cutter.task[position])
            self.kind[position] = self.lengths.kind(task) if task >= 0 else 0
            output = OutputEstimate(
                max_new_len=int(cutter.max_new_len[position]),
                known_len=int(cutter.known_len[position]),
                kind=int(self.kind[position]),
                position=position,
            )
            request = PlannedRequest(
                position,
                int(plan.request_prefix[position]),
                int(cutter.prompt_len[position]),
                output,
                int(plan.shareable_lens[position]),
            )
            self.waiting.append(request)
