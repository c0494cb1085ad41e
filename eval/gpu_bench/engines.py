"""Engines as child processes, and a deadline that none of them outlives."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eval import process_group

Result = dict[str, Any]


class OutOfTimeError(Exception):
    """What was asked for would not end before the deadline, or did not."""


class Deadline:
    """The end of a part.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def check(self, seconds_needed: float, what: str) -> None:
        """Raises:
        OutOfTimeError: There is less time left than that.
        """
        if self.seconds_left < seconds_needed:
            raise OutOfTimeError(f"{what}: needs about {seconds_needed:.0f} s, {self.seconds_left:.0f} s are left")


class EngineFailedError(Exception):
    """An engine did not start, or ended; the end of its log is in the message."""


class EngineProcess:
    """One engine, started when entered and gone when left.

    Args:
        kind: ``ours`` or ``stock``.
        server_args: As of SGLang's ``Engine``.
        log: File for everything it prints.
        deadline: Starting and running end by then.
        environment: Further variables of its environment.

    Raises:
        EngineFailedError: It does not start; or later, it ended.
        OutOfTimeError: It has not started, or not answered, by the deadline.
    """

    def __init__(
        self,
        kind: str,
        server_args: dict[str, Any],
        log: Path,
        deadline: Deadline,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", "eval.gpu_bench.engine_process", kind, json.dumps(server_args)]
        self._log, self._deadline, self._environment = log, deadline, os.environ | (environment or {})
        self._name = f"{kind} {server_args.get('attention_backend', '')}".strip()
        self.start_s = 0.0

    def __enter__(self) -> Self:
        started = time.monotonic()
        # SGLang leaves sockets and folders of its own there.
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-bench-")
        with self._log.open("ab") as log:
            # A group of its own: what it leaves behind can be ended with it.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment | {"TMPDIR": self._folder.name},
                start_new_session=True,
            )
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        self.start_s = time.monotonic() - started
        return self

    def run(self, **command: Any) -> Result:
        """What `engine_process` says of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Result:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(self._deadline.seconds_left, 0.0)):
                raise OutOfTimeError(f"{self._name} has not answered by the deadline, see {self._log}")
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailedError(f"{self._name} ended, see {self._log}: ...{_end_of(self._log)}")
        result: Result = json.loads(line)
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Ask it to end; whatever of its group is left after half a minute is ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=30)
        finally:
            process_group.end(self._process)
            self._process.stdout.close()
            self._folder.cleanup()


class Engines(contextlib.ExitStack):
    """Engines by name, each started when it is first asked for, all ended when left.

    Args:
        at_once: Whether all of them fit on the card; if not, one ends before another starts.
    """

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self._at_once = at_once
        self._running: dict[str, EngineProcess] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._running

    def get(self, name: str, make: Callable[[], EngineProcess]) -> EngineProcess:
        """The engine of that name, started if it is not there."""
        if name not in self._running:
            if not self._at_once:
                self.end_all()
            self._running[name] = self.enter_context(make())
        return self._running[name]

    def end_all(self) -> None:
        """End those that are there."""
        self._running.clear()
        self.close()


def _end_of(path: Path, num_characters: int = 1500) -> str:
    return path.read_text(errors="replace")[-num_characters:].strip()
