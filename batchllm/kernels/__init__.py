"""Compiled kernels, and what loads them.

Knows: memory, numbers and instruction sets. Must not know: models, plans, requests, engines.
Invariant: where a kernel cannot be had, the loader says why, and nothing else changes.
"""
