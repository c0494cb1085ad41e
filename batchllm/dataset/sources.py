"""Inputs: what the user named becomes local files of a known format.

Knows paths, streams, URLs, and how a format is told by its first bytes; not what a row is. What can be read only once
(stdin, a pipe) or lies elsewhere (a URL) is first copied into a folder, so that it can be hashed, read again, and read
by a run that resumes.

INVARIANT: a copy under its own name is whole: it is written under another name, and renamed when it is on the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import orjson
from xxhash import xxh3_64_hexdigest, xxh3_128

from batchllm.dataset.decompress import NotJsonError, open_unwrapped
from batchllm.dataset.formats import HEAD_LEN, tell_format
from batchllm.errors import ConfigError

InputFormat = Literal["jsonl", "parquet", "hf", "csv"]
"""``hf``: Arrow's own, of which Hugging Face's saved datasets are made, and Feather files."""

STDIN = "-"

_BLOCK_LEN = 1 << 20
_SUFFIXES: Mapping[str, InputFormat] = {".parquet": "parquet", ".arrow": "hf", ".csv": "csv", ".tsv": "csv"}
"""Of files whose first bytes say nothing else."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_HF_STATE, _HF_SPLITS = "state.json", "dataset_dict.json"
_COPIED_SUFFIXES = (".parquet", ".arrow", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An input that can be read any number of times.

    Attributes:
        name: As the user gave it, for messages.
        flag: The command line flag that gave it, for messages.
        local_paths: Its files, in the order in which they are read.
        spool_path: Where it was copied to; None where it is used in its own place.
    """

    name: str
    flag: str
    format: InputFormat
    local_paths: tuple[Path, ...]
    spool_path: Path | None = None

    def states(self) -> list[tuple[int, int]]:
        """Size and time of the last change of each file: other ones later mean that it was changed meanwhile.

        Raises:
            ConfigError: A file is gone.
        """
        try:
            return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, self.local_paths)]
        except OSError as error:
            raise _unreadable(self.flag, self.name, error) from error

    def content_hash(self) -> str:
        """Hash of what the input holds, 32 hexadecimal digits: of the bytes of its file; of several files, of their
        names too.

        Raises:
            ConfigError: A file cannot be read.
        """
        digest = xxh3_128()
        block = bytearray(_BLOCK_LEN)
        view = memoryview(block)
        try:
            for path in self.local_paths:
                with open(path, "rb", buffering=0) as file:
                    if len(self.local_paths) > 1:
                        digest.update(f"{path.name}\0{os.fstat(file.fileno()).st_size}\0".encode(errors="replace"))
                    while length := file.readinto(block):
                        digest.update(view[:length])
        except OSError as error:
            raise _unreadable(self.flag, self.name, error) from error
        return digest.hexdigest()

    def open_stream(self) -> BinaryIO:
        """Opens JSON, decompressed and as UTF-8; reading raises OSError where the file is corrupt or ends too early."""
        (path,) = self.local_paths
        return open_unwrapped(path)


def open_input(
    given: str,
    *,
    spool_folder: Path | None,
    input_format: InputFormat | None = None,
    flag: str = "-i",
    reuse_spool: bool = False,
) -> Input:
    """Finds an input and tells its format; copies it first where it cannot be read in place.

    Args:
        given: A path, ``-`` for stdin, or a URL of any protocol that fsspec knows.
        spool_folder: Where copies go, made if need be; None refuses what would have to be copied.
        input_format: What it is, where its first bytes shall not decide.
        reuse_spool: Take a copy that an earlier call has finished, and leave stdin or the URL alone.

    Raises:
        ConfigError: It cannot be read or copied, or is no input; names the flag and ``given``.
    """
    copy = _find_copier(given, flag)
    if copy is None:
        return _tell_format(Path(given), given, flag, input_format, None)
    if spool_folder is None:
        raise ConfigError(f"{flag} {given}: can be read only once, and is needed more often; give a local file")
    # A name that is nobody's: what has it is replaced.
    spool_path = spool_folder / f"copy-{xxh3_64_hexdigest(given.encode(errors='surrogateescape'))}"
    if not (reuse_spool and spool_path.exists()):
        _copy_whole(copy, spool_path, flag, given)
    return _tell_format(spool_path, given, flag, input_format, spool_path)


_Copier = Callable[[Path], None]
"""Copies an input to a path that does not exist: as a file, or as a directory of files."""


def _find_copier(given: str, flag: str) -> _Copier | None:
    """How to copy the input; None where it can be used in its place."""
    if given == STDIN:
        return _copy_stdin
    if _URL.match(given):
        return lambda target: _copy_url(given, flag, target)
    try:
        mode = os.stat(given).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(flag, given, error) from error
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return lambda target: _copy_pipe(given, target)


def _copy_whole(copy: _Copier, spool_path: Path, flag: str, given: str) -> None:
    unfinished = spool_path.with_name(spool_path.name + ".unfinished")
    try:
        spool_path.parent.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        try:
            copy(unfinished)
            _sync(unfinished)
            _remove(spool_path)
            os.replace(unfinished, spool_path)
        finally:
            _remove(unfinished)
    except OSError as error:
        raise ConfigError(f"{flag} {given}: cannot be copied to {spool_path.parent}: {error}") from error


def _copy_stdin(target: Path) -> None:
    if sys.stdin is None:
        raise OSError("standard input is closed")
    _copy_stream(sys.stdin.buffer, target)


def _copy_stream(stream: BinaryIO, target: Path) -> None:
    with open(target, "xb") as file:
        shutil.copyfileobj(stream, file, _BLOCK_LEN)


def _copy_pipe(path: str, target: Path) -> None:
    with open(path, "rb") as stream:
        _copy_stream(stream, target)


def _copy_url(url: str, flag: str, target: Path) -> None:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        if files.info(path)["type"] != "directory":
            files.get_file(path, os.fspath(target))
            return
        target.mkdir()
        for found in files.ls(path, detail=True):
            name = Path(found["name"].rstrip("/")).name
            if found["type"] == "file" and name.endswith(_COPIED_SUFFIXES):
                files.get_file(found["name"], os.fspath(target / name))
    except ImportError as error:
        raise ConfigError(f"{flag} {url}: needs a package that is not installed: {error}") from error
    except Exception as error:  # every protocol raises its own library's errors, which have no base in common
        raise ConfigError(f"{flag} {url}: cannot be read: {type(error).__name__}: {error}") from error


def _sync(path: Path) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tell_format(path: Path, given: str, flag: str, wanted: InputFormat | None, spool_path: Path | None) -> Input:
    try:
        if path.is_dir():
            found, paths = _files_of(path, given, flag)
        else:
            found, paths = wanted or _format_of_file(path, given, flag), [path]
            if found == "jsonl":
                open_unwrapped(path).close()
    except NotJsonError as error:
        raise ConfigError(f"{flag} {given}: is {error}, which is not read; give JSON lines or a table") from error
    except OSError as error:
        raise _unreadable(flag, given, error) from error
    if wanted is not None and wanted != found:
        if path.is_dir():
            raise ConfigError(f"{flag} {given}: is not an input of format {wanted}, but of {found}")
        found = wanted
    return Input(
        name=given,
        flag=flag,
        format=found,
        local_paths=tuple(paths),
        spool_path=spool_path,
    )


def _format_of_file(path: Path, given: str, flag: str) -> InputFormat:
    """The format of a file: by its first bytes, whatever its name; by its name where they say nothing.

    Raises:
        ConfigError: It is something that is not read.
    """
    with open(path, "rb") as file:
        found = tell_format(file.read(HEAD_LEN))
    if found.kind == "other":
        raise ConfigError(f"{flag} {given}: is {found.name}, which is not read; give JSON lines or a table")
    if found.kind == "table":
        return cast(InputFormat, found.name)
    if found.kind == "csv" and path.suffix not in _SUFFIXES:
        raise ConfigError(f"{flag} {given}: looks like CSV, and a name does not say so; give --input-format csv")
    return _SUFFIXES.get(path.suffix, "jsonl") if found.kind in ("lines", "csv") else "jsonl"


def _files_of(folder: Path, given: str, flag: str) -> tuple[InputFormat, list[Path]]:
    """The format of a directory and its files in order.

    Raises:
        ConfigError: It holds nothing that can be read, or several splits.
    """
    if (folder / _HF_STATE).is_file():
        return "hf", [folder / name for name in _read_hf_state(folder, given, flag)]
    if (folder / _HF_SPLITS).is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{_HF_STATE}")))
        raise ConfigError(
            f"{flag} {given}: is a directory of several splits; give that of one: {splits or 'none here'}"
        )
    formats: tuple[tuple[InputFormat, str], ...] = (("parquet", "*.parquet"), ("hf", "*.arrow"))
    for found, pattern in formats:
        if paths := sorted(path for path in folder.glob(pattern) if not path.name.startswith((".", "_"))):
            return found, paths
    raise ConfigError(
        f"{flag} {given}: is a directory without *.parquet files and not a saved Hugging Face dataset; give a file, "
        "or a directory of one of these"
    )


def _read_hf_state(folder: Path, given: str, flag: str) -> list[str]:
    """Names of the Arrow files that `Dataset.save_to_disk` has written."""
    try:
        state = orjson.loads((folder / _HF_STATE).read_bytes())
        names = [str(file["filename"]) for file in state["_data_files"]]
        mapped = any(state.get(key) for key in ("_indices_files", "_indices_data_files"))
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{flag} {given}: {_HF_STATE} is not that of a saved dataset: {error!r}") from error
    if mapped:
        raise ConfigError(
            f"{flag} {given}: the dataset is a selection of its files' rows; write it out with "
            "dataset.flatten_indices().save_to_disk(...) and give that"
        )
    if not names or any(Path(name).name != name for name in names):
        raise ConfigError(f"{flag} {given}: {_HF_STATE} names no files, or files elsewhere")
    return names


def _unreadable(flag: str, given: str, error: OSError | ValueError) -> ConfigError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ConfigError(f"{flag} {given}: cannot be read: {why}")
