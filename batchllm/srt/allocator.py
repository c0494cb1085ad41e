"""KV slots on CPU: SGLang's token allocator under the signature that it gives an out-of-tree platform.

SGLang asks such a platform for a *paged* allocator, which launches Triton kernels to allocate and sorts to free. On
CPU the page is one token, so the plain token allocator does.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from batchllm.errors import ConfigError


class CpuTokenAllocator(TokenToKVPoolAllocator):
    """`TokenToKVPoolAllocator` that takes ``page_size`` and accepts only 1."""

    def __init__(self, size: int, *, page_size: int, **kwargs: Any) -> None:
        if page_size != 1:
            raise ConfigError(f"--page-size {page_size}: on CPU only --page-size 1 is supported")
        super().__init__(size, **kwargs)
