"""One real engine for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchllm import BatchEngine

KV_POOL = 1500


@pytest.fixture(scope="session")
def engine(engines: None) -> Iterator[BatchEngine]:
    """The embedded model on a small KV pool, SGLang's strict memory checks on, prompts cut at 256 tokens."""
    with BatchEngine(max_total_tokens=KV_POOL, chunked_prefill_size=256, random_seed=7) as engine:
        yield engine
