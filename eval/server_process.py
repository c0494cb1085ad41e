"""A server, ours or stock SGLang's, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MODULES = {"ours": "batchllm.launch_server", "stock": "sglang.launch_server"}
_START_TIMEOUT_S = 180
_STOP_TIMEOUT_S = 60


@contextmanager
def running(engine: str, model: str, *flags: str, threads: int = 1) -> Iterator[str]:
    """Base URL of a server that answers.

    Args:
        engine: ours or stock.
        model: Folder of the model.
        flags: Of the server.
        threads: Compute threads.

    Raises:
        RuntimeError: It did not come up; its last words are in the message.
    """
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if not torch.cuda.is_available():  # stock SGLang runs on a CPU through our platform
        flags = ("--device", "cpu", *flags)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            server = subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore", "-m", _MODULES[engine], "--model-path", model),
                    *("--port", str(port), "--log-level", "warning", "--dtype", "float32", *flags),
                ],
                stdout=file,
                stderr=file,
                env=environment | {"OMP_NUM_THREADS": str(threads), "XDG_STATE_HOME": folder, "TMPDIR": folder},
            )
        try:
            _wait(server, url, log)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"{' '.join(map(str, server.args))}: {log.read_text(errors='replace')[-3000:]}")
