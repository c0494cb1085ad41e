"""Attention of one layer on a CPU: compiled kernels, plain torch, and SGLang's ``torch_native``.

Each step is timed on many copies of its KV in turn, more than the caches hold, as the layers of a model are: what is
read comes from memory. Beside the time stands how long a copy of as many bytes as the step's distinct KV takes.

    OMP_NUM_THREADS=1 .venv/bin/python eval/bench_cpu_attention.py [--threads N] [--out eval/results/cpu_attention.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import compare
import numpy as np
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from batchllm.attention import AttentionLayout, PrefixPaths, check_layout, plan_layout
from batchllm.attention.base import LayerShape
from batchllm.attention.cpu_shared import make_cpu_attention
from batchllm.attention.reference import attention
from batchllm.attention.torch_shared import TorchSharedAttention

# Query heads, KV heads, head_dim.
MODELS = {"built-in": (4, 2, 64), "28M": (8, 4, 64)}

_COPY_BYTES = 256 << 20
# KV of all layers together, where they are not more than this many.
_KV_BYTES, _MAX_LAYERS = 256 << 20, 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences of a step that are alike.

    Attributes:
        number: Of them.
        sharing: So many share a prefix each; 1: nothing is shared.
        prefix_len: Tokens of the prefix.
        private_len: Tokens behind it, query tokens included.
        qo_len: Query tokens.
    """

    number: int
    sharing: int
    prefix_len: int
    private_len: int
    qo_len: int = 1


STEPS = {
    "decode, 2048 shared by 16": [Rows(64, 16, 2048, 64)],
    "decode, the same lengths, nothing shared": [Rows(64, 1, 2048, 64)],
    "decode, 384 shared by 8": [Rows(64, 8, 384, 40)],
    "prompts, 16 of 32 behind 384 shared": [Rows(16, 16, 384, 32, 32)],
    "mixed, 48 decode, 384 shared by 8, and a prompt of 512": [Rows(48, 8, 384, 40), Rows(1, 1, 0, 512, 512)],
}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Tensors of a step; ``layers`` are (key_cache, value_cache)."""

    layout: AttentionLayout
    table: torch.Tensor
    query: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    distinct_bytes: int
    scale: float


def make_step(parts: list[Rows], heads: tuple[int, int, int], dtype: torch.dtype) -> Step:
    """Slots as a pool hands them out: prompts as a whole, those of decode rows a token of each in turn."""
    num_heads, num_kv_heads, head_dim = heads
    rows = [part for part in parts for _ in range(part.number)]
    kv_len = np.array([row.prefix_len + row.private_len for row in rows], np.int32)
    qo_len = np.array([row.qo_len for row in rows], np.int32)
    table = np.zeros((len(rows), int(kv_len.max())), np.int32)
    paths, leaves, used = PrefixPaths(), [], 0
    for part in parts:
        of_part = np.arange(part.number) + len(leaves)
        for first in range(0, part.number, part.sharing) if part.prefix_len else ():
            table[of_part[first : first + part.sharing], : part.prefix_len] = used + np.arange(part.prefix_len)
            used += part.prefix_len
        own = used + np.arange(part.number * part.private_len)
        own = own.reshape(-1, part.number).T if part.qo_len == 1 else own.reshape(part.number, -1)
        table[of_part, part.prefix_len : part.prefix_len + part.private_len] = own
        used += own.size
        groups = [paths.add(-1, part.prefix_len) for _ in range(part.number // part.sharing)] if part.prefix_len else []
        leaves += [groups[i // part.sharing] if groups else -1 for i in range(part.number)]
    layout = plan_layout(
        table_rows=np.arange(len(rows), dtype=np.int32),
        qo_len=qo_len,
        kv_len=kv_len,
        leaf=np.array(leaves, np.int32),
        paths=paths,
    )
    check_layout(layout, table, is_thorough=True)
    distinct_bytes = 2 * used * num_kv_heads * head_dim * dtype.itemsize
    num_layers = min(_MAX_LAYERS, max(2, _KV_BYTES // distinct_bytes))
    random = torch.Generator().manual_seed(0)
    draw = [torch.randn(used, num_kv_heads, head_dim, generator=random).to(dtype) for _ in range(2)]
    layers = [(draw[0].clone(), draw[1].clone()) for _ in range(num_layers)]
    query = torch.randn(int(qo_len.sum()), num_heads, head_dim, generator=random).to(dtype)
    return Step(layout, torch.from_numpy(table), query, layers, distinct_bytes, head_dim**-0.5)


# Computes a layer into the last argument.
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def torch_native(step: Step) -> Run:
    """SGLang's backend, called as its ``forward_decode`` and ``forward_extend`` do."""
    backend = object.__new__(TorchNativeAttnBackend)  # what is called here needs nothing of a model
    qo_len = np.diff(step.layout.qo_indptr)
    rows, kv_len = torch.from_numpy(step.layout.table_rows).long(), torch.from_numpy(step.layout.kv_len).long()
    lengths: dict[str, Any] = {"req_pool_indices": rows, "seq_lens": kv_len}
    is_decode = bool((qo_len == 1).all())
    call = backend._run_sdpa_forward_decode if is_decode else backend._run_sdpa_forward_extend
    if not is_decode:
        extend = torch.from_numpy(qo_len).long()
        lengths |= {"extend_prefix_lens": kv_len - extend, "extend_seq_lens": extend}

    def run(keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor) -> None:
        call(
            step.query,
            output,
            keys,
            values,
            step.table,
            **lengths,
            scaling=step.scale,
            enable_gqa=step.query.shape[1] != keys.shape[1],
            causal=not is_decode,
        )

    return run


