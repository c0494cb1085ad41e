"""What a process has from its user."""

from __future__ import annotations

import os

_OF_THE_TESTS = ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
WITHOUT_STREAMS = ("sh", "-c", 'exec "$0" "$@" <&- >&-')
"""In front of a command: nobody gives it anything to read, or listens to it; standard error stays."""


def of_user() -> dict[str, str]:
    """The environment variables of this process, but for those that tests are run with."""
    return {name: value for name, value in os.environ.items() if name not in _OF_THE_TESTS}
