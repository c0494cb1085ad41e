"""How large the tests are that try many cases: small enough to wait for, or in full with ``pytest --thorough``."""

from __future__ import annotations

import os

THOROUGH_VARIABLE = "BATCHLLM_THOROUGH_TESTS"
"""Environment variable: "1" for full sizes. ``--thorough`` sets it before tests are collected."""


def sized(usual: int, thorough: int) -> int:
    """The number of cases to try: ``usual``, or ``thorough`` where full sizes are asked for."""
    return thorough if os.environ.get(THOROUGH_VARIABLE) == "1" else usual
