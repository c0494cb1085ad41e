"""Ray for a job: one of its own, which starts and ends with it, or one that is there.

INVARIANT: what was started here is ended by `Cluster.close`, and its files are removed. A driver that is killed takes
its processes along, and the folder is removed by the next engine on the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from batchllm.errors import ConfigError, EngineError
from batchllm.host import own_folder
from batchllm.host.environment import environment

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S, _LOOK_EVERY_S = 20.0, 0.02
_STORE_BYTES = 200 * 2**20
_SOCKET_LEN = len("session_2026-11-29_15-10-00_000000_4194304/sockets/plasma_store")
_HTTP2_SETTINGS = b"\x04"
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0" + _HTTP2_SETTINGS + bytes(5)
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_enable_metrics_collection": "0",
}
"""Of a Ray that is started here: nothing is told to others, and only who has the token may speak to it."""


class ClusterLostError(EngineError):
    """The connection to Ray is gone, and all engines with it."""

    def __init__(self, reason: object) -> None:
        super().__init__(f"the connection to Ray is gone: {reason}")


@dataclass(frozen=True, slots=True)
class Resources:
    """What an engine takes of its node: CPUs and GPUs."""

    num_cpus: int
    num_gpus: int

    @property
    def words(self) -> str:
        """As a person says it."""
        return f"{self.num_gpus} GPUs" if self.num_gpus else f"{self.num_cpus} CPU cores"


class Cluster:
    """A connection to Ray.

    Args:
        address: Of a Ray that is there: "auto" or what Ray takes; None starts one here.
        is_verbose: Whether what Ray and its actors print goes to standard error.

    Attributes:
        ray: The package.
        is_own: It was started here.

    Raises:
        ConfigError: Ray is not installed, or the address is not reached.
        EngineError: It did not start.
    """

    def __init__(self, address: str | None, *, is_verbose: bool = False) -> None:
        self.is_own = address is None
        self._is_client = address is not None and address.startswith("ray://")
        self._folder: str | None = None
        check_reachable(address)
        self._had_read = "ray" in sys.modules
        with environment(_VARIABLES if self.is_own else {}):
            self.ray = _imported()
            if self.ray.is_initialized():
                raise ConfigError(
                    "this process is connected to a Ray already; end that connection first, ray.shutdown()"
                )
            options: dict[str, Any] = {"log_to_driver": is_verbose, "logging_level": logging.ERROR}
            try:
                with _kept_signals():
                    if self.is_own:
                        self._start(options)
                    else:
                        self.ray.init(address=address, **options)
            except BaseException as error:
                self.close()
                if not isinstance(error, Exception):
                    raise
                if self.is_own:
                    raise EngineError(f"Ray did not start: {_first_line(error)}") from error
                raise ConfigError(f"--ray-address {address}: {_first_line(error)}") from error

    def _start(self, options: dict[str, Any]) -> None:
        """Start a Ray, and another one where that fails: of two that start at once one may take the other's ports."""
        options |= {"num_cpus": num_cores(), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        self._read_variables_again()
        for is_last in (False, True):
            own_folder.remove_dead()
            self._folder = str(own_folder.make_for_sockets(_SOCKET_LEN))
            try:
                self.ray.init("local", **options, _temp_dir=self._folder)  # else one that RAY_ADDRESS names
                return
            except Exception as error:  # whatever Ray raises
                if is_last:
                    raise
                logger.warning("Ray did not start, and is started once more: %s", _first_line(error))
                self.close()

    def close(self) -> None:
        """Leave Ray; end it, and remove its files, if it was started here. Doing it twice does nothing."""
        if self._folder is None:
            self.ray.shutdown()
            return
        own = [process for process in psutil.Process().children(recursive=True) if self._is_of_folder(process)]
        self._end_at_once()
        self.ray.shutdown()
        for process in own:  # those that another of Ray's has started look for its end now and then
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not all(map(_has_ended, own)) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        own_folder.remove_dead()  # those of engines that were killed
        self._folder = None
        self._read_variables_again()

    def _read_variables_again(self) -> None:
        """Have a Ray that was imported before this know the environment variables of now: it reads them at import."""
        if self._had_read:
            raylet = importlib.import_module("ray._raylet")
            raylet.Config.initialize("")  # as Ray does itself, where it makes a token
            raylet.AuthenticationTokenLoader.instance().reset_cache()

    def _end_at_once(self) -> None:
        """Have Ray's shutdown kill its processes: each has a second to obey a SIGTERM, which they do not hear."""
        if not self.ray.is_initialized():
            return
        try:
            processes = self.ray._private.worker._global_node.all_processes.values()
        except AttributeError as error:  # these names are not public
            logger.warning("Ray takes some seconds to end: %s", error)
            return
        for info in itertools.chain.from_iterable(processes):
            info.process.terminate = info.process.kill

    @property
    def is_connected(self) -> bool:
        """Whether Ray may be asked for something: without a connection it would connect to another that it finds."""
        if self._is_client:
            return bool(self.ray.util.client.ray.is_connected())
        return bool(self.ray.is_initialized())

    def draining_nodes(self) -> set[str]:
        """Ray's names of the nodes that are about to go: who runs them has said so, or a spot warning has come.

        Raises:
            Exception: Ray does not say.
        """
        if not self._is_client:
            return _draining_nodes()
        if not self.is_connected:
            raise ClusterLostError("it was closed")
        ask = self.ray.remote(_draining_nodes).options(num_cpus=0)  # Ray tells only who is in the cluster
        nodes: set[str] = self.ray.get(ask.remote())
        return nodes

    def _is_of_folder(self, process: psutil.Process) -> bool:
        """It is one that Ray has started: its command line or its parent's names the folder."""
        with contextlib.suppress(psutil.Error):
            return any(str(self._folder) in " ".join(p.cmdline()) for p in (process, *process.parents()[:1]))
        return False

    def resources(self, num_engines: int, gpus_per_engine: int) -> Resources:
        """What each of some engines may take.

        Args:
            num_engines: Engines that are to run.
            gpus_per_engine: GPUs of each, where the cluster has GPUs.

        Raises:
            ConfigError: There are fewer GPUs, or fewer cores, than they need.
        """
        total = self.ray.cluster_resources()
        num_cpus, num_gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
        where = "this machine" if self.is_own else "the Ray cluster"
        if num_gpus:
            if num_engines * gpus_per_engine > num_gpus:
                raise ConfigError(
                    f"--replicas {num_engines}: {where} has {num_gpus} GPUs, and each replica needs {gpus_per_engine}; "
                    f"ask for {num_gpus // gpus_per_engine} at most"
                )
            return Resources(num_cpus=0, num_gpus=gpus_per_engine)
        if num_engines > num_cpus:
            raise ConfigError(f"--replicas {num_engines}: {where} has {num_cpus} CPU cores; ask for {num_cpus} at most")
        return Resources(num_cpus=num_cpus // num_engines, num_gpus=0)


def _draining_nodes() -> set[str]:
    state = importlib.import_module("ray._private.state").state
    return set(state.get_draining_nodes())  # as Ray's own libraries do


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "several replicas need Ray, which is not installed: pip install 'sglang-batchllm[ray]'"
        ) from None


def check_reachable(address: str | None) -> None:
    """Somebody who may be Ray listens there; Ray itself waits for minutes.

    Raises:
        ConfigError: Nobody listens there.
    """
    if address is None or address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--ray-address {address}: must be auto, HOST:PORT or ray://HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S) as there:
            answer = _http2_answer(there)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray-address {address}: nothing is reached there: {error}") from error
    if not answer.startswith(_HTTP2_SETTINGS) and not os.environ.get("RAY_USE_TLS"):
        raise ConfigError(
            f"--ray-address {address}: what listens there is no Ray; give the port that `ray start` names"
        )


def _http2_answer(there: socket.socket) -> bytes:
    """What somebody answers to the first words of HTTP/2, which Ray speaks: their type comes behind their length."""
    there.settimeout(_CONNECT_TIMEOUT_S / 2)
    there.sendall(_HTTP2_PREFACE)
    answer = b""
    with contextlib.suppress(TimeoutError):
        while len(answer) < 4 and (more := there.recv(4 - len(answer))):
            answer += more
    return answer[3:]


def _first_line(error: Exception) -> str:
    """The first line of what Ray says; where that announces others, the last of them too, which is what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[-1]}"
    return lines[0] if lines else type(error).__name__


def _has_ended(process: psutil.Process) -> bool:
    """Whether it does nothing any more. Who is to take note of its end, in a container perhaps nobody, may be late."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """SIGTERM does what it did before, if that was Python's to say: Ray has it end the process at once.

    What Ray starts meanwhile inherits that SIGTERM is blocked. A signal to all processes of a job must not end Ray's
    before the driver has had its answers; they end with the driver, whatever ends it.
    """
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
