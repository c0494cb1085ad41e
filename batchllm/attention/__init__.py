"""Attention over shared prefixes: who reads which KV in one step, and what the result must be.

Knows: a step's sequences, their lengths, the planned prefixes they share, rows of the request-to-token table, KV by
slot. Must not know: prompts, requests, schedules, engines, who allocates slots.
Invariant: every query token sees each position up to its own exactly once, in one of its segments or its private
part; with how many others it shares a segment changes what is read, never the result.
"""

from batchllm.attention.layout import AttentionLayout, PrefixPaths, check_layout, plan_layout

__all__ = ["AttentionLayout", "PrefixPaths", "check_layout", "plan_layout"]
