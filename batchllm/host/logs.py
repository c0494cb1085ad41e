"""What the processes of an engine print: in files of their own, shown where one fails.

INVARIANT: a run that succeeds shows none of it. Errors that are logged are shown at once
(`batchllm.srt.entrypoints.child_process`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

FOLDER_VARIABLE = "BATCHLLM_LOG_FOLDER"
"""Environment variable of an engine's processes: the folder of their logs; unset where they print to standard error."""
ERRORS_FD_VARIABLE = "BATCHLLM_ERRORS_FD"
"""Environment variable of an engine's processes: the file descriptor where logged errors are shown."""
TEMPLATE, ENGINE = "template", "engine"
"""Names of the logs of the process that engines are forked from, and of the one that hosts an engine."""
_WAITING = (TEMPLATE, ENGINE)
_MAX_LINES = 60
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)|AssertionError)\b.*")


class EngineLogs:
    """The logs of one template and its engines.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Log of the processes of this name."""
        return self.folder / f"{name}.log"

    def show(self) -> None:
        """Print the end of every log to standard error, each line behind the name of its process; forget it."""
        for path in sorted(self.folder.glob("*.log")):
            lines = _take_lines(path)
            for line in lines[-_MAX_LINES:]:
                print(f"{path.stem}: {line}", file=sys.stderr)

    def cause(self) -> str | None:
        """What the processes ended with, as Python words it; None where none says.

        Those that compute know better than the one that waited for them.
        """
        found = None
        for path in sorted(self.folder.glob("*.log"), key=lambda path: path.stem not in _WAITING):
            for line in path.read_text(errors="replace").splitlines():
                if _EXCEPTION.match(line):
                    found = line.strip()
        return found


def _take_lines(path: Path) -> list[str]:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    os.truncate(path, 0)
    return lines
