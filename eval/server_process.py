"""A server, ours, stock SGLang's or vLLM's, in a process of its own."""

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

import measure_vllm

_MODULES = {"ours": "batchllm.launch_server", "stock": "sglang.launch_server"}
_VLLM = Path(__file__).parents[1] / ".venv-vllm"
_START_TIMEOUT_S = 180
_STOP_TIMEOUT_S = 60


@contextmanager
def running(engine: str, model: str, *flags: str, threads: int = 1) -> Iterator[str]:
    """Base URL of a server that answers.

    Args:
        engine: ours, stock, or vllm (its CPU engine, as ``eval/setup_vllm`` installs it).
        model: Folder of the model; requests call it "m" as well.
        flags: Of the server, in SGLang's names.
        threads: Compute threads.

    Raises:
        RuntimeError: It did not come up; its last words are in the message.
    """
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if engine == "vllm":
        command = _vllm_command(model, *flags)
    else:
        if not torch.cuda.is_available():  # stock SGLang runs on a CPU through our platform
            flags = ("--device", "cpu", *flags)
        command = [sys.executable, "-W", "ignore", "-m", _MODULES[engine], "--model-path", model, *flags]
        command += ["--log-level", "warning"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= measure_vllm.environment(_VLLM) if engine == "vllm" else {}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            server = subprocess.Popen(
                [*command, "--port", str(port), "--dtype", "float32"],
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


def _vllm_command(model: str, *flags: str) -> list[str]:
    """vLLM's server. Of SGLang's flags it has ``--max-total-tokens``, as blocks."""
    command = [str(_VLLM / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "m", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "256"]
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    num_blocks = int(values.pop("--max-total-tokens")) // 32 + 1  # one stays empty
    assert not values, values
    return [*command, "--num-gpu-blocks-override", str(num_blocks)]


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"{' '.join(map(str, server.args))}: {log.read_text(errors='replace')[-3000:]}")
