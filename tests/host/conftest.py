"""The engine of `tests/srt`, for claims about its processes."""

from tests.srt.conftest import engine

__all__ = ["engine"]
