"""KV: slots, the radix tree, pins, and who reads what. (Upstream: ``srt/mem_cache``.)"""
