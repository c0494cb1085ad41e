"""The functions of a compiled library of kernels, as ctypes knows them. Structures are those of the C++ files.

Knows: the C++ functions' names and arguments. Must not know: which library is loaded, shapes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""By type, how the names of its functions end."""
_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Step(ctypes.Structure):
    _fields_ = [  # ctypes reads a plain list
        ("num_segments", _I64),
        ("num_rows", _I64),
        ("table", _P),
        ("table_stride", _I64),
        ("row_place", _P),
        ("row_token", _P),
        ("row_visible_end", _P),
        ("table_rows", _P),
        ("order", _P),
        ("private_start", _P),
        ("segment_readers", _P),
        ("segment_span", _P),
        ("segment_table_row", _P),
    ]


class Layer(ctypes.Structure):
    _fields_ = [  # ctypes reads a plain list
        ("query", _P),
        ("query_stride", _I64),
        ("key_cache", _P),
        ("value_cache", _P),
        ("key_stride", _I64),
        ("value_stride", _I64),
        ("output", _P),
        ("output_stride", _I64),
        ("num_heads", _I32),
        ("num_kv_heads", _I32),
        ("head_dim", _I32),
        ("scale", _F32),
        ("logit_cap", _F32),
        ("window", _I32),
    ]


class Linear(ctypes.Structure):
    _fields_ = [  # ctypes reads a plain list
        ("rows", _P),
        ("rows_stride", _I64),
        ("weight", _P),
        ("weight_stride", _I64),
        ("bias", _P),
        ("out", _P),
        ("out_stride", _I64),
        ("num_rows", _I64),
        ("num_inputs", _I64),
        ("num_outputs", _I64),
        ("is_gated", _I32),
    ]


class Rows(ctypes.Structure):
    _fields_ = [  # ctypes reads a plain list
        ("from", _P),
        ("stride", _I64),
        ("cache", _P),
        ("cache_stride", _I64),
        ("bytes", _I64),
    ]


class DecoderLayer(ctypes.Structure):
    _fields_ = [  # ctypes reads a plain list
        ("qkv", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("attention", Layer),
        ("input_norm", _P),
        ("post_norm", _P),
        ("query_norm", _P),
        ("key_norm", _P),
        ("input_epsilon", _F32),
        ("post_epsilon", _F32),
        ("query_epsilon", _F32),
        ("key_epsilon", _F32),
        ("cos_sin_cache", _P),
        ("num_positions", _I64),
        ("rotary_dim", _I32),
        ("is_neox", _I32),
        ("element_bytes", _I64),
    ]


class DecoderStep(ctypes.Structure):
    _fields_ = [  # ctypes reads a plain list
        ("attention", ctypes.POINTER(Step)),
        ("positions", _P),
        ("slots", _P),
        ("num_rows", _I64),
        ("normed", _P),
        ("qkv", _P),
        ("attended", _P),
        ("activated", _P),
    ]


_ARGUMENTS: dict[str, list[Any]] = {
    "linear": [ctypes.POINTER(Linear)],
    "pack": [_P, _I64, _P, _I64, _I64, _I32],
    "unpack": [_P, _P, _I64, _I64, _I64, _I32],
    "attention": [ctypes.POINTER(Step), ctypes.POINTER(Layer)],
    "decoder_layer": [ctypes.POINTER(DecoderLayer), ctypes.POINTER(DecoderStep), _P, _P, _P],
    "rms_norm": [_P, _P, _P, _P, _I64, _I64, _F32],
    "silu_and_mul": [_P, _P, _I64, _I64],
    "rotary_embedding": [_P, _P, _P, _I64, _I64, _P, _I64, _I64, _I32, _I32, _I32, _I32, _I32],
}
_SAYS_WHETHER = ("attention", "decoder_layer", "rotary_embedding")
"""Functions that return something: 0, or why they have not done it."""


@dataclass(frozen=True, slots=True)
class Functions:
    """Of one library.

    Attributes:
        of_dtype: By name and type of their tensors.
        store_kv: Whatever the type.
        packed_size: Elements of a packed weight.
    """

    of_dtype: dict[tuple[str, torch.dtype], Any]
    store_kv: Any
    packed_size: Any


def bind(library: ctypes.CDLL) -> Functions:
    """The library's functions, their arguments checked by ctypes."""
    of_dtype = {}
    for name, arguments in _ARGUMENTS.items():
        for dtype, suffix in DTYPES.items():
            function = library[f"batchllm_{name}_{suffix}"]
            function.argtypes = arguments
            function.restype = ctypes.c_int if name in _SAYS_WHETHER else None
            of_dtype[name, dtype] = function
    store_kv = library["batchllm_store_kv"]
    store_kv.argtypes, store_kv.restype = [ctypes.POINTER(Rows), ctypes.POINTER(Rows), _P, _I64], None
    packed_size = library["batchllm_packed_size"]
    packed_size.argtypes, packed_size.restype = [_I64, _I64, _I32], _I64
    return Functions(of_dtype, store_kv, packed_size)
