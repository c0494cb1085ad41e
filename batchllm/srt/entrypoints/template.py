"""The process that imports SGLang, and that engines are forked from. (The other side: `batchllm.host.template`.)

It has one thread, and computes nothing: a fork copies memory, but no other thread, no OpenMP team and no CUDA context.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
from typing import Any

import setproctitle

from batchllm.srt.platforms import host_imports

_LOOK_EVERY_S = 0.5


def main(fd: int, driver_pid: int) -> None:
    """Import, then fork an engine's process whenever the driver asks for one; end with the driver.

    Args:
        fd: A socket to the driver. A byte and a file descriptor, of a connection to the driver, ask for an engine.
        driver_pid: The process that started this one.
    """
    # They reach all processes of a job; the driver decides.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _end_with(driver_pid)
    host_imports.prepare_environment()
    host_imports.import_all()
    setproctitle.setproctitle("batchllm::template")
    signal.setitimer(signal.ITIMER_REAL, 0)
    _serve(socket.socket(fileno=fd))


def _serve(driver: socket.socket) -> None:
    from batchllm.srt.entrypoints import engine_host
    from batchllm.srt.platforms.fork_safety import process_state

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for an engine's process to end
    while True:
        message, fds, _, _ = socket.recv_fds(driver, 1, 1)
        if not message:
            return
        parent_pid = os.getpid()
        if process_state() is not None:
            parent_pid = os.getppid()
        elif os.fork():
            os.close(fds[0])
            continue
        # A fork; or this process itself, where a fork would be broken: the next engine then gets a template of its own.
        driver.close()
        engine_host.main(fds[0], parent_pid)
        _exit()


def _exit() -> None:
    """End without taking apart what was imported: that takes a second, and copies all the memory that is shared."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # where no log can be written any more, nobody can be told so
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _end_with(driver_pid: int) -> None:
    """End when the driver does, also while this process is importing and listens to nobody."""

    def look(signum: int, frame: Any) -> None:
        if os.getppid() != driver_pid:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_EVERY_S, _LOOK_EVERY_S)
