"""What every process of an engine does first. Runs in each of them. (Upstream: ``srt/utils/common.py``.)"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path

from tqdm import tqdm

from batchllm.host.logs import ERRORS_FD_VARIABLE, FOLDER_VARIABLE

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def begin(name: str) -> None:
    """End with the parent, however it ends, leave Ctrl-C and SIGTERM to it, and print where `batchllm.host.logs` says.

    Upstream asks the kernel to be told of the parent's death, but says nothing of a parent that died before, while this
    process was importing: nobody would ever end it.

    Args:
        name: What to call the process where its errors are shown.

    Raises:
        SystemExit: The parent is gone.
    """
    reset_signals()
    # A progress bar (of loading weights) would make a lock for several processes: a semaphore in shared memory, which
    # stays there if this process is killed.
    tqdm.set_lock(threading.RLock())
    redirect(name)
    parent = multiprocessing.parent_process()
    end_with_parent(os.getppid() if parent is None or parent.pid is None else parent.pid)


def end_with_parent(parent_pid: int) -> None:
    """End with SIGKILL when the parent ends, or rather the thread of it that started this process.

    Raises:
        SystemExit: It has ended already.
    """
    _set_death_signal(signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit("the process that started this one has ended")


def outlive_parent() -> None:
    """Take `end_with_parent` back."""
    _set_death_signal(0)


def _set_death_signal(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def reset_signals() -> None:
    """Take back what the process that this one was forked from does on signals.

    Ctrl-C in a terminal, the terminal's end, and the SIGTERM of ``timeout``, systemd or Slurm reach all processes of a
    job; the driver decides what still runs.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def redirect(name: str) -> None:
    """Print to the log of this name from now on, where there are logs; what is logged as an error is shown too."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        return
    log = os.open(Path(folder, f"{name}.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    errors_fd = int(os.environ[ERRORS_FD_VARIABLE])
    for logger, level in (("sglang", logging.ERROR), ("batchllm", logging.WARNING)):
        # Upstream's set-up replaces the root's handlers and leaves these.
        _show_errors(logging.getLogger(logger), name, errors_fd, level)


def _show_errors(logger: logging.Logger, name: str, fd: int, level: int) -> None:
    for handler in [handler for handler in logger.handlers if isinstance(handler, _ErrorsHandler)]:
        logger.removeHandler(handler)
    handler = _ErrorsHandler(fd)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    logger.addHandler(handler)


class _ErrorsHandler(logging.Handler):
    """Writes records to a file descriptor, if it is there: a process that was spawned, not forked, does not have it."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._fd, f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except OSError:  # closed, or a full disk: the log has it too
            self.handleError(record)
