"""The C++ kernels of this folder, loaded for the processor at hand, as functions of torch tensors.

They are built when the package is installed (`pyproject.toml`), where a C++ compiler is at hand; `load` says why not.
OpenMP runs them with as many threads as torch has (`torch.set_num_threads`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batchllm.kernels.bindings import DTYPES, Functions, Layer, Linear, Rows, Step, bind

_LEVELS = ("avx512", "avx2", "default")
"""What torch calls the instruction sets, best first, each with those that run on it too."""
_PAIRED = "avx512_bf16"
"""AVX-512 with products of bfloat16, two numbers at a time."""
_TRIAL_SHAPE = (48, 512, 128)
"""Rows, inputs and outputs."""
_NUM_TRIALS = 8
MIN_GAIN = 1.25
"""How many times as fast another way must be to be taken: a choice that changes from start to start changes answers."""

HEAD_DIMS = frozenset({32, 64, 80, 96, 128, 256})
"""Sizes of heads that the attention kernel is compiled for."""
MAX_GROUP = 96
"""Most query heads of a KV head."""


class AttentionStep:
    """One step's layout, ready for the kernel. Keeps what it points to alive.

    Args:
        table: [rows, positions] int32 on the CPU: slots of KV.
        **arrays: What the kernel's step has, by name: of `batchllm.attention.AttentionLayout`, and ``row_place``,
            ``row_token`` and ``row_visible_end`` of the query rows in the layout's order (see ``attention.cpp``).

    Attributes:
        num_query_tokens: Rows of the step.
    """

    def __init__(self, table: torch.Tensor, **arrays: np.ndarray[Any, np.dtype[np.integer[Any]]]) -> None:
        if table.dtype != torch.int32 or table.stride(1) != 1 or table.device.type != "cpu":
            raise ValueError(f"the table of slots must be int32 on the CPU with contiguous rows, not {table.dtype}")
        self._arrays = {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()}
        self._table = table
        self.num_query_tokens = len(self._arrays["row_token"])
        self.struct = Step(
            num_segments=len(self._arrays["segment_table_row"]),
            num_rows=self.num_query_tokens,
            table=table.data_ptr(),
            table_stride=table.stride(0),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A linear layer's weight as the kernel reads it, in as many bytes.

    Attributes:
        data: The numbers, 1-D, of the weight's dtype.
        shape: The weight's: outputs, inputs.
        is_gated: The layer's first half of outputs goes through SiLU and is multiplied with the second half.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    is_gated: bool


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """The kernels of one instruction set.

    Tensors are on the CPU, float32 or bfloat16, all of one call of the same dtype, contiguous in the last dimension.

    Attributes:
        level: ``avx512_bf16``, ``avx512``, ``avx2`` or ``default``.
    """

    level: str
    _functions: Functions

    def function(self, name: str, dtype: torch.dtype) -> Any:
        """The function of that name in `bindings`, for tensors of that type."""
        return self._functions.of_dtype[name, dtype]

    def pack(self, weight: torch.Tensor, is_gated: bool = False) -> PackedWeight:
        """What `linear` reads fastest, of a weight [outputs, inputs]."""
        num_outputs, num_inputs = weight.shape
        if weight.stride(1) != 1:
            raise ValueError(f"a weight whose rows are not contiguous: strides {weight.stride()}")
        data = weight.new_empty(self._functions.packed_size(num_outputs, num_inputs, is_gated))
        self._functions.of_dtype["pack", weight.dtype](
            weight.data_ptr(), weight.stride(0), data.data_ptr(), num_outputs, num_inputs, is_gated
        )
        return PackedWeight(data, (num_outputs, num_inputs), is_gated)

    def unpack(self, packed: PackedWeight, weight: torch.Tensor) -> None:
        """Write a packed weight into a tensor of its shape and dtype."""
        if tuple(weight.shape) != packed.shape or weight.dtype != packed.data.dtype or weight.stride(1) != 1:
            raise ValueError(f"a weight of {packed.shape} {packed.data.dtype} into {weight.shape} {weight.dtype}")
        self._functions.of_dtype["unpack", weight.dtype](
            packed.data.data_ptr(), weight.data_ptr(), weight.stride(0), *packed.shape, packed.is_gated
        )

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ weight.T + bias``, added up in float32; of a weight packed as gated, SwiGLU's activation of that.

        A row's result does not depend on how many rows there are.

        Args:
            x: [num_rows, num_inputs].
            weight: Packed, or [num_outputs, num_inputs] of the same dtype.
            bias: [num_outputs] of the same dtype.

        Returns:
            [num_rows, num_outputs], or half as many outputs where the weight is gated.

        Raises:
            ValueError: Shapes or dtypes do not belong together.
        """
        is_packed = isinstance(weight, PackedWeight)
        data = weight.data if isinstance(weight, PackedWeight) else weight
        is_gated = isinstance(weight, PackedWeight) and weight.is_gated
        num_outputs, num_inputs = weight.shape
        num_rows, width = x.shape
        rows_stride, element_stride = x.stride()
        dtype = x.dtype
        if width != num_inputs or data.dtype != dtype or element_stride != 1 or data.stride(-1) != 1:
            raise ValueError(f"a product of {dtype} {tuple(x.shape)} with {data.dtype} {tuple(weight.shape)}")
        if bias is not None and (bias.shape != (num_outputs,) or bias.dtype != dtype):
            raise ValueError(f"a bias of {bias.dtype} {tuple(bias.shape)} for {num_outputs} outputs of {dtype}")
        num_columns = num_outputs // 2 if is_gated else num_outputs
        out = x.new_empty(num_rows, num_columns)
        if num_rows:
            layer = Linear(
                x.data_ptr(),
                rows_stride,
                data.data_ptr(),
                0 if is_packed else data.stride(0),
                None if bias is None else bias.data_ptr(),
                out.data_ptr(),
                num_columns,
                num_rows,
                num_inputs,
                num_outputs,
                is_gated,
            )
            self._functions.of_dtype["linear", dtype](layer)
        return out

    def attention(
        self,
        step: AttentionStep,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        logit_cap: float = 0.0,
        window: int = 0,
    ) -> None:
        """Attention of one layer, shared segments read once for their readers.

        Args:
            step: From the step's layout.
            query: [num_query_tokens, num_heads, head_dim].
            key_cache: [num_slots, num_kv_heads, head_dim].
            value_cache: The same shape.
            output: The shape of ``query``; is overwritten.
            scale: Factor of the scores.
            logit_cap: ``cap * tanh(score / cap)`` of each scaled score; 0: none.
            window: Tokens that a token sees, itself included; 0: all before it.

        Raises:
            ValueError: The heads have a shape, or the tensors a dtype, that `supports_heads` denies.
        """
        _, num_heads, head_dim = query.shape
        num_kv_heads = key_cache.shape[1]
        function = self._functions.of_dtype.get(("attention", query.dtype))
        if function is None or key_cache.dtype != query.dtype or query.shape[0] < step.num_query_tokens:
            raise ValueError(f"attention of {query.dtype} queries {tuple(query.shape)} over {key_cache.dtype} KV")
        layer = Layer(
            query=query.data_ptr(),
            query_stride=query.stride(0),
            key_cache=key_cache.data_ptr(),
            value_cache=value_cache.data_ptr(),
            key_stride=key_cache.stride(0),
            value_stride=value_cache.stride(0),
            output=output.data_ptr(),
            output_stride=output.stride(0),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=scale,
            logit_cap=logit_cap,
            window=window,
        )
        if function(step.struct, layer):
            raise ValueError(f"{num_heads} heads over {num_kv_heads} of {head_dim} elements are not supported")

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """RMS norm over the last dimension; with a residual, that of ``residual += x``, in place."""
        size = x.shape[-1]
        out = torch.empty_like(x)
        self._functions.of_dtype["rms_norm", x.dtype](
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            epsilon,
        )
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """``silu(x[..., :n]) * x[..., n:]`` of a contiguous [..., 2 n]."""
        size = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], size)
        self._functions.of_dtype["silu_and_mul", x.dtype](
            x.data_ptr(), out.data_ptr(), out.numel() // max(1, size), size
        )
        return out

    def rotary_embedding(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        *,
        head_dim: int,
        rotary_dim: int,
        is_neox: bool,
    ) -> None:
        """Turn queries and keys in place.

        Args:
            positions: [num_tokens] int64.
            query: [num_tokens, num_heads * head_dim].
            key: [num_tokens, num_kv_heads * head_dim].
            cos_sin_cache: [num_positions, rotary_dim], cosines before sines.
            head_dim: Width of queries and keys.
            rotary_dim: Elements of a head that are turned, the first ones.
            is_neox: Pairs are halves of a head; else neighbours.

        Raises:
            IndexError: The cache lacks a position.
        """
        lacks_one = self._functions.of_dtype["rotary_embedding", query.dtype](
            positions.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            query.stride(0),
            key.stride(0),
            cos_sin_cache.data_ptr(),
            cos_sin_cache.shape[0],
            positions.shape[0],
            query.shape[1] // head_dim,
            key.shape[1] // head_dim,
            head_dim,
            rotary_dim,
            is_neox,
        )
        if lacks_one:
            raise lacks_position(positions, cos_sin_cache)

    def store_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """``key_cache[slots] = keys``, and the same of values; ``slots`` int64, a row's elements contiguous."""
        if slots.shape[0]:
            self._functions.store_kv(
                _rows(keys, key_cache), _rows(values, value_cache), slots.data_ptr(), slots.shape[0]
            )


