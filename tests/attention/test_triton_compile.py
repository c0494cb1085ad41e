"""The Triton kernels compile for the GPUs they are meant for, bfloat16 included; neither step needs one."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchllm.attention import triton_kernels
from batchllm.attention.tile_config import default_config
from batchllm.attention.work_list import TILE_FIELDS

# Shared memory of a streaming multiprocessor, of which every resident program also takes 1 KiB for itself.
_SHARED_MEMORY = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10, 100: 228 << 10}
_SHARED_MEMORY_OF_A_PROGRAM = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Capability, query heads for each KV head, head_dim, dtype, logit cap. Each takes seconds to compile.
_QUICK = [
    (80, 4, 128, "bf16", 0.0),
    (86, 8, 128, "fp16", 0.0),
    (90, 4, 128, "bf16", 0.0),
    (90, 1, 256, "bf16", 50.0),
    (100, 8, 64, "bf16", 0.0),
    (86, 8, 256, "fp32", 0.0),
    (80, 1, 32, "fp32", 0.0),
]
_ALL = [(*c, 0.0) for c in product(_SHARED_MEMORY, (1, 8, 16), (16, 32, 64, 128, 256), _DTYPES)]


@pytest.mark.parametrize(
    ("capability", "group", "head_dim", "dtype", "logit_cap"),
    [*_QUICK, *(pytest.param(*case, marks=pytest.mark.thorough) for case in _ALL if case not in _QUICK)],
)
def test_the_built_in_sizes_fit(
    capability: int, group: int, head_dim: int, dtype: str, logit_cap: float, tmp_path: Path
) -> None:
    """All programs of the grid are resident at once, and no register spills."""
    config = default_config(divmod(capability, 10), head_dim, _DTYPES[dtype])
    constants = {
        "NUM_HEADS": 8 * group,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_WIDE": config.block_wide,
        "BLOCK_NARROW": 16,
        "BLOCK_N": config.block_n,
        "TILE_FIELDS": TILE_FIELDS,
        "LOGIT_CAP": logit_cap,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = _compile(triton_kernels.attend_tiles, capability, dtype, constants, options)
    resident = config.programs_per_processor * (kernel.metadata.shared + 1024)
    assert resident <= _SHARED_MEMORY[capability]
    assert kernel.metadata.shared <= _SHARED_MEMORY_OF_A_PROGRAM[capability]
    assert _stack_bytes(kernel, tmp_path / "kernel.cubin") == 0


def _stack_bytes(kernel: triton.compiler.CompiledKernel, path: Path) -> int:
    """Bytes of memory that a thread uses as a stack: what does not fit into its registers."""
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).with_name("bin") / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", report)
    return int(stack)


def test_the_reduction_compiles() -> None:
    constants = {"NUM_HEADS": 28, "HEAD_DIM": 128, "BLOCK_SLOTS": 4, "BLOCK_HEADS": 4}
    assert _compile(triton_kernels.merge_slots, 90, "bf16", constants, {}).metadata.shared <= 16 << 10


def _compile(
    kernel: triton.JITFunction,
    capability: int,
    dtype: str,
    constants: dict[str, float],
    options: dict[str, int],
) -> triton.compiler.CompiledKernel:
    types, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            is_float = name.startswith("part")
            types[name] = f"*{dtype}" if name[:-4] in ("q", "k", "v", "out") else "*fp32" if is_float else "*i32"
        else:
            types[name] = "fp32" if name == "score_scale" else "i32"
        # Of everything but the scale, as Triton finds of real tensors.
        if types[name] not in ("constexpr", "fp32"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, types, values, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )
