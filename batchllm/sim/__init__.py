"""A whole run in seconds: the real scheduling code on a KV pool of counts, with a cost model for a clock.

Knows: plans, policies, ledgers, counts, simulated seconds. Must not know: torch, sglang, files, engines.
Invariant: everything is deterministic, and ours decides with the very code that the runtime decides with.
"""

from batchllm.sim.result import SimResult
from batchllm.sim.simulate import SCHEDULERS, SchedulerName, least_work, simulate
from batchllm.sim.workload import OutputDraw, SimWorkload, shared, snippet, unshared
from batchllm.sim.workload_spec import WORKLOAD_KINDS, parse_workload

__all__ = [
    "SCHEDULERS",
    "WORKLOAD_KINDS",
    "OutputDraw",
    "SchedulerName",
    "SimResult",
    "SimWorkload",
    "least_work",
    "parse_workload",
    "shared",
    "simulate",
    "snippet",
    "unshared",
]
