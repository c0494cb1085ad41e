"""The KV pool of latent attention on a CPU. Runs in the scheduler's process. (Upstream: ``srt/mem_cache``.)"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool


class LatentKVPool(MLATokenToKVPool):
    """SGLang's own, which it makes for other platforms than its own with an argument that it does not take."""

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
