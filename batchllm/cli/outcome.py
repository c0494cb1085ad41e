"""How a command ends: exit statuses, and failed rows in words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from batchllm.dataset import BadRow
from batchllm.errors import ConfigError

EXIT_OK = 0
"""Every row was answered."""
EXIT_ROWS_FAILED = 1
"""Some rows failed; each has its error record."""
EXIT_CANNOT_RUN = 2
"""The job could not run, or not to its end; what it has done is kept."""
EXIT_STOPPED = 3
"""A signal has stopped the job; the same command goes on with it."""

EXIT_STATUSES = (
    "Exit status: 0 every row was answered, 1 some rows failed, 2 the job could not run or not to its end, "
    "3 stopped by Ctrl-C, SIGTERM or SIGHUP; after 2 and 3 the same command goes on where it ended."
)
_NUM_SHOWN = 5

DEMO_MODEL = "no {flag} MODEL: the answers are a random model's, for trying out (--demo-model: say nothing)"


def say(text: str) -> None:
    """Print on standard error, each line marked as ours: messages of libraries may have several."""
    for line in filter(str.strip, text.splitlines()):
        show(f"batchllm: {line}")


def show(text: str) -> None:
    """Print on standard error, if it can be written; if it cannot, what has been done stands all the same."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def say_failed(bad: Sequence[BadRow], num_failed: int) -> None:
    """The first few failed rows in words, and how many more there are."""
    shown = sorted(bad, key=lambda row: row.index)[:_NUM_SHOWN]
    for row in shown:
        say(f"line {row.line}: {row.message}")
    if num_failed > len(shown):
        say(f"{num_failed - len(shown)} more rows failed; see their error records")


def refuse(server_flags: list[str], command: str) -> None:
    """Flags that nobody takes.

    Raises:
        ConfigError: There are some.
    """
    if server_flags:
        raise ConfigError(f"{server_flags[0]}: `batchllm {command}` has no such flag")
