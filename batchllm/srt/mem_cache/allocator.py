"""KV slots on CPU. Runs in the scheduler's process. (Upstream: ``srt/mem_cache/allocator/token.py``.)

SGLang asks an out-of-tree platform for a *paged* allocator, which launches Triton kernels to allocate and
sorts to free. On CPU the page is one token, and upstream's token allocator would do, but each of its frees
copies the whole free list. This one keeps the free slots as a stack in one buffer: taking and giving back
cost what is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from batchllm.errors import ConfigError


class CpuTokenAllocator(TokenToKVPoolAllocator):
    """Free slots are ``_stack[:_num_free]``; the next to be taken are at its end."""

    def __init__(self, size: int, *, page_size: int, **kwargs: Any) -> None:
        if page_size != 1:
            raise ConfigError(f"--page-size {page_size}: on CPU only --page-size 1 is supported")
        super().__init__(size, **kwargs)

    def clear(self) -> None:
        super().clear()
        # Slot 0 is upstream's: padded tokens write there.
        self._stack = torch.arange(self.size, 0, -1, dtype=torch.int64)
        self._num_free = self.size

    @property
    def free_pages(self) -> torch.Tensor:
        """The free slots, in the order in which they will be taken. Upstream's checks read it."""
        return self._stack[: self._num_free].flip(0)

    @free_pages.setter
    def free_pages(self, value: torch.Tensor | None) -> None:
        """Upstream's constructor assigns it; the stack is set up in `clear`."""

    def available_size(self) -> int:
        return self._num_free

    def alloc(self, need_size: int) -> torch.Tensor | None:
        if need_size > self._num_free:
            return None
        self._num_free -= need_size
        return self._stack[self._num_free : self._num_free + need_size].flip(0)

    def free(self, free_index: torch.Tensor) -> None:
        num_freed = free_index.numel()
        if num_freed == 0:
            return
        if not self.is_not_in_free_group:
            self.free_group.append(free_index)
            return
        end = self._num_free + num_freed
        if end > self.size:
            raise RuntimeError(f"{end} free KV slots of {self.size}: some were freed twice")
        self._stack[self._num_free : end] = free_index
        self._num_free = end
