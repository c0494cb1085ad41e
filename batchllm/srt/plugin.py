"""Entry point ``sglang.srt.plugins``: registration only, inert until asked for by name. Runs wherever SGLang loads its
plugins.

With it the stock launcher takes ``--radix-cache-backend batchllm`` as well.
"""

from __future__ import annotations


def register() -> None:
    """Called by SGLang in its main and scheduler processes."""
    from batchllm.srt.mem_cache import radix_cache

    radix_cache.register()
