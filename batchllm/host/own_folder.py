"""Temporary folders of engines' processes: made with a mark, by which the next engine knows what is left of the dead.

Knows names, the mark, and which processes live; not what is in the folders.

INVARIANT: only a folder that was made here is removed, by a process that sees the same processes as its maker; whatever
a user calls his own is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import psutil

MARK = ".made-by-batchllm"
SHORT_PARENT = "/tmp"
"""Where folders are made whose names would be too long elsewhere, for sockets."""
_LONGEST_NAME = "/batchllm-4194304-12345678/"
_MAX_SOCKET_LEN = 107  # sys/un.h
_NAME = re.compile(r"batchllm-([0-9]{1,10})-[a-z0-9_]{8}")


def make(parent: str | None = None) -> Path:
    """Make a folder of this process.

    Args:
        parent: Where; None for among temporary files.

    Raises:
        OSError: It cannot be made.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"batchllm-{os.getpid()}-", dir=parent))
    mark(folder)
    return folder


def make_for_sockets(longest: int) -> Path:
    """Make a folder of sockets: among temporary files, if their whole names are short enough there.

    Args:
        longest: Bytes of the longest name of a socket, from the folder on.

    Raises:
        OSError: It cannot be made.
    """
    place = tempfile.gettempdir()
    is_short = len(os.fsencode(place)) + len(_LONGEST_NAME) + longest <= _MAX_SOCKET_LEN
    return make(place if is_short else SHORT_PARENT)


def mark(folder: Path) -> None:
    """Have a folder be known as one of ours.

    Raises:
        OSError: It cannot be written.
    """
    (folder / MARK).write_text(_sight())


def remove_dead() -> None:
    """Remove the folders of processes that have ended without removing them."""
    for parent in {tempfile.gettempdir(), SHORT_PARENT}:
        for folder in Path(parent).glob("batchllm-*-*"):
            named = _NAME.fullmatch(folder.name)
            if named is None or psutil.pid_exists(int(named[1])):
                continue
            with contextlib.suppress(OSError):  # another engine that starts does the same, or it is not ours to remove
                is_own = not folder.is_symlink() and folder.stat().st_uid == os.getuid()
                if is_own and (folder / MARK).read_text(errors="replace") == _sight():
                    shutil.rmtree(folder)


def _sight() -> str:
    """Which processes can be seen from here: those of another container have numbers of their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
