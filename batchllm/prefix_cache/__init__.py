"""Which planned prefixes have their KV in the cache, and who still needs them. Pure: no torch, no sglang."""

from batchllm.prefix_cache.pin_ledger import PinLedger, PrefixState

__all__ = ["PinLedger", "PrefixState"]
