"""Several ranks of an engine on one CPU, over gloo. Runs in the scheduler's processes. (Upstream:
``srt/distributed/parallel_state.py``.)

Ranks take the same decisions, each for itself, from the same messages in the same steps: nothing that a rank decides by
depends on a clock, or on anything else that another may see otherwise.
"""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.distributed import parallel_state
from sglang.srt.layers import sampler

_NO_DEVICE = {"use_pynccl": False, "use_custom_allreduce": False, "use_message_queue_broadcaster": False}
"""What upstream would set up beside gloo: NCCL and kernels of its own, by calls of CUDA, and a ring of shared memory,
which nobody needs and which stays behind when a rank is killed."""


def install(server_args: Any) -> None:
    """Prepare this process for its group; before SGLang makes it.

    Args:
        server_args: SGLang's, of more than one rank on a CPU.
    """
    upstream = parallel_state.init_model_parallel_group
    parallel_state.init_model_parallel_group = lambda *args, **kwargs: upstream(*args, **kwargs | _NO_DEVICE)
    # Logits are gathered, and ranks sample from the same; were one token another, ranks would wait for each other
    # forever. A comparison costs nothing beside the sums of each layer.
    sampler.SYNC_TOKEN_IDS_ACROSS_TP = True
    # Read by kernels that we do not have; without it upstream wants a NUMA node for each rank.
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(["0"] * server_args.tp_size))
    if server_args.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
