"""The right to write in a folder.

Knows the file of the lock and who holds it; not what else is in the folder.

INVARIANT: at most one process holds a folder's lock, and the kernel gives it back when that process ends, however.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from batchllm.errors import ConfigError

_NAME = "journal.lock"
_WAIT_S = 0.5
"""`lock_holder` holds the lock for some milliseconds, which must not turn a writer away."""


class FolderLock:
    """The right to write in a folder, until `release` or the end of the process.

    Args:
        folder: The folder.
        owner: Name of the folder's owner in messages, such as "the job".

    Raises:
        ConfigError: Another process has it, or the folder cannot be written.
    """

    NAME = _NAME

    def __init__(self, folder: Path, owner: str) -> None:
        self._path = folder / _NAME
        self._owner = owner
        deadline = time.monotonic() + _WAIT_S
        while not self._try_lock():
            if time.monotonic() >= deadline:
                pid = _pid_in(self._path)
                raise ConfigError(f"{folder}: process {pid} is running {owner} in this folder already")
            time.sleep(0.02)
        os.ftruncate(self._fd, 0)
        # Informative only: on a full disk the lock holds without it.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, b"%d" % os.getpid(), 0)

    def _try_lock(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}; {self._owner}'s folder must be writable") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that was deleted while we opened it locks nothing.
            if file_identity(self._path) == _identity(os.fstat(fd)):
                self._fd = fd
                return True
        except BlockingIOError:
            pass
        os.close(fd)
        return False

    def delete(self) -> None:
        """Delete the file of the lock, while it is held."""
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let others have it. Releasing twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_holder(folder: Path, stack: contextlib.ExitStack) -> int | None:
    """The process that has the lock of a folder, 0 where that is not known; None if none has, and then none gets it
    before the stack unwinds.
    """
    try:
        fd = os.open(folder / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a copy without the lock's file, or one that others may not read
        return None
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid_in(folder / _NAME)
    return None


def file_identity(path: Path) -> tuple[int, int] | None:
    """What stays the same as long as a name means the same file; None if there is no such file."""
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _pid_in(path: Path) -> int:
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):  # it has just been locked or deleted
        return 0
