"""What the page shows beside the records: how the engine is doing.

Knows counts; not who counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batchllm.offline.stats import JobStats
from batchllm.trace.latency import LiveLatency
from batchllm.trace.steps import StepArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNumbers:
    """Numbers of the engine and of all that runs on it.

    Attributes:
        job_stats: What all rows of all batches have cost since the server was started.
        steps: The last steps, ``start_s`` on the monotonic clock. `STEP_DTYPE` ``[num_steps]``.
        latency: What live requests wait.
        kv_limit_tokens: Slots of the KV pool that may be used.
    """

    job_stats: Callable[[], JobStats]
    steps: Callable[[], StepArray]
    latency: LiveLatency
    kv_limit_tokens: int
