"""What a batch shares, decided before anything runs: prompts in, a frozen `BatchPlan` out.

Knows: token ids, namespaces, pages. Must not know: text, engines, KV slots, time, torch, sglang.
Invariant: a plan is exact, validated and deterministic, and attains the optimum it states.
"""

from batchllm.planner.explain import PlanSummary, PrefixSummary, explain, largest_prefixes
from batchllm.planner.group_cut import GroupCut, exact_cut, greedy_cut
from batchllm.planner.group_order import DEFAULT_GROUP_ORDER, GROUP_ORDERS, GroupOrder, order_groups
from batchllm.planner.partition import Partition, cut_in_ranges, expected_work, partition, request_work
from batchllm.planner.plan import BatchPlan
from batchllm.planner.planner import plan_batch

__all__ = [
    "DEFAULT_GROUP_ORDER",
    "GROUP_ORDERS",
    "BatchPlan",
    "GroupCut",
    "GroupOrder",
    "Partition",
    "PlanSummary",
    "PrefixSummary",
    "cut_in_ranges",
    "exact_cut",
    "expected_work",
    "explain",
    "greedy_cut",
    "largest_prefixes",
    "order_groups",
    "partition",
    "plan_batch",
    "request_work",
]
