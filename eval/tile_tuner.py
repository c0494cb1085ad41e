"""Times tile sizes on made-up steps, and keeps the best for the device and head shape.

Knows: a CUDA device. Must not know: engines. Invariant: nothing calls it by itself - it takes minutes, most of them to
compile, and would break a graph capture; whoever starts an engine or a benchmark asks for it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from batchllm.attention.base import LayerShape
from batchllm.attention.layout import AttentionLayout, PrefixPaths, plan_layout
from batchllm.attention.tile_config import TileConfig, cache_path, config_key, default_config
from batchllm.attention.triton_shared import SharedAttention
from batchllm.trace.whole_file import write_whole

# Query heads, KV heads, head_dim, dtype.
_Heads = tuple[int, int, int, torch.dtype]

# Decode steps: levels of prefixes, readers of each innermost one, tokens that each reads by itself.
_MadeUp = tuple[Sequence[tuple[int, int]], int, int]
_STEPS: tuple[_MadeUp, ...] = (
    (((16, 2000),), 16, 256),
    (((1, 16_000),), 16, 256),
    (((4, 2000), (4, 1000)), 16, 100),
)

_CUTS = {"tiles_per_program": (1, 2, 3, 4), "min_split": (128, 256, 512), "merge_slots": (2, 4, 8, 16)}

# Kernels take about all registers that a thread can have: this many warps fill a streaming multiprocessor.
_MAX_WARPS = 8

# Most that any device has per streaming multiprocessor; a launch reports what does not fit on this one.
_MAX_SHARED_MEMORY = 228 << 10

_NUM_WARMUPS, _NUM_TIMED = 3, 20

# Each of them has a CUDA context of its own, of about half a GiB.
_MAX_WORKERS = 8


def candidates(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[TileConfig]:
    """The built-in sizes first, then what is near them."""
    default = default_config(capability, head_dim, dtype)
    configs = [default]
    for block_n, (block_wide, num_warps), num_stages, programs in product(
        (32, 64, 128), ((64, 4), (64, 8), (128, 8)), (2, 3, 4), (1, 2)
    ):
        # Queries, and K and V of each stage but the one that is computed on.
        shared_memory = dtype.itemsize * head_dim * (block_wide + 2 * (num_stages - 1) * block_n)
        if programs * num_warps > _MAX_WARPS or programs * shared_memory > _MAX_SHARED_MEMORY:
            continue
        config = replace(
            default,
            block_wide=block_wide,
            block_n=block_n,
            programs_per_processor=programs,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        if config not in configs:
            configs.append(config)
    return configs


def tune(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    report: Callable[[str], None] = lambda line: None,
) -> TileConfig:
    """Time the candidates, keep the one of the least geometric mean, and save it for `load_config`.

    Args:
        device: The current CUDA device.
        num_heads: As of `SharedAttention`, and so are the next three.
        num_kv_heads: KV heads.
        head_dim: Of queries, keys and values.
        dtype: Of queries and caches.
        report: Gets a line for each candidate.

    Raises:
        RuntimeError: No candidate ran on the device, or a graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tile sizes cannot be tuned while a CUDA graph is captured")
    times: dict[TileConfig, float] = {}
    heads = num_heads, num_kv_heads, head_dim, dtype

    def time_all(configs: Iterable[TileConfig]) -> TileConfig:
        configs = list(configs)
        _compile_all(device, heads, configs)
        for config in configs:
            try:
                ms = [_time_step(device, heads, config, step) for step in _STEPS]
            except OutOfResources as error:
                report(f"{config}: {error}")
                continue
            times[config] = statistics.geometric_mean(ms)
            report(f"{config}: {', '.join(f'{each:.3f}' for each in ms)} ms")
        if not times:
            raise RuntimeError(f"none of the tile sizes fits on {torch.cuda.get_device_name(device)}")
        return min(times, key=times.__getitem__)

    best = time_all(candidates(torch.cuda.get_device_capability(device), head_dim, dtype))
    # How ranges are cut depends little on the sizes: one after the other rather than every combination.
    for name, values in _CUTS.items():
        best = time_all(replace(best, **{name: value}) for value in values if getattr(best, name) != value)
    path = save_config(device, num_heads, num_kv_heads, head_dim, dtype, best)
    report(f"best: {best}, written to {path}")
    return best


def save_config(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, config: TileConfig
) -> Path:
    """Add a tuned choice to the device's file; others stay. Returns the file."""
    path = cache_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[config_key(num_heads, num_kv_heads, head_dim, dtype)] = asdict(config)
    write_whole(path, [json.dumps(entries, indent=1).encode()])
    return path


