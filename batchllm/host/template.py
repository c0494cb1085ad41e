"""The process that has imported SGLang, from which the engines of this process are forked.

SGLang takes many seconds and a gigabyte to import. It is imported once, in a process that does nothing else; an engine
is forked from there in no time, and all its processes share that memory. A template serves every engine of this process
that wants the same environment variables, since SGLang reads many of them at import, and ends with the last of them.

Knows how the process is started and asked; what it does is in `batchllm.srt.entrypoints.template`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import spawn, util
from multiprocessing.connection import Connection

from batchllm.errors import EngineError
from batchllm.host import logs, own_folder, standard_streams
from batchllm.host.logs import EngineLogs

FORK = b"f"
_NOT_READ = ("COLUMNS", "LINES", "OLDPWD", "PYTEST_CURRENT_TEST", "PWD", "SHLVL", "_")
"""Environment variables that nothing reads at import."""
_STOP_TIMEOUT_S = 10
_STDERR = 2
"""Standard error's file descriptor, whatever Python has put in its place."""

_OWN_PREFIX = "BATCHLLM_"
"""Begins the names of environment variables that are read when an engine starts, not before."""

_lock = threading.Lock()
_templates: list[Template] = []


class Template:
    """A process that imports SGLang and forks engines.

    Args:
        is_verbose: Whether its processes print to standard error; if not, to logs that are shown when something fails.

    Attributes:
        logs: What its processes print; None where that is standard error.
        num_users: How often it was acquired and not released.
        owner_pid: The process that has started it.
    """

    def __init__(self, *, is_verbose: bool) -> None:
        self.environment = _environment()
        self.is_verbose = is_verbose
        self.num_users = 0
        self.owner_pid = os.getpid()
        standard_streams.reserve()
        self._folder = own_folder.make()
        self.logs = None if is_verbose else EngineLogs(self._folder)
        self._socket, theirs = socket.socketpair()
        # A kernel library makes a temporary folder in every process at import and leaves it there.
        environment = {"CUDA_TILE_TEMP_DIR": str(self._folder), **os.environ}
        with theirs, contextlib.ExitStack() as stack:
            fds = [theirs.fileno()]
            output = _STDERR
            if self.logs is not None:
                log = stack.enter_context(self.logs.path(logs.TEMPLATE).open("ab"))
                errors_fd = os.dup(_STDERR)
                stack.callback(os.close, errors_fd)
                fds.append(errors_fd)
                environment[logs.FOLDER_VARIABLE] = str(self.logs.folder)
                environment[logs.ERRORS_FD_VARIABLE] = str(errors_fd)
                output = log.fileno()
            self._process = subprocess.Popen(
                [*_python(), "-c", _program(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=fds,
            )

    @property
    def is_alive(self) -> bool:
        """Whether the template's process has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Number of the template's process."""
        return self._process.pid

    def fork(self) -> Connection:
        """Fork an engine's process; returns the connection to it.

        Raises:
            EngineError: The template's process has ended, or there is no place for logs.
        """
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)  # temporary folders are cleaned while jobs run for days
            own_folder.mark(self._folder)
        except OSError as error:
            raise EngineError(f"{self._folder}: no place for the engine's logs: {error.strerror}") from error
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._socket, [FORK], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise EngineError(f"the process that engines are forked from has ended: {error}") from error
        return Connection(ours.detach())

    def close(self) -> None:
        """End its process, and delete the logs. Doing it twice does nothing."""
        self._socket.close()
        self._process.kill()
        self._process.wait(_STOP_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def acquire(*, is_verbose: bool) -> Template:
    """A template with the environment variables of this moment, started if there is none; `release` it."""
    with _lock:
        environment = _environment()
        for template in _templates:
            is_ours = template.owner_pid == os.getpid() and template.is_alive
            if is_ours and template.is_verbose == is_verbose and template.environment == environment:
                break
        else:
            template = Template(is_verbose=is_verbose)
            _templates.append(template)
        template.num_users += 1
        return template


def release(template: Template) -> None:
    """Give back what `acquire` returned; a template that nobody uses ends."""
    with _lock:
        template.num_users -= 1
        if template.num_users == 0:
            _templates.remove(template)
            template.close()


@contextlib.contextmanager
def held(*, is_verbose: bool) -> Iterator[None]:
    """Start the template before an engine is wanted, and keep it from one engine to the next."""
    template = acquire(is_verbose=is_verbose)
    try:
        yield
    finally:
        release(template)


@atexit.register
def _close_all() -> None:
    """Leave nothing behind of engines that nobody has shut down; a fork of this process leaves them alone."""
    for template in _templates:
        if template.owner_pid == os.getpid():
            template.close()


def _environment() -> dict[str, str]:
    """The environment variables that may be read while SGLang is imported."""
    return {
        name: value for name, value in os.environ.items() if name not in _NOT_READ and not name.startswith(_OWN_PREFIX)
    }


def own_variables() -> dict[str, str]:
    """The environment variables that an engine reads when it starts."""
    return {name: value for name, value in os.environ.items() if name.startswith(_OWN_PREFIX)}


def _python() -> list[str]:
    """This interpreter, with the options that it was started with."""
    # What multiprocessing does; there is no public name for it.
    return [os.fsdecode(spawn.get_executable()), *util._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def _program(fd: int) -> str:
    main = f"from batchllm.srt.entrypoints.template import main; main({fd}, {os.getpid()})"
    return f"import sys; sys.path[:] = {sys.path!r}; {main}"