def measure(step: Step, heads: tuple[int, int, int], repetitions: int) -> list[dict[str, Any]]:
    """Of each implementation: time of planning and of a layer, in seconds, and the greatest error."""
    shape = LayerShape(*heads, step.query.dtype, step.scale)
    compiled, reason = make_cpu_attention(shape)
    if reason is not None:
        raise SystemExit(reason)
    ours = {"compiled": compiled, "plain torch": TorchSharedAttention(shape)}
    plan_times: dict[str, list[float]] = {name: [] for name in ours}
    for _ in range(repetitions):
        for name, attend in ours.items():
            plan_times[name].append(_seconds(lambda attend=attend: attend.plan(step.layout, step.table)))
    runs: dict[str, Run] = {
        name: lambda keys, values, output, attend=attend: attend.run(step.query, keys, values, output)
        for name, attend in ours.items()
    }
    runs["SGLang torch_native"] = torch_native(step)
    output = torch.empty_like(step.query)
    expected = attention(step.query, *step.layers[0], step.table, step.layout, step.scale)
    errors = {}
    for name, run in runs.items():
        run(*step.layers[0], output.fill_(torch.nan))
        errors[name] = float((output.double() - expected).abs().max())
    times: dict[str, list[float]] = {name: [] for name in runs}
    turn = 0
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            layer = step.layers[turn % len(step.layers)]
            turn += 1
            times[name].append(_seconds(lambda run=run, layer=layer: run(*layer, output)))
    return [
        {
            "implementation": name,
            "plan_s": statistics.median(plan_times[name]) if name in plan_times else None,
            "layer_s": statistics.median(times[name][1:]),
            "max_error": errors[name],
        }
        for name in runs
    ]


def copy_seconds(repetitions: int) -> float:
    """Median time of a copy of `_COPY_BYTES` of float32."""
    source = torch.randn(_COPY_BYTES // 4)
    target = torch.zeros_like(source)
    return statistics.median([_seconds(lambda: target.copy_(source)) for _ in range(repetitions)])


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _row(result: dict[str, Any]) -> list[str]:
    plan = "" if result["plan_s"] is None else f"{result['plan_s'] * 1e3:.2f}"
    bandwidth = result["distinct_bytes"] / result["layer_s"] / 1e9
    return [
        result["model"],
        result["step"],
        f"{result['distinct_bytes'] / 1e6:.1f}",
        result["implementation"],
        plan,
        f"{result['layer_s'] * 1e3:.2f}",
        f"{bandwidth:.2f}",
        f"{result['layer_s'] / result['copy_s']:.2f}",
        f"{result['max_error']:.1e}",
    ]


_HEADER = [
    "heads of",
    "step",
    "distinct KV, MB",
    "attention",
    "plan, ms",
    "layer, ms",
    "KV, GB/s",
    "x copy",
    "max error",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", help="Markdown file; results go beside it as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    copy_before = copy_seconds(args.repetitions)
    results = []
    for model, heads in MODELS.items():
        for name, parts in STEPS.items():
            step = make_step(parts, heads, getattr(torch, args.dtype))
            fixed = {"model": model, "step": name, "threads": args.threads, "dtype": args.dtype}
            fixed |= {"distinct_bytes": step.distinct_bytes, "layers": len(step.layers)}
            results += [fixed | result for result in measure(step, heads, args.repetitions)]
            del step
    copy_s = min(copy_before, copy_seconds(args.repetitions))
    results = [
        result | {"copy_s": copy_s * result["distinct_bytes"] / _COPY_BYTES, "copy_bytes_per_s": _COPY_BYTES / copy_s}
        for result in results
    ]
    bandwidth = _COPY_BYTES / copy_s / 1e9
    text = (
        f"{args.threads} compute threads, {args.dtype}, medians of {args.repetitions}. A copy of "
        f"{_COPY_BYTES >> 20} MiB moves {bandwidth:.1f} GB/s ({2 * bandwidth:.1f} GB/s read and written); "
        "``x copy`` is the layer's time over that of copying the step's distinct KV.\n\n"
    )
    compare.write(args.out, "Attention on a CPU", text + compare.table(_HEADER, [_row(r) for r in results]), results)


if __name__ == "__main__":
    main()
