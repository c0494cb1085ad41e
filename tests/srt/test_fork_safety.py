"""Where the processes of an engine may be forks."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.entrypoints.engine as upstream
import torch

from batchllm.srt.entrypoints import processes
from batchllm.srt.platforms import fork_safety

_STATES = {
    "nothing": ("", "None"),
    "a Python thread": (
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "it has 2 Python threads",
    ),
    "a team of OpenMP's": ("torch.set_num_threads(2); torch.ones(1 << 22).exp()", "it has the threads"),
}


@pytest.mark.parametrize("state", _STATES)
def test_a_process_with_threads_is_not_forked(state: str) -> None:
    code, answer = _STATES[state]
    script = (
        "from batchllm.srt.platforms import host_imports; host_imports.prepare_environment(); import torch\n"
        f"{code}\nfrom batchllm.srt.platforms.fork_safety import process_state; print(process_state())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(answer)


def test_a_process_that_has_used_cuda_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch, or any other library: CUDA's driver is asked, which says so without being initialised by that."""
    monkeypatch.setattr(fork_safety, "_thread_names", lambda: ["python"])
    monkeypatch.setattr(fork_safety.threading, "active_count", lambda: 1)
    status = 3  # CUDA_ERROR_NOT_INITIALIZED

    def driver(name: str) -> Any:
        assert name == "libcuda.so.1"
        return SimpleNamespace(cuCtxGetCurrent=lambda context: status)

    monkeypatch.setattr(ctypes, "CDLL", driver)
    assert fork_safety.process_state() is None
    status = 0
    assert fork_safety.process_state() == "it has used CUDA"
    status = 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert fork_safety.process_state() == "it has used CUDA"


@pytest.mark.parametrize(
    ("arguments", "numa", "reason"),
    [
        ({"enable_memory_saver": False, "numa_node": None}, "", None),
        ({"enable_memory_saver": True, "numa_node": None}, "", "--enable-memory-saver preloads a library"),
        ({"enable_memory_saver": False, "numa_node": [0]}, "1", "--numa-node starts processes through numactl"),
        ({"enable_memory_saver": False, "numa_node": [0]}, "0", None),
    ],
)
def test_arguments_that_need_a_new_interpreter_get_one(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], numa: str, reason: str | None
) -> None:
    """And only these; all others are forked, whatever SGLang asks for."""
    monkeypatch.setenv("SGLANG_NUMA_BIND_V2", numa)
    monkeypatch.setattr(processes, "process_state", lambda: None)
    server_args = SimpleNamespace(**arguments)
    assert fork_safety.launch_state(server_args) == reason
    stock = upstream.mp
    with processes._start_method(server_args):
        upstream.mp.set_start_method("forkserver", force=True)
        assert upstream.mp.Process._start_method == ("fork" if reason is None else "spawn")
    assert upstream.mp is stock


def test_the_template_has_one_thread_and_no_cuda_context() -> None:
    """After all imports: what an engine is forked from is safe to fork."""
    script = (
        "from batchllm.srt.platforms import host_imports\n"
        "host_imports.prepare_environment(); host_imports.import_all()\n"
        "from batchllm.srt.platforms.fork_safety import process_state; print(process_state())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "None"


_END = """
import atexit
from batchllm.srt.entrypoints import template

class Imported:
    def __del__(self):
        print("taken apart", flush=True)

imported = Imported()
atexit.register(print, "at exit")
print("said before")
template._exit()
"""


def test_a_fork_ends_in_order_and_takes_nothing_apart_of_what_was_imported() -> None:
    """What was to be done at the end is done, and what was said is written."""
    done = subprocess.run([sys.executable, "-c", _END], capture_output=True, text=True, check=True)
    assert done.stdout == "said before\nat exit\n"
