"""Stock SGLang's server, and an engine of ours; each takes half a minute to start."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchllm import BatchEngine
from batchllm.default_model import default_model_path
from batchllm.distributed.actor import free_port
from eval import process_group
from tests.environment import of_user

# Of SGLang's grammar backends only this one runs on a CPU without our scheduler.
GRAMMAR_BACKEND = "llguidance"
_STOCK = """
import multiprocessing
multiprocessing.set_start_method("fork")
multiprocessing.set_start_method = lambda *_, **__: None
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""
"""``python -m sglang.launch_server`` whose processes do not import it again."""
_START_TIMEOUT_S = 300
_SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def engine(engines: None) -> Iterator[BatchEngine]:
    with BatchEngine(max_total_tokens=2048, grammar_backend=GRAMMAR_BACKEND, random_seed=7) as engine:
        yield engine


@pytest.fixture(scope="module")
def stock_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("stock") / "log"
    flags = f"--device cpu --dtype float32 --port {port} --max-total-tokens 2048 --grammar-backend {GRAMMAR_BACKEND}"
    flags += " --sleep-on-idle"
    command = [sys.executable, "-c", _STOCK, "--model-path", default_model_path(), *flags.split()]
    environment = of_user()
    environment["TMPDIR"] = str(log.parent)
    before = set(_SHARED_MEMORY.glob("sglang_loads_*"))
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        _wait(server, url, log)
        yield url
    finally:
        process_group.end(server)
        for path in set(_SHARED_MEMORY.glob("sglang_loads_*")) - before:  # upstream leaves it
            if "batchllm" not in path.name:
                path.unlink()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"stock SGLang did not start: {log.read_text(errors='replace')[-3000:]}")
