"""Where the time of a profiled run goes: kernels by kind, and the gaps between them.

Reads what ``torch.profiler`` exports (Chrome Trace Event JSON, gzipped). Only what ran on the device counts: events of
the categories ``kernel``, ``gpu_memcpy`` and ``gpu_memset``, in microseconds.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})

# The first that matches; names as of cuBLAS, CUTLASS, FlashAttention, FlashInfer, SGLang's Triton kernels and ours.
_KINDS = (
    (
        "attention",
        r"attend_tiles|merge_slots|merge_state|_fwd_kernel|_fwd_grouped|decode_softmax_reducev|flash|fmha|fa3"
        r"|BatchPrefill|BatchDecode|PersistentVariableLength|attention",
    ),
    ("linear", r"gemm|gemv|nvjet|cutlass|cublas|splitKreduce|matmul|wgmma|ampere_|sm90_|sm80_"),
    ("memory", r"memcpy|memset"),
)


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Of the profiled time on a device, seconds.

    Attributes:
        span_s: From the first kernel to the end of the last.
        busy_s: Of these, at least one kernel ran.
        by_kind: Sums over kernels, which may run beside each other: ``attention``, ``linear``, ``memory``, ``other``.
        top: The kernels of most time, and how much.
    """

    span_s: float
    busy_s: float
    by_kind: dict[str, float]
    top: list[tuple[str, float]]

    @property
    def idle_share(self) -> float:
        """Part of the span in which nothing ran."""
        return 1.0 - self.busy_s / self.span_s if self.span_s else 0.0


def read(folder: Path) -> DeviceTime:
    """Of the traces in a folder.

    Raises:
        FileNotFoundError: There is none.
    """
    paths = sorted([*folder.rglob("*.json.gz"), *folder.rglob("*.json")])
    if not paths:
        raise FileNotFoundError(f"{folder}: no trace was written")
    events: list[dict[str, Any]] = []
    for path in paths:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        events += json.loads(raw)["traceEvents"]
    return device_time(events)


def device_time(events: Iterable[dict[str, Any]]) -> DeviceTime:
    """Sum up trace events; a device without any has no time."""
    kernels = sorted(
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE
    )
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    busy, reached = 0.0, kernels[0][0] if kernels else 0.0
    for start, duration, name in kernels:
        by_kind[kind_of(name)] += duration / 1e6
        by_name[name] += duration / 1e6
        busy += max(0.0, start + duration - max(start, reached))
        reached = max(reached, start + duration)
    span = reached - kernels[0][0] if kernels else 0.0
    return DeviceTime(span / 1e6, busy / 1e6, dict(by_kind), by_name.most_common(12))


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")
