"""SGLang on any x86 or Arm CPU, without ``sgl_kernel``. Runs in every process that imports SGLang.

SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) needs a CPU build of ``sgl_kernel`` that PyPI does not
have. An out-of-tree platform (entry point group ``sglang.srt.platforms``) needs nothing but torch: native
operators, the ``torch_native`` attention backend, plain KV pools.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from batchllm.srt.platforms.cpu_environment import set_environment_defaults

OVERLAP_VARIABLE = "BATCHLLM_CPU_OVERLAP"
"""Environment variable: if set, steps overlap with scheduling as on a GPU, which is slower here. For tests: what is
scheduled, and what is known when, is the same."""


def activate() -> str | None:
    """Entry point: the platform's qualified name, or None where an accelerator is present.

    SGLang asks every installed platform; answering on a GPU machine would take the GPU away from it.
    """
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    set_environment_defaults()
    return f"{CpuPlatform.__module__}.{CpuPlatform.__qualname__}"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU as an out-of-tree platform."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        # SGLang has set intel_amx by now where the user named no backend; it needs sgl_kernel.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        # Streams are dummies on CPU: overlap buys nothing and computes one token too many per request.
        if not os.environ.get(OVERLAP_VARIABLE):
            server_args.disable_overlap_schedule = True
        if server_args.enable_torch_compile:
            os.environ["TORCHDYNAMO_DISABLE"] = "0"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from batchllm.srt.mem_cache.latent_pool import LatentKVPool

        return LatentKVPool

    def get_paged_allocator_cls(self) -> type:
        from batchllm.srt.mem_cache.allocator import CpuTokenAllocator

        return CpuTokenAllocator

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        return torch.profiler.ProfilerActivity.CPU

    def get_dispatch_key_name(self) -> str:
        return "native"
