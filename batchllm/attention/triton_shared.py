"""Attention that loads a shared prefix once for ``block_wide // group`` readers, as one Triton launch and a reduction.

Knows: the layout of a step (`plan`, on the host, once a step), and its tensors (`run`, once a layer). Must not know:
SGLang. Invariant: after `plan(layout)`, `run` computes attention of exactly that layout, whatever was planned before;
between two `plan` calls `run` takes nothing from the host, so that a CUDA graph can hold it.

The lists of a step go to the device in one copy, into buffers that stay where they are. A graph is captured with any
layout of as many query tokens; for a replay, `plan` the new layout on the replay's stream and replay::

    attention = SharedAttention(shape, device, max_rows=max_bs, frozen=True)
    attention.plan(layout, table, num_rows=bs)           # capture: any layout, say one without segments
    attention.run(query, key_cache, value_cache, output)               # compiles, which a capture cannot
    with torch.cuda.graph(graph):
        for ...: attention.run(query, key_cache, value_cache, output)
    attention.plan(next_layout, table, num_rows=bs)      # replay: other lengths, other groups, the same table tensor
    graph.replay()
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton

from batchllm.attention import triton_kernels
from batchllm.attention.base import LayerShape
from batchllm.attention.layout import AttentionLayout
from batchllm.attention.tile_config import TileConfig, load_config
from batchllm.attention.work_list import TILE_FIELDS, TileShape, WorkList, build_work_list

# Host buffers in turn: the copy of a step may still wait in the stream while the next steps are planned.
_NUM_HOST_BUFFERS = 4

# Lists begin at multiples of this many int32: Triton compiles another kernel for pointers not aligned to 16 bytes.
_ALIGNMENT = 32

# The reduction reads slots x heads x head_dim numbers at a time.
_MERGE_ELEMENTS = 2048


class SharedAttention:
    """One set of buffers: the steps that it plans follow each other on one stream.

    Attributes:
        config: Tile sizes; fixed, as a graph holds kernels of these sizes.
        work_list: Tiles of the step that was planned last.
    """

    def __init__(
        self,
        shape: LayerShape,
        device: torch.device | str,
        *,
        max_rows: int,
        max_slots: int | None = None,
        frozen: bool = False,
        config: TileConfig | None = None,
    ) -> None:
        """Allocate the buffers.

        Args:
            shape: The layers: float16, bfloat16 or float32, head_dim a power of two from 16 on, without a window.
            device: Where everything is.
            max_rows: Most query tokens of a step, padding included.
            max_slots: Room for partial results, each of ``num_heads * head_dim`` float32.
            frozen: Buffers never grow, so that captured graphs stay valid; a step that needs more slots is split
                less. Otherwise `plan` makes larger ones when it must.
            config: Tile sizes; as tuned for the device, or the built-in ones, if not given.

        Raises:
            ValueError: The kernels cannot compute layers of this shape.
        """
        head_dim = shape.head_dim
        if head_dim < 16 or head_dim & (head_dim - 1) or shape.window:
            raise ValueError(
                f"head_dim {head_dim}, window {shape.window}: must be a power of two from 16 on, and no window"
            )
        self._num_heads, self._num_kv_heads, self._head_dim = shape.num_heads, shape.num_kv_heads, head_dim
        self._scale, self._logit_cap = shape.scale, shape.logit_cap
        self._dtype, self._device, self._frozen = shape.dtype, torch.device(device), frozen
        self.config = config or load_config(self._device, shape.num_heads, shape.num_kv_heads, head_dim, shape.dtype)
        self._num_programs = self.config.programs_per_processor * _num_processors(self._device)
        self._shape = self._tile_shape()
        self._max_rows, self._num_rows = max_rows, 0
        self.work_list: WorkList | None = None
        self._table: torch.Tensor | None = None
        if max_slots is None:
            max_slots = max(4096, 8 * max_rows) if frozen else 1
        self._allocate_slots(max_slots)
        # Every row in a tile of its own on each of some levels, and the splits that fill the device twice.
        self._allocate_lists(4 * max_rows + 2 * self._shape.target_tiles)

    def _tile_shape(self) -> TileShape:
        self._group = self._num_heads // self._num_kv_heads
        # `tl.dot` takes 16 rows at least.
        self._block_narrow = max(16, triton.next_power_of_2(self._group))
        self._block_wide = max(self.config.block_wide, self._block_narrow)
        heads_at_a_time = max(1, _MERGE_ELEMENTS // (self.config.merge_slots * self._head_dim))
        self._merge_heads = min(triton.next_power_of_2(self._num_heads), heads_at_a_time)
        return TileShape(
            rows_wide=self._block_wide // self._group,
            rows_narrow=self._block_narrow // self._group,
            block_n=self.config.block_n,
            min_split=self.config.min_split,
            # A partial result of one query head is as large as one token's KV in 16 bits: read four times as much.
            min_split_wide=max(self.config.min_split, 4 * self._block_wide),
            target_tiles=self.config.tiles_per_program * self._num_programs,
        )

    def _allocate_slots(self, num_slots: int) -> None:
        self._part_o = torch.empty(num_slots, self._num_heads, self._head_dim, dtype=torch.float32, device=self._device)
        self._part_lse = torch.empty(num_slots, self._num_heads, dtype=torch.float32, device=self._device)

    def _allocate_lists(self, max_tiles: int) -> None:
        """One buffer: counts, q_rows, q_pos, slot_indptr, and the tiles, whose number varies most, at the end."""
        stride = -(-(self._max_rows + 1) // _ALIGNMENT) * _ALIGNMENT
        self._rows_at = [_ALIGNMENT + index * stride for index in range(3)]
        self._tiles_at = _ALIGNMENT + 3 * stride
        self._max_tiles = max_tiles
        size = self._tiles_at + max_tiles * TILE_FIELDS
        is_cuda = self._device.type == "cuda"
        self._lists = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda) for _ in range(_NUM_HOST_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_HOST_BUFFERS)] if is_cuda else []
        self._turn = 0
        self._counts = self._lists[:_ALIGNMENT]
        self._q_rows, self._q_pos, self._slot_indptr = (self._lists[at : at + stride] for at in self._rows_at)
        self._tiles = self._lists[self._tiles_at :]

    def plan(self, layout: AttentionLayout, table: torch.Tensor, num_rows: int | None = None) -> None:
        """Cut a step into tiles and put the lists on the device, on the current stream, without waiting for it.

        Args:
            layout: The step.
            table: int32 [table rows, positions] KV slots; rows contiguous. Read by `run`, so it must not change until
                the last of the step; and it must be the same tensor whenever a captured graph is replayed.
            num_rows: Rows of a CUDA graph, where they are more than the layout's query tokens: output is 0 in the
                rows beyond these.

        Raises:
            ValueError: More rows than ``max_rows``; if frozen, more partial results or tiles than there is room for;
                or the table is not of int32 with contiguous rows.
        """
        if table.dtype != torch.int32 or table.stride(1) != 1:
            raise ValueError(f"the table must be of int32 with contiguous rows, not {table.dtype} {table.stride()}")
        num_tokens = int(layout.qo_indptr[-1])
        num_rows = num_tokens if num_rows is None else num_rows
        if not num_tokens <= num_rows <= self._max_rows:
            raise ValueError(f"{num_tokens} query tokens in {num_rows} rows; at most {self._max_rows} were allowed for")
        work = build_work_list(layout, self._shape, self._num_kv_heads, len(self._part_o) if self._frozen else None)
        self._make_room(work)
        self._turn = (self._turn + 1) % _NUM_HOST_BUFFERS
        if self._copied:
            self._copied[self._turn].synchronize()
        host = self._host[self._turn]
        self._fill(host.numpy(), work, num_rows)
        used = self._tiles_at + work.tiles.size
        self._lists[:used].copy_(host[:used], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        self.work_list, self._table, self._num_rows = work, table, num_rows

    def _make_room(self, work: WorkList) -> None:
        num_tiles = len(work.tiles)
        if num_tiles > self._max_tiles:
            if self._frozen:
                raise ValueError(f"the step has {num_tiles} tiles, but there is room for {self._max_tiles}")
            self._allocate_lists(num_tiles + num_tiles // 2)
        if work.num_slots > len(self._part_o):
            self._allocate_slots(work.num_slots + work.num_slots // 4)

    def _fill(self, host: np.ndarray[tuple[int], np.dtype[np.int32]], work: WorkList, num_rows: int) -> None:
        num_tokens = len(work.q_rows)
        host[0], host[1] = len(work.tiles), work.num_wide
        rows_at, pos_at, indptr_at = self._rows_at
        host[rows_at : rows_at + num_tokens] = work.q_rows
        host[rows_at + num_tokens : rows_at + num_rows] = np.arange(num_tokens, num_rows, dtype=np.int32)
        host[pos_at : pos_at + num_tokens] = work.q_pos
        host[indptr_at : indptr_at + num_tokens + 1] = work.slot_indptr
        host[indptr_at + num_tokens + 1 : indptr_at + num_rows + 1] = work.num_slots
        host[self._tiles_at : self._tiles_at + work.tiles.size] = work.tiles.reshape(-1)

    def run(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Compute one layer of the planned step; see `StepAttention`. The last dimension of all tensors is dense."""
        self._check(query, key_cache, value_cache, output)
        self._attend(query, key_cache, value_cache)
        triton_kernels.merge_slots[(self._num_rows, triton.cdiv(self._num_heads, self._merge_heads))](
            self._part_o,
            self._part_lse,
            self._slot_indptr,
            self._q_rows,
            output,
            output.stride(0),
            output.stride(1),
            NUM_HEADS=self._num_heads,
            HEAD_DIM=self._head_dim,
            BLOCK_SLOTS=self.config.merge_slots,
            BLOCK_HEADS=self._merge_heads,
        )

    def _attend(self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        assert self._table is not None
        triton_kernels.attend_tiles[(self._num_programs,)](
            query,
            key_cache,
            value_cache,
            self._table,
            self._counts,
            self._tiles,
            self._q_rows,
            self._q_pos,
            self._slot_indptr,
            self._part_o,
            self._part_lse,
            self._scale * math.log2(math.e),
            query.stride(0),
            query.stride(1),
            key_cache.stride(0),
            key_cache.stride(1),
            value_cache.stride(0),
            value_cache.stride(1),
            self._table.stride(0),
            NUM_HEADS=self._num_heads,
            GROUP=self._group,
            HEAD_DIM=self._head_dim,
            BLOCK_WIDE=self._block_wide,
            BLOCK_NARROW=self._block_narrow,
            BLOCK_N=self.config.block_n,
            TILE_FIELDS=TILE_FIELDS,
            LOGIT_CAP=self._logit_cap,
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
        )

    def _check(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        for tensor in (query, output):
            if (
                self._table is None
                or len(tensor) < self._num_rows
                or tensor.shape[1:] != (self._num_heads, self._head_dim)
            ):
                planned = (self._num_rows, self._num_heads, self._head_dim)
                raise ValueError(f"planned for query and output {planned}, got {tuple(tensor.shape)}")
        for tensor in (key_cache, value_cache):
            if tensor.shape[1:] != (self._num_kv_heads, self._head_dim):
                of_slot = (self._num_kv_heads, self._head_dim)
                raise ValueError(f"a cache is {tuple(tensor.shape)}, not [slots, {of_slot[0]}, {of_slot[1]}]")
        for tensor in (query, key_cache, value_cache, output):
            if tensor.dtype != self._dtype or tensor.stride(-1) != 1:
                raise ValueError(
                    f"tensors must be {self._dtype} with a dense last dimension, not {tensor.dtype} {tensor.stride()}"
                )


def _num_processors(device: torch.device) -> int:
    # Elsewhere there is only the interpreter: few programs with many tiles each, which is what is to be tested.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
