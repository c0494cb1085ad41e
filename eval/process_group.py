"""Ends a process and all that it started, leaving nothing in shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

import psutil

_TRACKER_TIMEOUT_S = 10


def end(leader: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group (``start_new_session=True``), and the group.

    But for the resource trackers of `multiprocessing`: once those whom they serve are gone they remove the semaphores
    of these, and end by themselves.
    """
    group = [process for process in psutil.process_iter() if _group_of(process) == leader.pid]
    trackers = []
    for process in group:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            if "multiprocessing.resource_tracker" in " ".join(process.cmdline()):
                trackers.append(process)
            else:
                process.kill()
    leader.wait()
    psutil.wait_procs(trackers, timeout=_TRACKER_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(leader.pid, signal.SIGKILL)


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None
