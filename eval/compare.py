"""Runs ``measure.py`` in processes of its own, one engine after the other in turn, and makes tables of the results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_MEASURE = Path(__file__).with_name("measure.py")
_ROOT = Path(__file__).parents[1]
Result = dict[str, Any]


def measure(engine: str, workloads: list[str], *flags: str, python: str = sys.executable) -> list[Result]:
    """Results of one process, one per workload and repetition.

    Args:
        engine: Of ``measure.py``.
        workloads: Expressions.
        flags: Of ``measure.py``.
        python: The interpreter that has the engine.

    Raises:
        RuntimeError: The process failed; its last words are in the message.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:  # SGLang leaves sockets and folders of its own there
        done = subprocess.run(
            [python, "-W", "ignore", str(_MEASURE), engine, *workloads, *flags],
            capture_output=True,
            text=True,
            env=environment | {"TMPDIR": folder},
        )
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        raise RuntimeError(f"{engine} {workloads} {flags}: {done.stderr[-2000:]}")
    return results


def median(results: list[Result], field: str) -> float:
    return statistics.median(result[field] for result in results)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """As Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _origin() -> str:
    """Where figures come from: the command, the commit, the day, the machine."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0], _ROOT), *sys.argv[1:]])
    git = ["git", "-C", str(_ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "batchllm"], capture_output=True).returncode
    state = f"commit {commit}{', with changes of its own' if changes else ''}"
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    return f"`{command}`, {state}, {datetime.date.today()}, {machine}."


def write(path: str | None, title: str, text: str, results: list[Result]) -> None:
    """Print the tables; with a path, write them there, and every single result beside them as JSON lines."""
    print(text)
    if path is not None:
        Path(path).write_text(f"# {title}\n\n{_origin()}\n\n{text}\n")
        Path(path).with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
