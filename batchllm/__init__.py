"""Very large batches of LLM prompts on SGLang: every shared prefix planned, computed once, pinned while
needed.

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm.engine import BatchEngine, batch_generate
    from batchllm.errors import BatchLLMError
    from batchllm.planner import BatchPlan, plan_batch
    from batchllm.request import Completion, Request, SamplingParams, TokenLogprob

__version__ = "0.1.0"

__all__ = [
    "BatchEngine",
    "BatchLLMError",
    "BatchPlan",
    "Completion",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "batch_generate",
    "plan_batch",
]

_LAZY = {
    "BatchEngine": "batchllm.engine",
    "batch_generate": "batchllm.engine",
    "BatchLLMError": "batchllm.errors",
    "BatchPlan": "batchllm.planner",
    "plan_batch": "batchllm.planner",
    "Completion": "batchllm.request",
    "Request": "batchllm.request",
    "SamplingParams": "batchllm.request",
    "TokenLogprob": "batchllm.request",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
