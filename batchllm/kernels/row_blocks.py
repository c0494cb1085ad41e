"""Rows that a matrix product is computed for: few different numbers of them, with tensors that have room for these."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

_BLOCKS = ((96, 6), (192, 12), (384, 24), (768, 48))
"""Up to so many rows a product has a multiple of so many: an eighth too many at most."""
_LARGE_BLOCK = 108
"""Of larger ones: steps of 2,048 and 4,096 tokens, which are full chunks, are all but a multiple of it."""
_WHOLE = "_batchllm_whole"
"""Of a tensor with room behind it: the tensor that it is the first rows of."""
_DTYPES = (torch.float32, torch.bfloat16)
_BUFFERS: dict[torch.dtype, torch.Tensor] = {}
"""For inputs that have no room behind them, by type. A new tensor each time costs as much as the product."""


@functools.cache
def padded_rows(num_rows: int) -> int:
    """Rows that a matrix product is computed for.

    oneDNN compiles code for each number of rows, a millisecond and half a megabyte a layer shape, and keeps it of 1,024
    shapes. Steps have any number of rows: with all of them the code is compiled again and again, and memory grows for
    hours. Its kernels compute six rows at a time, and add up the last three or fewer of others in another order: with
    multiples of six a row's product does not depend on how many rows are beside it. (In layers of more than 512 float32
    inputs those of more than 336 rows differ from those of fewer on some processors.)
    """
    if num_rows <= 4:
        return 4
    block = next((block for most, block in _BLOCKS if num_rows <= most), _LARGE_BLOCK)
    return -(-num_rows // block) * block


def empty_rows(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU; of ``[num_rows, width]``, with room for `padded_rows` behind its own, zeros there."""
    if len(shape) != 2:
        return torch.empty(shape, dtype=dtype)
    num_own, width = shape
    num_rows = padded_rows(num_own)
    rows = torch.empty((num_rows, width), dtype=dtype)
    if num_rows == num_own:
        return rows
    row_bytes = width * dtype.itemsize
    ctypes.memset(rows.data_ptr() + num_own * row_bytes, 0, (num_rows - num_own) * row_bytes)
    own = rows.narrow(0, 0, num_own)
    setattr(own, _WHOLE, rows)
    return own


def padded(x: torch.Tensor) -> torch.Tensor:
    """``x`` with rows behind it, whatever they hold: ``[padded_rows(len(x)), x.shape[1]]``, until the next call.

    No element is copied where `empty_rows` has made ``x``, or where its storage goes on behind it.
    """
    whole: torch.Tensor | None = getattr(x, _WHOLE, None)
    if whole is not None:
        return whole
    if x.dim() != 2 or x.dtype not in _DTYPES or x.device.type != "cpu":
        return x
    (num_own, width), num_rows = x.shape, padded_rows(len(x))
    if num_rows == num_own:
        return x
    num_elements = num_rows * width
    num_there = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    if num_elements <= num_there and x.is_contiguous():
        return x.as_strided((num_rows, width), (width, 1))
    buffer = _BUFFERS.get(x.dtype)
    if buffer is None or len(buffer) < num_elements:
        buffer = _BUFFERS[x.dtype] = x.new_zeros(num_elements)
    copy = buffer[:num_elements].view(num_rows, width)
    copy[:num_own] = x
    return copy
