"""When tokens of live requests come, for `LiveLatency`. Runs in the server's process. (Upstream:
``TokenizerManager.collect_metrics``, which is for Prometheus, and counts answers in one piece too.)

INVARIANT: only streamed requests are counted: of the others the first that is heard is a piece or the whole answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from batchllm.trace.latency import LiveLatency


def observe(latency: LiveLatency, output: Any, states: Mapping[str, Any]) -> None:
    """Count the tokens of an output that has come, before SGLang handles it.

    Args:
        latency: Counts them.
        output: One of SGLang's batch outputs.
        states: SGLang's states of the requests that run, by id.
    """
    num_tokens = getattr(output, "completion_tokens", None)
    if not num_tokens:  # of embeddings
        return
    now, now_s = time.perf_counter(), time.monotonic()  # SGLang's clock of requests, and ours
    for rid, num in zip(output.rids, num_tokens, strict=True):
        state = states.get(rid)
        if state is None or not num or not getattr(state.obj, "stream", False):
            continue
        # Not a field of SGLang's: it goes when the state goes, however the request ends.
        last, num_before = getattr(state, "batchllm_last_tokens", (None, 0))
        if last is None:
            latency.first_token.add(now - state.time_stats.created_time, now_s=now_s)
        elif num > num_before:
            latency.between_tokens.add((now - last) / (num - num_before), now_s=now_s, count=num - num_before)
        state.batchllm_last_tokens = (now, num)
