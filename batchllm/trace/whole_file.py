"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path


def temporary_beside(target: Path) -> Path:
    """Where a file is written until it is complete: short however long its name is, and another in each process."""
    return target.with_name(f".{zlib.crc32(os.fsencode(target.name)):08x}.{os.getpid()}.tmp")


def write_whole(path: str | os.PathLike[str], parts: Iterable[bytes]) -> None:
    """Writes the parts one after the other; the file takes the place of an older one when all are written.

    Raises:
        OSError: The folder cannot be written. Nothing is left behind, and an older file stays.
    """
    target = Path(path)
    temporary = temporary_beside(target)
    try:
        with temporary.open("wb") as stream:
            stream.writelines(parts)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names of files in the folder safe on disk.

    Raises:
        OSError: The disk refuses.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
