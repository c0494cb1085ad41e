"""One real engine for all tests of this folder: it takes half a minute to start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from batchllm import BatchEngine

KV_POOL = 1500


@pytest.fixture(scope="session")
def engine() -> Iterator[BatchEngine]:
    """The embedded model on a small KV pool, SGLang's strict memory checks on, prompts cut at 256 tokens."""
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    with BatchEngine(max_total_tokens=KV_POOL, chunked_prefill_size=256, random_seed=7) as engine:
        yield engine
