"""Engines that answer at once, in real Ray actors, for tests of what stands between a job and several engines.

Knows the seam of the runtime and the name of the function that a replica starts; claims nothing. Each engine writes
what it is asked for into a file of its own, and does what `Deeds` say.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchllm.offline.fake_runtime import FakeJob, FakeRequest
from batchllm.offline.runtime import RunRequests
from tests.cli.instant_engine import InstantRuntime, Settings

_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Deeds:
    """What engines do.

    Attributes:
        folder: Where each writes what it is asked for.
        dies_after: Answers after which an engine is killed, while there are fewer than ``num_deaths``.
        num_deaths: Engines that are killed so.
        poison: Last token of a prompt that kills each engine it is submitted to; -1 for none.
        delay_s: Seconds before each few answers.
        fails: Engines that do not start: "all", "late" for all but the first, or "" for none; "never" for all, which
            do not say so.
    """

    folder: str
    dies_after: int = 0
    num_deaths: int = 0
    poison: int = -1
    delay_s: float = 0.0
    fails: str = ""


class NotedRuntime(InstantRuntime):
    """An engine in a process of its own, which may end."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        self._file = Path(deeds.folder) / f"engine-{os.getpid()}"
        super().__init__(Settings(batch=_BATCH, delay_s=deeds.delay_s))

    def _log(self, lines: list[Any]) -> None:
        with self._file.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)

    def submit(self, job_id: int, requests: RunRequests) -> None:
        super().submit(job_id, requests)
        if self._deeds.poison in [request.prompt[-1] for request in self.jobs[job_id].outstanding.values()]:
            self._die("poison")

    def choose(self, job: FakeJob) -> list[FakeRequest]:
        is_due = self.num_answered >= self._deeds.dies_after
        if is_due and num_of(Path(self._deeds.folder), "killed") < self._deeds.num_deaths:
            self._die("killed")
        return super().choose(job)

    def _die(self, why: str) -> None:
        (Path(self._deeds.folder) / f"{why}-{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # for the signal


def start(deeds: Deeds, model: str | None, **options: Any) -> NotedRuntime:
    """What stands in for ``batchllm.cli.replicas.start_engine``."""
    from batchllm.errors import EngineError

    if deeds.fails == "never":
        threading.Event().wait()  # for nothing
    if deeds.fails == "all" or (deeds.fails == "late" and not _is_first(Path(deeds.folder))):
        raise EngineError("there is no such device")
    return NotedRuntime(deeds)


def _is_first(folder: Path) -> bool:
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def asked_for(folder: Path) -> list[Counter[str]]:
    """Of each engine how often it was asked for each last token; ``start`` is counted too."""
    return [Counter(path.read_text().splitlines()) for path in sorted(folder.glob("engine-*"))]


def num_of(folder: Path, why: str) -> int:
    """Engines that ended so."""
    return len(list(folder.glob(f"{why}-*")))


def main(arguments: list[str]) -> int:
    """The command on such engines, in a process of its own; the first argument is the folder."""
    from batchllm.cli import command, replicas

    folder, delay_s, *rest = arguments
    replicas.start_engine = partial(start, Deeds(folder=folder, delay_s=float(delay_s)))  # type: ignore[assignment]
    return command(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
