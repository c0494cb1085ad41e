"""Attention of one layer on a GPU: ours, SGLang's Triton kernels, FlashInfer with and without cascade, side by side.

Every launch is replayed from a CUDA graph with a cold L2 cache; bandwidth is KV that the kernel has to read - of what
is shared once, where it reads it once - over time, against what a copy reaches on the same card. Results are checked
against the float64 reference on some sequences.

    python eval/bench_attention.py --out eval/results/attention.md
    python eval/bench_attention.py --tune       # first: times tile sizes for the head shape, keeps the best
    python eval/bench_attention.py --table      # fills batchllm/attention/dispatch_table.json for the card, or PATH
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compare
import numpy as np
import torch

from batchllm.attention import AttentionLayout, reference
from batchllm.attention.base import LayerShape
from batchllm.attention.dispatch import TABLE_PATH, AttentionPath, fastest, load_table, table_key

Launch = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, KV heads, head_dim; Llama 3.1 8B."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def kv_bytes(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Workload:
    """A made-up step; fields as of `tile_tuner.made_up_step`."""

    name: str
    levels: Sequence[tuple[int, int]]
    readers_per_leaf: int
    private_len: int
    query_len: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A workload on the device; shapes as in `batchllm.attention.reference`."""

    heads: Heads
    layout: AttentionLayout
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    table: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.heads.head_dim**-0.5)

    @property
    def num_distinct_tokens(self) -> int:
        """KV tokens that are read where every segment is read once."""
        private = (self.layout.kv_len - self.layout.private_start).sum(dtype=np.int64)
        return int(np.diff(self.layout.segment_span, axis=1).sum(dtype=np.int64) + private)


WORKLOADS = [
    Workload("decode 256, 2000 shared by 16 each", [(16, 2000)], 16, 256),
    Workload("decode 16, 16000 shared by all", [(1, 16_000)], 16, 256),
    Workload("decode 256, 16000 shared by 16 each", [(16, 16_000)], 16, 256),
    Workload("decode 256, nothing shared", [], 256, 2256),
    Workload("decode 256, 2000 shared by 4 each", [(64, 2000)], 4, 256),
    Workload("decode 256, 500 shared by all", [(1, 500)], 256, 256),
    Workload("decode 256, 3 levels: 1000 by 64, 500 by 16, 250 by 4", [(4, 1000), (4, 500), (4, 250)], 4, 200),
    Workload("prefill 8 x 512, 2000 shared by 8", [(1, 2000)], 8, 512, 512),
    Workload("prefill 16 x 256, 3 levels of 1000, 500, 250", [(1, 1000), (2, 500), (4, 250)], 2, 256, 256),
    Workload("prefill 8 x 512, nothing shared", [], 8, 2512, 512),
]

_GROUP_SIZES, _SHARED_LENS = [2, 4, 8, 16, 64], [128, 512, 2000, 8000, 16_000]

# Of the largest output of the reference: the weights of the softmax are rounded to the dtype of the cache.
_MAX_ERROR = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--heads", default="32/8/128", help="query heads/KV heads/head_dim")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=32, help="of the model, which share what --table plans once")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--tune", action="store_true", help="time tile sizes first, and keep the best")
    parser.add_argument("--table", nargs="?", const=TABLE_PATH, type=Path, metavar="PATH", help="fill a table instead")
    parser.add_argument("--out")
    args = parser.parse_args()
    heads = Heads(*map(int, args.heads.split("/")), dtype=getattr(torch, args.dtype))
    if not torch.cuda.is_available():
        print("bench_attention.py needs a CUDA device, and torch finds none.", file=sys.stderr)
        sys.exit(2)
    if args.tune:
        tune_cuda(heads)
    if args.table:
        write_table_cuda(heads, args.layers, args.table)
        return
    bench_cuda(heads, [workload for workload in WORKLOADS if args.only in workload.name], args.out)


def tune_cuda(heads: Heads) -> None:
    from tile_tuner import tune

    device = torch.device("cuda", torch.cuda.current_device())
    tune(device, heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.dtype, report=print)


def bench_cuda(heads: Heads, workloads: Sequence[Workload], out: str | None) -> None:
    copy_gbps = _copy_gbps()
    rows, results = [], []
    for workload in workloads:
        step = _make_step(heads, workload)
        measured = [_measure_cuda(engine, step) | {"workload": workload.name} for engine in CUDA_ENGINES]
        stock_ms = next((m["ms"] for m in measured if m["engine"] == _STOCK and "ms" in m), None)
        for result in measured:
            results.append(result | {"device": torch.cuda.get_device_name(), "copy_gbps": copy_gbps})
            rows.append(_row(result, stock_ms, copy_gbps))
    header = ["step", "kernel", "ms", f"{_STOCK} / it", "KV read, GB/s", "of a copy", "plan, ms", "error"]
    shape = f"{heads.num_heads}/{heads.num_kv_heads}/{heads.head_dim} {str(heads.dtype).removeprefix('torch.')}"
    text = f"{torch.cuda.get_device_name()}, copy {copy_gbps:,.0f} GB/s, heads {shape}.\n\n"
    compare.write(out, "Attention of one layer", text + compare.table(header, rows), results)
    if any(not result.get("error", 0.0) <= _MAX_ERROR for result in results):
        sys.exit("A result is wrong, see above.")


