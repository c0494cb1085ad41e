"""Tile sizes of the Triton kernels: built-in ones by device generation, tuned ones from a cache of JSON files.

Knows: devices by name and compute capability, shapes of heads. Must not know: layouts, kernels.
Invariant: a tuned choice is used only on the device name, head shape, dtype and versions that it was timed with;
nothing is timed here (`eval/tile_tuner.py` does).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from batchllm.cache_folder import cache_folder
from batchllm.errors import ConfigError

# Raised with every change of the kernels that may change which sizes are best.
_KERNEL_VERSION = 1


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Sizes of tiles and of the launch.

    Attributes:
        block_wide: Query rows x GQA group of a tile of many rows; a power of two. Tiles of few rows have 16.
        block_n: KV tokens read at a time; a power of two from 16 on.
        min_split: KV ranges are not cut into splits shorter than this.
        tiles_per_program: Ranges are cut until each program has about so many tiles.
        programs_per_processor: Programs of the fixed grid for each streaming multiprocessor.
        num_warps: Warps of a program.
        num_stages: KV blocks in flight in a program.
        merge_slots: Partial results that the reduction reads at a time; a power of two.
    """

    block_wide: int
    block_n: int
    min_split: int
    tiles_per_program: int
    programs_per_processor: int
    num_warps: int
    num_stages: int
    merge_slots: int = 8


def default_config(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> TileConfig:
    """Give sizes for a device and head shape that were never tuned; their speed was not measured.

    With them no register spills (up to 16 query heads for each KV head), and all programs are resident at once.
    """
    if dtype == torch.float32:  # products of whole float32 take no matrix units, and many registers
        if head_dim > 128:
            return TileConfig(16, 16, 256, 2, 1, 4, 1)
        return TileConfig(32, 32, 256, 2, 1, *((8, 1) if head_dim > 32 else (4, 2)))
    is_hopper = capability >= (9, 0)
    if head_dim > 128:
        return TileConfig(64, 32, 256, 2, 1, 8, 2)
    return TileConfig(64, 64 if is_hopper else 32, 256, 2, 2, 4, 3 if is_hopper or head_dim <= 64 else 2)


def load_config(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> TileConfig:
    """The tuned sizes if there are any, else the built-in ones.

    Raises:
        ConfigError: The cache file is not what `eval/tile_tuner.py` writes.
    """
    if device.type != "cuda":
        return default_config((8, 0), head_dim, dtype)
    path = cache_path(device)
    key = config_key(num_heads, num_kv_heads, head_dim, dtype)
    try:
        entries = json.loads(path.read_text())
        tuned = TileConfig(**entries[key]) if key in entries else None
    except FileNotFoundError:
        tuned = None
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of tuned tile sizes ({error}); delete it") from None
    return tuned or default_config(torch.cuda.get_device_capability(device), head_dim, dtype)


def cache_path(device: torch.device) -> Path:
    """One file per device name, e.g. ``~/.cache/batchllm/attention/nvidia-h200.json``."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return cache_folder("attention") / f"{name}.json"


def config_key(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> str:
    """What a choice depends on besides the device, e.g. ``32/8/128 bfloat16 kernel 1 triton 3.6.0``."""
    heads = f"{num_heads}/{num_kv_heads}/{head_dim}"
    return f"{heads} {str(dtype).removeprefix('torch.')} kernel {_KERNEL_VERSION} triton {triton.__version__}"
