"""The processes that an engine or a server starts, and the files they talk through. Runs in the engine's or the
server's process. (Upstream: ``srt/entrypoints/engine.py``, which never removes the files and ends *all* children of
this process.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any

import psutil
import sglang.srt.entrypoints.engine as upstream
from sglang.srt.managers.io_struct import ShutdownReq

from batchllm.host import own_folder
from batchllm.host.environment import environment
from batchllm.srt.platforms.fork_safety import launch_state, process_state

_LOADS_PREFIX = "sglang_loads_batchllm-"
_SHARED_MEMORY = Path("/dev/shm")
_GRACE_S = 5
_SOCKET_LEN = len("tmp12345678")
_STOP_TIMEOUT_S = 30


class EngineProcesses:
    """Ends what was started in `starting`, and removes what was left on disk there."""

    def __init__(self) -> None:
        self._socket_dir: str | None = None
        self._children: list[psutil.Process] = []

    @property
    def are_up(self) -> bool:
        """Something was started and has not been ended."""
        return self._socket_dir is not None

    @property
    def instance_id(self) -> str:
        """What SGLang may call files of this engine that lie elsewhere, for `end` to find them."""
        assert self._socket_dir is not None
        return os.path.basename(self._socket_dir)

    @contextlib.contextmanager
    def starting(self, server_args: Any) -> Iterator[None]:
        """Processes started in here, and temporary files made, belong to this engine; those of before are ended.

        They are forks of this process where that is safe (`srt.platforms.fork_safety`), else they import SGLang again.
        """
        if self._socket_dir is None:
            _remove_files_of_the_dead()
            self._socket_dir = str(own_folder.make_for_sockets(_SOCKET_LEN))
        self._kill_children()
        before, tempfile.tempdir = tempfile.tempdir, self._socket_dir
        before_us = {child.pid for child in psutil.Process().children()}
        # A kernel library makes a temporary directory in every process at import and leaves it there.
        quiet = os.environ.get("PYTHONWARNINGS", "ignore::UserWarning")
        variables = {"CUDA_TILE_TEMP_DIR": self._socket_dir, "PYTHONWARNINGS": quiet}
        try:
            with environment(variables), _start_method(server_args):
                yield
        finally:
            tempfile.tempdir = before
            # Not the resource tracker of multiprocessing, which serves this whole process.
            self._children = [
                child
                for child in psutil.Process().children()
                if child.pid not in before_us and "resource_tracker" not in _command(child)
            ]

    async def ask_to_end(self, manager: Any) -> None:
        """Let the schedulers end by themselves: such a process takes its semaphores along."""
        if manager._subprocess_watchdog is not None:
            manager._subprocess_watchdog.stop()
        schedulers = [child for child in self._children if "scheduler" in _command(child)]
        if manager.death is not None or not all(map(_is_alive, schedulers)):
            return
        with contextlib.suppress(TimeoutError):  # one that is just dying takes no message any more
            await asyncio.wait_for(manager.send_and_wait(ShutdownReq()), _GRACE_S)
        psutil.wait_procs(schedulers, timeout=_GRACE_S)

    def end(self, manager: Any) -> None:
        """End what is left, and remove the files. Doing it twice does nothing.

        Args:
            manager: The tokenizer manager, whose sockets are closed; None if it was never made.
        """
        if self._socket_dir is None:
            return
        self._kill_children()
        if manager is not None:
            for socket in (manager.send_to_scheduler, manager.recv_from_detokenizer):
                socket.close(linger=0)
        for path in _SHARED_MEMORY.glob(f"sglang_loads_{self.instance_id}*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self._socket_dir, ignore_errors=True)
        self._socket_dir = None

    def _kill_children(self) -> None:
        for child in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(self._children, timeout=_STOP_TIMEOUT_S)
        self._children = []


@contextlib.contextmanager
def _start_method(server_args: Any) -> Iterator[None]:
    """Have SGLang start processes as it is safe here; it would spawn them."""
    is_safe = process_state() is None and launch_state(server_args) is None
    before, upstream.mp = upstream.mp, _Forking() if is_safe else _Spawning()
    try:
        yield
    finally:
        upstream.mp = before


class _Forking(ForkContext):
    """Forks, whatever start method it is told to use."""

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        pass


class _Spawning(SpawnContext):
    """Spawns, whatever start method it is told to use."""

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        pass


def _remove_files_of_the_dead() -> None:
    """What is left of engines whose process was killed before it could remove its own."""
    own_folder.remove_dead()
    for path in _SHARED_MEMORY.glob(f"{_LOADS_PREFIX}*-*"):
        pid = path.name.removeprefix(_LOADS_PREFIX).partition("-")[0]
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(OSError):  # another engine that starts does the same, or it is not ours to remove
            if path.lstat().st_uid == os.getuid():
                path.unlink()


def _command(process: psutil.Process) -> str:
    """Command line; empty for a process that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
