"""The references compute on one thread: workers of a test run share the processors, and torch's threads would spin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.levels import num_threads


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tests of more threads set their own number."""
    with num_threads(1):
        yield