def lacks_position(positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> IndexError:
    """The error of a step with a position that the rotary embedding's cache does not have."""
    return IndexError(f"positions {int(positions.min())} to {int(positions.max())}: the model has {len(cos_sin_cache)}")


def _rows(rows: torch.Tensor, cache: torch.Tensor) -> Rows:
    size = rows.element_size()
    num_elements = rows.numel() // rows.shape[0]
    return Rows(rows.data_ptr(), rows.stride(0) * size, cache.data_ptr(), cache.stride(0) * size, num_elements * size)


def supports_heads(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the attention kernel takes heads of this shape and dtype."""
    return head_dim in HEAD_DIMS and num_heads // num_kv_heads <= MAX_GROUP and dtype in DTYPES


def levels() -> tuple[str, ...]:
    """The instruction sets that this processor has, best first."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    best = next((i for i, name in enumerate(_LEVELS) if capability.startswith(name)), len(_LEVELS) - 1)
    has_pairs = best == 0 and torch.cpu._is_avx512_bf16_supported()
    return ((_PAIRED,) if has_pairs else ()) + _LEVELS[best:]


@functools.cache
def load(level: str | None = None) -> CpuKernels | str:
    """The kernels for this processor, or in one sentence why there are none.

    Products of bfloat16 are measured: some processors that have instructions for them are faster without.

    Args:
        level: An instruction set that the processor has; the fastest one by default.
    """
    problems = []
    for name in levels() if level is None else (level,):
        spec = importlib.util.find_spec(f"batchllm.kernels._cpu_{name}")
        if spec is None or spec.origin is None:
            problems.append(f"{name} was not built")
            continue
        try:
            library = ctypes.CDLL(spec.origin)
        except OSError as error:
            problems.append(f"{name}: {error}")
            continue
        kernels = CpuKernels(name, bind(library))
        if level is None and name == _PAIRED:
            without = load(_LEVELS[0])
            if isinstance(without, CpuKernels):
                paired_s, plain_s = best_seconds(_trial(kernels), _trial(without))
                return without if MIN_GAIN * plain_s < paired_s else kernels
        return kernels
    remedy = "install a C++ compiler (Debian: apt install g++) and batchllm again"
    return f"no compiled kernels ({', '.join(problems)}): {remedy}"


def _trial(kernels: CpuKernels) -> Callable[[], object]:
    """A product of bfloat16 that is small enough for one thread."""
    num_rows, num_inputs, num_outputs = _TRIAL_SHAPE
    x = torch.ones(num_rows, num_inputs, dtype=torch.bfloat16)
    weight = kernels.pack(torch.ones(num_outputs, num_inputs, dtype=torch.bfloat16))
    return lambda: kernels.linear(x, weight)


def best_seconds(*ways: Callable[[], object]) -> list[float]:
    """What each way takes, the best of some trials; they take turns."""
    best = [float("inf")] * len(ways)
    for _ in range(_NUM_TRIALS):
        for i, way in enumerate(ways):
            started = time.perf_counter()
            way()
            best[i] = min(best[i], time.perf_counter() - started)
    return best
