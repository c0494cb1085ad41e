"""Processes for tests, forked from one that has imported the command: seconds faster than a fresh interpreter.

    process = forked.Process("tests.cli.instant_engine:main", ["run", "-i", "in.jsonl"], environment=...)

A forked process has what a fresh one has: an environment, folder and streams of its own, signals, and the end of an
interpreter. What it does not show is that an interpreter which starts from nothing imports all it needs, and that
nothing hangs on the seed of its hashes.

Where `needs_mounts`, the process may mount file systems, which nobody outside sees; those that it forks see them too.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[1]
_MAX_LEN = 1 << 17
_HOST = "FORKED_HOST"
"""Environment variable: where the host of a forked process listens."""

_IMPORTED = ("batchllm.cli.run", "batchllm.cli.outcome", "tests.cli.instant_engine", "tests.server.instant_server")


class Process:
    """A process that calls a function, and ends with what it returns as its status.

    Args:
        function: As ``module:function``.
        arguments: Its only argument.
        environment: All environment variables; None for those of this process.
        cwd: The folder that it begins in; None for that of this process.
        stdin, stdout, stderr: Open files; None for those of this process.
        needs_mounts: It will mount file systems.
        needs_sglang: It is forked from a process that has imported SGLang, as the server does first of all.

    Attributes:
        pid: Of the process.
        returncode: As `subprocess` has it; None while it runs, or has not been asked for its end.
    """

    def __init__(
        self,
        function: str,
        arguments: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdin: IO[Any] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        needs_mounts: bool = False,
        needs_sglang: bool = False,
    ) -> None:
        request = json.dumps(
            {
                "function": function,
                "arguments": [str(argument) for argument in arguments],
                "environment": dict(os.environ if environment is None else environment),
                "cwd": str(cwd or Path.cwd()),
            }
        ).encode()
        assert len(request) < _MAX_LEN
        self.returncode: int | None = None
        self._host = None if _HOST in os.environ else _Host.of(needs_mounts, needs_sglang)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(os.environ[_HOST] if self._host is None else self._host.path)
        fds = [number if stream is None else stream.fileno() for number, stream in enumerate((stdin, stdout, stderr))]
        socket.send_fds(self._socket, [request], fds)
        self.pid = self._hear()

    def _hear(self) -> int:
        """The next number that the host tells."""
        told = self._socket.recv(_MAX_LEN)
        assert told, "the host has ended" if self._host is None else self._host.log
        return int(told)

    def poll(self) -> int | None:
        """Its status; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its status, once it has ended."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._hear()
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    function: str, arguments: Sequence[str], *, input: bytes = b"", timeout: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Calls a function in a process of its own, as ``subprocess.run(..., capture_output=True)`` runs a program."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(input)
        stdin.seek(0)
        process = Process(function, arguments, stdin=stdin, stdout=stdout, stderr=stderr, **options)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        told = []
        for file in (stdout, stderr):
            file.seek(0)
            told.append(file.read().decode())
    return subprocess.CompletedProcess([function, *arguments], process.wait(), *told)


class _Host:
    """A process that has imported, and forks; it ends with this one.

    Attributes:
        path: Where it listens.
    """

    def __init__(self, needs_mounts: bool, needs_sglang: bool) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-", dir="/tmp")  # paths of sockets must be short
        self.path = os.path.join(self._folder.name, "socket")
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
            open(os.path.join(self._folder.name, "log"), "wb") as log,
        ):
            listener.bind(self.path)
            listener.listen(16)
            program = f"from tests import forked; forked.main({listener.fileno()}, {self.path!r}, {needs_sglang})"
            self._process = subprocess.Popen(
                [*(_mounting() if needs_mounts else []), sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                cwd=ROOT,
            )
        atexit.register(self._close)

    @property
    def log(self) -> str:
        """What it has said."""
        return Path(self._folder.name, "log").read_text()

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    @staticmethod
    @cache
    def of(needs_mounts: bool, needs_sglang: bool) -> _Host:
        """The one of this process."""
        return _Host(needs_mounts, needs_sglang)


def _mounting() -> list[str]:
    """What lets a command mount file systems."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0:
        return ["unshare", "-rm"]
    if os.geteuid() == 0:
        return ["unshare", "-m"]
    pytest.fail("this machine lets nobody but root mount file systems (`unshare -rm` is refused): run this as root")


def main(listener_fd: int, path: str, has_sglang: bool) -> None:
    """Fork for whoever asks, until standard input is closed."""
    listener = socket.socket(fileno=listener_fd)
    if has_sglang:
        _import_sglang()
    else:
        _import_all()
    gc.freeze()  # what there is now stays, and need not be looked through at the end of each process
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                return
            if key.fileobj is not listener:
                pidfd = key.fd
                pid, asker = running.pop(pidfd)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                selector.unregister(pidfd)
                os.close(pidfd)
                _tell(asker, status)
                asker.close()
                continue
            asker, _ = listener.accept()
            request, fds, _, _ = socket.recv_fds(asker, _MAX_LEN, 3)
            pid = os.fork()
            if pid == 0:
                for socket_ in (listener, asker, *(other for _, other in running.values())):
                    socket_.close()
                for pidfd in running:
                    os.close(pidfd)
                selector.close()
                raise SystemExit(_become(fds, path, **json.loads(request))())
            for fd in fds:
                os.close(fd)
            _tell(asker, pid)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, asker
            selector.register(pidfd, selectors.EVENT_READ)


def _tell(asker: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # who has gone
        asker.send(str(number).encode())


def _become(
    fds: list[int], path: str, *, function: str, arguments: list[str], environment: dict[str, str], cwd: str
) -> Callable[[], Any]:
    """Make this process the one that was asked for; returns what it does."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment | {_HOST: path})
    tempfile.tempdir = None
    module, _, name = function.partition(":")
    return lambda: getattr(importlib.import_module(module), name)(arguments)


def _import_sglang() -> None:
    """As ``batchllm serve`` does before anything else."""
    from batchllm.srt.platforms import host_imports

    host_imports.prepare_environment()
    host_imports.import_all()
    assert threading.active_count() == 1, threading.enumerate()


def _import_all() -> None:
    """And have a job planned, for the machine code of the planner."""
    for name in _IMPORTED:
        importlib.import_module(name)
    from tests.cli import instant_engine, jobs

    with tempfile.TemporaryDirectory() as name:
        source = jobs.write_rows(Path(name, "in.jsonl"), jobs.rows_of(30))
        status = instant_engine.main(["run", "-i", str(source), "-o", os.path.join(name, "out.jsonl")])
    assert status == 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert threading.active_count() == 1, threading.enumerate()
