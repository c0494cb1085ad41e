"""Extend attention of SGLang's torch_native backend: the released function against the patched one.

    .venv/bin/python patches/bench_torch_native_extend.py [float32 | bfloat16]

Compares copies made for the purpose; the installed sglang stays as it is. One thread; the two sides alternate, medians
of their times. No model and no engine: only the function that 0001 changes, on made-up keys, values and queries.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MODULE = "srt/layers/attention/torch_native_backend.py"
ROUNDS = 9


@dataclass(frozen=True)
class ExtendBatch:
    """What one layer's extend attention is given: ``prefix_lens[i]`` cached and ``extend_lens[i]`` new tokens each.

    Shapes: query ``[sum(extend_lens), num_heads, head_dim]``; keys and values ``[num_slots, num_kv_heads, head_dim]``;
    slots, scattered over the pool, ``[num_seqs, longest]``.
    """

    prefix_lens: list[int]
    extend_lens: list[int]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def random(
        cls,
        prefix_lens: list[int],
        extend_lens: list[int],
        *,
        num_heads: int = 8,
        num_kv_heads: int = 4,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> ExtendBatch:
        generator = torch.Generator().manual_seed(seed)
        lens = [prefix_len + extend_len for prefix_len, extend_len in zip(prefix_lens, extend_lens, strict=True)]
        pool = torch.randperm(sum(lens), generator=generator, dtype=torch.int32)
        slots = torch.zeros((len(lens), max(lens)), dtype=torch.int32)
        for row, own in zip(slots, pool.split(lens), strict=True):
            row[: len(own)] = own

        def normal(num_tokens: int, num: int) -> torch.Tensor:
            return torch.randn(num_tokens, num, head_dim, generator=generator).to(dtype)

        query = normal(sum(extend_lens), num_heads)
        return cls(
            prefix_lens, extend_lens, query, normal(sum(lens), num_kv_heads), normal(sum(lens), num_kv_heads), slots
        )

    def attend(self, backend: Any, *, causal: bool = True, window: int | None = None) -> torch.Tensor:
        """Output ``[sum(extend_lens), num_heads, head_dim]`` of a backend class, called as ``forward_extend`` does."""
        output = torch.full_like(self.query, torch.nan)
        prefix_lens, extend_lens = torch.tensor(self.prefix_lens), torch.tensor(self.extend_lens)
        return backend._run_sdpa_forward_extend(
            backend.__new__(backend),  # its constructor wants a model; this method uses nothing of it
            self.query,
            output,
            self.keys,
            self.values,
            self.slots,
            torch.arange(len(self.prefix_lens)),
            prefix_lens + extend_lens,
            prefix_lens,
            extend_lens,
            scaling=self.query.shape[-1] ** -0.5,
            enable_gqa=self.query.shape[1] != self.keys.shape[1],
            causal=causal,
            sliding_window_size=window,
        )


def copy_module(folder: Path, action: str) -> Path:
    """A copy of the module as released (``action`` revert) or patched (apply): ``folder/sglang/<MODULE>``."""
    package = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    copy = folder / "sglang" / MODULE
    copy.parent.mkdir(parents=True)
    shutil.copy2(package / MODULE, copy)
    for metadata in package.parent.glob("sglang-*.dist-info"):
        (folder / metadata.name).mkdir()
        shutil.copy2(metadata / "METADATA", folder / metadata.name)
    command = [ROOT / "scripts" / "apply_patches", action, "--target", folder / "sglang"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return copy


def load_backend(path: Path, name: str) -> Any:
    """The backend class of a copy of the module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.TorchNativeAttnBackend


def compare(released: Any, patched: Any, batch: ExtendBatch) -> str:
    seconds: dict[Any, list[float]] = {released: [], patched: []}
    outputs = {backend: batch.attend(backend) for backend in seconds}
    for _ in range(ROUNDS):
        for backend, times in seconds.items():
            start = time.perf_counter()
            batch.attend(backend)
            times.append(time.perf_counter() - start)
    before, after = (1000 * statistics.median(times) for times in seconds.values())
    difference = (outputs[released] - outputs[patched]).abs().max().item()
    return f"{before:8.1f} ms -> {after:7.1f} ms   {before / after:5.2f}x   largest difference {difference:.1e}"


def main(dtype: str) -> None:
    torch.set_num_threads(1)
    prefills, decodes = ([250] * 16, [25] * 16), ([299] * 64, [1] * 64)
    cases = {
        "16 x (250 cached + 25 new)": prefills,
        "64 decode rows of length 300": decodes,
        "both, one mixed batch": (prefills[0] + decodes[0], prefills[1] + decodes[1]),
        "16 x 275 new, nothing cached": ([0] * 16, [275] * 16),
    }
    with tempfile.TemporaryDirectory() as folder:
        released = load_backend(copy_module(Path(folder, "released"), "revert"), "released_torch_native")
        patched = load_backend(copy_module(Path(folder, "patched"), "apply"), "patched_torch_native")
        for name, (prefix_lens, extend_lens) in cases.items():
            batch = ExtendBatch.random(prefix_lens, extend_lens, dtype=getattr(torch, dtype))
            print(f"{dtype:10}{name:30}{compare(released, patched, batch)}", flush=True)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["float32"]))
