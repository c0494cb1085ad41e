"""The scheduler's process: what it is started with, and where our parts are put in it. (Upstream:
``srt/managers/scheduler.py``.)
"""

from __future__ import annotations

import logging
import os
from typing import Any

import sglang.srt.managers.scheduler as upstream

from batchllm.srt import compat
from batchllm.srt.distributed import cpu_ranks
from batchllm.srt.entrypoints import child_process
from batchllm.srt.layers import attention_backend, cpu_ops, long_rope, sampler
from batchllm.srt.lora import cpu_lora
from batchllm.srt.managers.prefill_pass import PlannedPrefillAdder
from batchllm.srt.managers.scheduler import BatchScheduler
from batchllm.srt.mem_cache import radix_cache
from batchllm.srt.model_loader import filled_parameters
from batchllm.srt.server_args import ATTENTION_BACKEND


class OfflineBatchScheduler(BatchScheduler):
    """Without a server beside it: nobody reads the load snapshots that each prefill step would write."""

    num_live_adapters = 0

    def init_ipc_channels(self, port_args: Any) -> None:
        super().init_ipc_channels(port_args)
        writer = self.load_snapshot_writer
        if writer is not None:
            self.load_snapshot_writer = None
            writer.close()
            os.unlink(writer.path)


def run_server_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process of a server, like `run_scheduler_process`."""
    child_process.begin("scheduler")
    install(server_args, BatchScheduler)
    upstream.run_scheduler_process(server_args, *args, **kwargs)


def run_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process of an offline engine: install our parts, then run SGLang's own
    function.
    """
    child_process.begin("scheduler")
    install(server_args, OfflineBatchScheduler)
    upstream.run_scheduler_process(server_args, *args, **kwargs)


def install(server_args: Any, scheduler_class: type[BatchScheduler] = BatchScheduler) -> None:
    """Put our parts where SGLang's scheduler process looks for them, and verify the ground they stand on."""
    compat.check_once()
    # What we warn of is rare and worth a line, whatever level SGLang's own many lines have.
    level = logging.getLevelNamesMapping().get(server_args.log_level.upper(), logging.WARNING)
    logging.getLogger("batchllm").setLevel(min(logging.WARNING, level))
    if server_args.shares_attention:
        attention_backend.register()
        cpu_ops.install()
    elif server_args.attention_backend == ATTENTION_BACKEND:
        from batchllm.srt.layers import gpu_attention_backend  # Triton's kernels, which a CPU has no use for

        gpu_attention_backend.register()
    if server_args.enable_lora and server_args.device == "cpu":
        cpu_lora.install()
    if server_args.tp_size > 1 and server_args.device == "cpu":
        cpu_ranks.install(server_args)
    filled_parameters.install()
    long_rope.install(server_args.context_length)
    radix_cache.register()
    sampler.install()
    upstream.Scheduler = scheduler_class
    upstream.PrefillAdder = PlannedPrefillAdder