def _compile_all(device: torch.device, heads: _Heads, configs: list[TileConfig]) -> None:
    """Compile for all of them at once, into Triton's cache: one after the other takes seconds each."""
    num_workers = min(len(configs), os.cpu_count() or 1, _MAX_WORKERS)
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_launch_once, device.index, heads, config) for config in configs]
    for each in done:
        if not isinstance(each.exception(), OutOfResources | None):  # timing reports what does not fit
            each.result()


def _launch_once(device_index: int, heads: _Heads, config: TileConfig) -> None:
    torch.cuda.set_device(device_index)
    launch = _made_up_launch(torch.device("cuda", device_index), heads, config, _STEPS[0])
    launch()
    torch.cuda.synchronize()


def made_up_step(
    levels: Sequence[tuple[int, int]], readers_per_leaf: int, private_len: int, query_len: int = 1
) -> tuple[AttentionLayout, torch.Tensor, int]:
    """A step of equally nested groups; neighbours in the batch are of different groups.

    Args:
        levels: Of the prefixes of each level, outermost first, how many extend each prefix above, and by how many
            tokens. Empty: nothing is shared.
        readers_per_leaf: Sequences that share each innermost prefix.
        private_len: Tokens of each sequence beyond, its query tokens included.
        query_len: Query tokens of each.

    Returns:
        The layout, the request-to-token table (int32 on the CPU, slots in random order), and the number of slots.
    """
    num_leaves = math.prod(fanout for fanout, _ in levels)
    num_sequences = num_leaves * readers_per_leaf
    leaf = np.arange(num_sequences) % num_leaves
    random = np.random.default_rng(0)
    counts = np.cumprod([fanout for fanout, _ in levels]).tolist()
    sizes = [count * length for count, (_, length) in zip(counts, levels, strict=True)]
    num_slots = sum(sizes) + num_sequences * private_len + 1
    # Slot 0 is the engine's padding.
    *shared, own = np.split(random.permutation(num_slots - 1).astype(np.int32) + 1, np.cumsum(sizes, dtype=np.int64))
    paths, ids, columns, prefix_len = PrefixPaths(), [-1], [], 0
    for count, (fanout, length), slots in zip(counts, levels, shared, strict=True):
        prefix_len += length
        ids = [paths.add(ids[node // fanout], prefix_len) for node in range(count)]
        columns.append(slots.reshape(count, length)[leaf // (num_leaves // count)])
    columns.append(own.reshape(num_sequences, private_len))
    layout = plan_layout(
        table_rows=np.arange(num_sequences, dtype=np.int32),
        qo_len=np.full(num_sequences, query_len, np.int32),
        kv_len=np.full(num_sequences, prefix_len + private_len, np.int32),
        leaf=np.array(ids, np.int32)[leaf],
        paths=paths,
    )
    return layout, torch.from_numpy(np.hstack(columns)), num_slots


def time_ms(launch: Callable[[], object], num_timed: int = _NUM_TIMED) -> float:
    """Median milliseconds of a launch on the current CUDA device, from a CUDA graph, with a cold L2 cache."""
    for _ in range(_NUM_WARMUPS):
        launch()
    torch.cuda.synchronize()
    # As a decode step runs; otherwise the time that Python takes for the launch would count.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    # Larger than any L2: a layer finds nothing there, for the layer before it read other KV.
    evict = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_timed)]
    for begin, end in events:
        evict.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in events))


def _time_step(device: torch.device, heads: _Heads, config: TileConfig, step: _MadeUp) -> float:
    return time_ms(_made_up_launch(device, heads, config, step))


def _made_up_launch(device: torch.device, heads: _Heads, config: TileConfig, step: _MadeUp) -> Callable[[], None]:
    num_heads, num_kv_heads, head_dim, dtype = heads
    layout, table, num_slots = made_up_step(*step)
    num_rows = int(layout.qo_indptr[-1])
    attention = SharedAttention(LayerShape(*heads, head_dim**-0.5), device, max_rows=num_rows, config=config)
    q = torch.randn(num_rows, num_heads, head_dim, dtype=dtype, device=device)
    k_cache, v_cache = torch.randn(2, num_slots, num_kv_heads, head_dim, dtype=dtype, device=device)
    attention.plan(layout, table.to(device))
    output = torch.empty_like(q)
    return lambda: attention.run(q, k_cache, v_cache, output)
