"""Temporary folders that carry the number of the process they belong to, so that others know when it is gone.

Knows: their names, and how long the name of a socket may be. Must not know what is in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

import psutil

LOADS_PREFIX = "sglang_loads_"
"""Begins the names of SGLang's files in shared memory; the name of a folder of ours follows."""
SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "batchllm-"
_SHORT_FOLDER = "/tmp"
_LONGEST_NAME = "/batchllm-4194304-12345678"
_MAX_SOCKET_LEN = 107  # sys/un.h


def make_folder(socket_len: int) -> str:
    """Make a folder of this process, among temporary files if the names of sockets are short enough there.

    Args:
        socket_len: Longest name of a socket in it, bytes from the folder's name on.
    """
    return tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_parent(socket_len))


def _parent(socket_len: int) -> str:
    folder = tempfile.gettempdir()
    is_short = len(os.fsencode(folder)) + len(_LONGEST_NAME) + socket_len <= _MAX_SOCKET_LEN
    return folder if is_short else _SHORT_FOLDER


def remove_files_of_the_dead() -> None:
    """Remove what is left of engines whose process was killed before it could remove its own."""
    folders = {tempfile.gettempdir(), _SHORT_FOLDER}
    for path in (
        *(path for folder in folders for path in Path(folder).glob(f"{_PREFIX}*-*")),
        *SHARED_MEMORY.glob(f"{LOADS_PREFIX}{_PREFIX}*-*"),
    ):
        pid = path.name.removeprefix(LOADS_PREFIX).removeprefix(_PREFIX).partition("-")[0]
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(OSError):  # another engine that starts does the same, or it is not ours to remove
            status = path.lstat()
            if status.st_uid != os.getuid():
                continue
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path)
            else:
                path.unlink()
