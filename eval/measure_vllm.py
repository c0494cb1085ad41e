"""vLLM's CPU engine for ``measure.py``, in the environment that ``eval/setup_vllm`` makes.

One process, eager, greedy, at most 256 sequences at a time. Knows nothing of batchllm, which is not installed there.
Prompt tokens computed are prompt tokens less ``num_cached_tokens``; what is computed again after a preemption
(``num_retractions``) is not in them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workloads import Workload

_BLOCK_SIZE = 32  # the smallest this engine takes
_MAX_MODEL_LEN = 2048  # longer than any request of the benchmarks; it refuses longer ones


def environment(prefix: Path) -> dict[str, str]:
    """Variables of a process of its own: quiet, bound to no core.

    Args:
        prefix: Of the virtual environment.
    """
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the pool is set in blocks
    }
    openmp = prefix / "lib" / "libiomp5.so"
    if openmp.exists():  # faster than GNU's, which torch loads otherwise
        variables["LD_PRELOAD"] = str(openmp)
    return variables


def ensure_environment() -> None:
    """Starts this process anew, once: what stands in the environment here is read before Python code runs."""
    wanted = dict(os.environ) | environment(Path(sys.prefix)) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def load(model: str, server_args: dict[str, Any]) -> Any:
    """vLLM's ``LLM``, with the pool, chunk and data type that SGLang would have.

    Args:
        model: Folder.
        server_args: SGLang's; what else is there goes to vLLM as it is.
    """
    from vllm import LLM

    options = {name: value for name, value in server_args.items() if name not in ("log_level", "random_seed")}
    options["num_gpu_blocks_override"] = options.pop("max_total_tokens") // _BLOCK_SIZE + 1  # one stays empty
    options["max_num_batched_tokens"] = options.pop("chunked_prefill_size")
    defaults = {
        "block_size": _BLOCK_SIZE,
        "max_model_len": _MAX_MODEL_LEN,
        "max_num_seqs": 256,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "disable_log_stats": False,  # counts preemptions
        "seed": 0,
    }
    return LLM(model, **(defaults | options))


def start(model: str, policy: str, server_args: dict[str, Any]) -> tuple[Callable[..., Any], Callable[[], None]]:
    """Starts the engine.

    Args:
        model: Folder.
        policy: ``given``, or ``sorted``: prompts in lexicographic order. The scheduler is first come, first served.
        server_args: As in `load`.

    Returns:
        What runs a workload, and what stops the engine.
    """
    from vllm import SamplingParams

    llm = load(model, server_args)

    def run(workload: Workload) -> tuple[list[Any], dict[str, Any]]:
        prompts = workload.prompts
        order = list(range(len(prompts)))
        if policy == "sorted":
            order.sort(key=prompts.__getitem__)
        llm.reset_prefix_cache()
        num_preemptions = _num_preemptions(llm)
        outputs = llm.generate(
            [{"prompt_token_ids": prompts[i]} for i in order],
            [
                SamplingParams(temperature=0, max_tokens=workload.output_lens[i], ignore_eos=True, detokenize=False)
                for i in order
            ],
            use_tqdm=False,
        )
        by_row = dict(zip(order, outputs, strict=True))
        return [by_row[row].outputs[0].token_ids for row in range(len(prompts))], {
            "num_computed_prompt_tokens": sum(map(len, prompts)) - sum(o.num_cached_tokens for o in outputs),
            "num_retractions": _num_preemptions(llm) - num_preemptions,
        }

    return run, llm.llm_engine.engine_core.shutdown


def _num_preemptions(llm: Any) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
