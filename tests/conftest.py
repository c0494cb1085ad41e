"""What tests of engines share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from batchllm.host import template


@pytest.fixture(scope="session")
def engines() -> Iterator[None]:
    """Engines of tests are forked from one import of SGLang, with its strict memory checks on."""
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    with template.held(is_verbose=False):
        yield
