"""What a batch shares, decided before anything runs: prompts in, a frozen `BatchPlan` out.

Knows: token ids, namespaces, pages. Must not know: text, engines, KV slots, time, torch, sglang.
Invariant: a plan is exact, validated and deterministic, and attains the optimum it states.
"""

from batchllm.planner.explain import PlanSummary, PrefixSummary, explain
from batchllm.planner.group_cut import GroupCut, exact_cut, greedy_cut
from batchllm.planner.plan import BatchPlan
from batchllm.planner.planner import plan_batch

__all__ = [
    "BatchPlan",
    "GroupCut",
    "PlanSummary",
    "PrefixSummary",
    "exact_cut",
    "explain",
    "greedy_cut",
    "plan_batch",
]