def write_table_cuda(heads: Heads, num_layers: int, path: Path) -> None:
    """Time groups of every size and length, and write which path is fastest for each."""
    entry: dict[str, Any] = {}
    paths: dict[str, AttentionPath] = {"ours": "shared", _STOCK: "plain", "flashinfer cascade": "cascade"}
    for kind, num_sequences, query_len in (("decode", 256, 1), ("extend", 64, 64)):
        cells = []
        for group_size in _GROUP_SIZES:
            cells.append([])
            for shared_len in _SHARED_LENS:
                levels = [(num_sequences // group_size, shared_len)]
                step = _make_step(heads, Workload("", levels, group_size, 256, query_len))
                measured = [_measure_cuda(engine, step) for engine in CUDA_ENGINES if engine in paths]
                right = [m for m in measured if m.get("error", 1.0) <= _MAX_ERROR]
                cells[-1].append(fastest({paths[m["engine"]]: (m["plan_ms"], m["ms"]) for m in right}, num_layers))
                times = ", ".join(f"{m['engine']} {m.get('ms', m.get('failed'))}" for m in measured)
                print(f"{kind}, {group_size} readers of {shared_len}: {times}", flush=True)
        entry[kind] = {"group_sizes": _GROUP_SIZES, "shared_lens": _SHARED_LENS, "paths": cells}
    measured_on = table_key(
        torch.cuda.get_device_name(), heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.dtype
    )
    table = load_table() | {measured_on: entry}
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"written to {path}")


def _make_step(heads: Heads, workload: Workload) -> Step:
    from tile_tuner import made_up_step

    layout, table, num_slots = made_up_step(
        workload.levels, workload.readers_per_leaf, workload.private_len, workload.query_len
    )
    options: dict[str, Any] = {"dtype": heads.dtype, "device": "cuda"}
    k_cache, v_cache = (torch.randn(num_slots, heads.num_kv_heads, heads.head_dim, **options) for _ in range(2))
    q = torch.randn(int(layout.qo_indptr[-1]), heads.num_heads, heads.head_dim, **options)
    return Step(heads, layout, q, k_cache, v_cache, table.cuda())


def _measure_cuda(engine: str, step: Step) -> dict[str, Any]:
    """Time, bandwidth and error of one kernel; ``failed`` in their place where it does not run."""
    from tile_tuner import time_ms

    try:
        plan, launch, num_tokens = CUDA_ENGINES[engine](step)
        plan()
        error = _error(step, launch())
        ms = time_ms(launch)
        plan_ms = statistics.median(_host_ms(plan) for _ in range(10))
    # Whatever an engine cannot do on this card or with these heads is a result of the comparison, too.
    except Exception as failure:
        torch.cuda.synchronize()
        return {"engine": engine, "failed": f"{type(failure).__name__}: {failure}"[:200]}
    gbps = step.heads.kv_bytes(num_tokens) / ms / 1e6
    return {"engine": engine, "ms": ms, "kv_gbps": gbps, "plan_ms": plan_ms, "error": error}


def _row(result: dict[str, Any], stock_ms: float | None, copy_gbps: float) -> list[str]:
    cells = [result["workload"], result["engine"]]
    if "failed" in result:
        return [*cells, result["failed"].splitlines()[0], *[""] * 5]
    ratio = f"{stock_ms / result['ms']:.2f}" if stock_ms else ""
    is_wrong = "" if result["error"] <= _MAX_ERROR else " WRONG"
    return [
        *cells,
        f"{result['ms']:.4f}",
        ratio,
        f"{result['kv_gbps']:,.0f}",
        f"{result['kv_gbps'] / copy_gbps:.0%}",
        f"{result['plan_ms']:.2f}",
        f"{result['error']:.4f}{is_wrong}",
    ]


def _host_ms(plan: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    plan()
    return 1e3 * (time.perf_counter() - start)


def _copy_gbps() -> float:
    """Bytes read and written by a copy within the card's memory, per nanosecond."""
    from tile_tuner import time_ms

    source = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_ms(lambda: target.copy_(source)) / 1e6


def _error(step: Step, out: torch.Tensor) -> float:
    """Of the first, a middle and the last sequence: largest difference, relative to the largest number."""
    layout, worst = step.layout, 0.0
    for s in {0, len(layout.kv_len) // 2, len(layout.kv_len) - 1}:
        first, last = layout.qo_indptr[s : s + 2].tolist()
        alone = replace(
            layout,
            table_rows=layout.table_rows[s : s + 1],
            kv_len=layout.kv_len[s : s + 1],
            qo_indptr=np.array([0, last - first], np.int32),
        )
        expected = reference.attention(step.q[first:last], step.k_cache, step.v_cache, step.table, alone, step.scale)
        difference = (out[first:last].double() - expected).abs().max() / expected.abs().max()
        # max() would drop a NaN.
        worst = float(difference) if not float(difference) <= worst else worst
    return worst


def _shape(step: Step) -> LayerShape:
    heads = step.heads
    return LayerShape(heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.dtype, step.scale)


def _ours(step: Step) -> tuple[Callable[[], None], Launch, int]:
    from batchllm.attention.triton_shared import SharedAttention

    out = torch.empty_like(step.q)
    attention = SharedAttention(_shape(step), step.q.device, max_rows=len(step.q))

    def launch() -> torch.Tensor:
        attention.run(step.q, step.k_cache, step.v_cache, out)
        return out

    return lambda: attention.plan(step.layout, step.table), launch, step.num_distinct_tokens


def _flashinfer(step: Step, max_levels: int) -> tuple[Callable[[], None], Launch, int]:
    from batchllm.attention.flashinfer_shared import FlashInferSharedAttention

    out = torch.empty_like(step.q)
    attention = FlashInferSharedAttention(_shape(step), step.q.device, max_levels=max_levels)

    def launch() -> torch.Tensor:
        attention.run(step.q, step.k_cache, step.v_cache, out)
        return out

    num_tokens = step.num_distinct_tokens if max_levels else int(step.layout.kv_len.sum(dtype=np.int64))
    return lambda: attention.plan(step.layout, step.table), launch, num_tokens


def _stock(step: Step) -> tuple[Callable[[], None], Launch, int]:
    """SGLang's Triton kernels, called as `TritonAttnBackend` calls them."""
    is_decode = len(step.q) == len(step.layout.kv_len)
    launch = _stock_decode(step) if is_decode else _stock_extend(step)
    return lambda: None, launch, int(step.layout.kv_len.sum(dtype=np.int64))


def _kv_lists(step: Step, num_kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_indptr int32 [S + 1] and kv_indices int64 of the first ``num_kv`` positions of each sequence."""
    table_rows = step.layout.table_rows.tolist()
    slots = [step.table[row, :count] for row, count in zip(table_rows, num_kv.tolist(), strict=True)]
    kv_indptr = torch.zeros(len(table_rows) + 1, dtype=torch.int32, device="cuda")
    kv_indptr[1:] = num_kv.cumsum(0)
    return kv_indptr, torch.cat(slots).long()


def _stock_decode(step: Step) -> Launch:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    max_splits, (num_rows, num_heads, head_dim) = 8, step.q.shape  # SGLang's default
    kv_len = torch.from_numpy(step.layout.kv_len).cuda()
    kv_indptr, kv_indices = _kv_lists(step, kv_len)
    num_splits = torch.empty(num_rows, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(step.q.device).multi_processor_count
    block = max(256, 1 << (num_rows - 1).bit_length())
    get_num_kv_splits_triton[(1,)](
        num_splits, kv_len, num_rows, 1, num_heads, step.heads.num_kv_heads, max_splits, processors, MAX_NUM_SEQ=block
    )
    logits = torch.empty(num_rows, num_heads, max_splits, head_dim, dtype=torch.float32, device="cuda")
    lse, out = logits.new_empty(num_rows, num_heads, max_splits), torch.empty_like(step.q)
    caches = step.k_cache, step.v_cache

    def launch() -> torch.Tensor:
        decode_attention_fwd(
            step.q, *caches, out, kv_indptr, kv_indices, logits, lse, num_splits, max_splits, step.scale, 1.0, 1.0
        )
        return out

    return launch


def _stock_extend(step: Step) -> Launch:
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    layout = step.layout
    num_queries = torch.from_numpy(np.diff(layout.qo_indptr))
    prefix_len = torch.from_numpy(layout.kv_len) - num_queries
    kv_indptr, kv_indices = _kv_lists(step, prefix_len.cuda())
    qo_indptr = torch.from_numpy(layout.qo_indptr).long().cuda()
    own = [
        step.table[row, start:end]
        for row, start, end in zip(layout.table_rows.tolist(), prefix_len.tolist(), layout.kv_len.tolist(), strict=True)
    ]
    own_slots = torch.cat(own).long()
    k, v, out = step.k_cache[own_slots], step.v_cache[own_slots], torch.empty_like(step.q)
    longest = int(num_queries.max())
    caches = step.k_cache, step.v_cache

    def launch() -> torch.Tensor:
        lists = qo_indptr, kv_indptr, kv_indices
        extend_attention_fwd(step.q, k, v, out, *caches, *lists, None, True, None, longest, 1.0, 1.0, step.scale)
        return out

    return launch


_STOCK = "sglang triton"

# Each makes, of a step: what to do once a step on the host, what once a layer, and the KV tokens that the latter reads.
CUDA_ENGINES: dict[str, Callable[[Step], tuple[Callable[[], None], Launch, int]]] = {
    "ours": _ours,
    _STOCK: _stock,
    "flashinfer": lambda step: _flashinfer(step, 0),
    "flashinfer cascade": lambda step: _flashinfer(step, 3),
}


if __name__ == "__main__":
    main()
