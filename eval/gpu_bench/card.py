"""The card: what it is, and what it reaches at most, measured in this run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

_PACKAGES = ("sglang", "sglang-kernel", "flashinfer-python", "torch", "triton", "transformers", "numpy", "numba")
_NUM_TIMED = 20


def describe() -> dict[str, Any]:
    """Name, limits and versions, found in a process of its own: a CUDA context would stay and take memory."""
    done = subprocess.run([sys.executable, "-m", "eval.gpu_bench.card"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the card cannot be measured: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    import torch

    is_cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if is_cuda else 24 << 30,
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if is_cuda else None,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    # Sizes that fill a card; on a CPU only whether it runs.
    size, num_bytes = (8192, 4 << 30) if is_cuda else (256, 1 << 20)
    device, dtype = ("cuda", torch.bfloat16) if is_cuda else ("cpu", torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    source = torch.empty(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found["matmul_flops"] = 2 * size**3 / _median_s(lambda: torch.mm(a, b, out=product), is_cuda)
    # Read and written.
    found["copy_bytes_per_s"] = 2 * num_bytes / _median_s(lambda: target.copy_(source), is_cuda)
    print(json.dumps(found))


def _median_s(launch: Any, is_cuda: bool) -> float:
    import torch

    times = []
    for i in range(_NUM_TIMED + 3):
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        launch()
        if is_cuda:
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
