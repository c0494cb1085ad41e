"""The Triton kernels compute what the reference does, whatever the step and however it is cut into tiles.

No GPU is needed: the kernels run in Triton's interpreter, which is numpy program by program. Products of bfloat16 are
added to it. What the interpreter cannot show is left to `test_triton_compile.py` (compilation needs no GPU) and, on a
GPU, to `eval/bench_attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.experimental.gluon  # the first launch imports it, which would meet the interpreter's functions
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction

from batchllm.attention import AttentionLayout, reference, triton_kernels
from batchllm.attention.base import LayerShape
from batchllm.attention.tile_config import TileConfig
from batchllm.attention.triton_shared import SharedAttention
from tests.attention.cases import CASES, Case, make_case
from tests.attention.interpreter import patched_once
from tests.attention.tolerance import check_close
from tests.sizes import sized

# Splits of a few tokens where there is anything to split, several tiles per program.
_SMALL = TileConfig(
    block_wide=32, block_n=16, min_split=16, tiles_per_program=40, programs_per_processor=3, num_warps=4, num_stages=1
)
# For steps of many query tokens: the interpreter takes about a millisecond for each block of KV.
_LARGE = replace(_SMALL, block_wide=64, block_n=64, min_split=64)
_TINY: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
# Of the named cases: the interpreter takes about ten milliseconds for each query token. More readers, and more query
# tokens of one sequence, than a tile has rows.
_LARGEST = {
    "num_sequences": sized(18, 100),
    "max_level_len": sized(150, 1000),
    "max_private_len": sized(150, 1000),
    "max_extend_len": sized(60, 120),
}

# numpy says it of `int(array of one number)`, which Triton's interpreter does with every scalar.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter for the kernels and for Triton's own functions, for the time of one test.

    TRITON_INTERPRET=1 does the same, but only if it is set before anything imports Triton, and then for all of the
    process: other tests import SGLang, and with it Triton, in whatever order.
    """
    core = dict(vars(tl.core))
    for module in (tl, tl.standard, triton_kernels):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))
    monkeypatch.setattr(triton_interpreter, "_patch_lang", patched_once())
    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_dot", _dot)
    yield
    # The interpreter leaves its own operators behind wherever one function calls another.
    for name, value in core.items():
        setattr(tl.core, name, value)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Products as matrix units compute them: of numbers in 16 bits exactly, summed in float32."""
    product = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype)
    return triton_interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _widened(handle: Any) -> np.ndarray:
    """The interpreter keeps bfloat16 as the upper half of a float32, in uint16."""
    data: np.ndarray = handle.data
    return (data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else data


def _attention(
    case: Case, *, max_rows: int = 700, config: TileConfig = _SMALL, logit_cap: float = 0.0, **options: Any
) -> SharedAttention:
    return SharedAttention(case.shape(logit_cap=logit_cap), "cpu", max_rows=max_rows, config=config, **options)


def _check(attention: SharedAttention, case: Case, num_padding: int = 0) -> None:
    num_tokens = len(case.q)
    q = torch.cat([case.q, torch.full((num_padding, *case.q.shape[1:]), float("nan"), dtype=case.q.dtype)])
    attention.plan(case.layout, case.table, num_rows=num_tokens + num_padding)
    # What another step left in the buffers must not matter.
    attention._part_o.fill_(float("nan"))
    attention._part_lse.fill_(float("nan"))
    out = torch.full_like(q, float("nan"))
    attention.run(q, case.k_cache, case.v_cache, out)
    check_close(out[:num_tokens], _reference(case), "triton")
    assert (out[num_tokens:] == 0).all()


def _addresses(attention: SharedAttention) -> list[int]:
    return [tensor.data_ptr() for tensor in (attention._lists, attention._part_o, attention._part_lse)]


def _reference(case: Case, logit_cap: float = 0.0) -> torch.Tensor:
    return reference.attention(
        case.q, case.k_cache, case.v_cache, case.table, case.layout, case.scale, logit_cap=logit_cap
    )


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_step(name: str) -> None:
    """Odd lengths, nested and one-row groups, nothing private but the token itself, prompts of which part is cached."""
    options = {"max_extend_len": sized(10, 20), **CASES[name], **_TINY}
    options |= {size: min(options[size], largest) for size, largest in _LARGEST.items() if size in options}
    case = make_case(1, **options)
    _check(_attention(case, config=_SMALL if len(case.q) < 100 else _LARGE), case)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [
        (2, 2, 64, torch.float32),
        (4, 1, 128, torch.float16),
        (7, 1, 64, torch.float32),
        (16, 2, 64, torch.float16),
        (16, 1, 128, torch.float32),
        (24, 1, 32, torch.float32),
        (4, 2, 256, torch.float16),
        (4, 2, 64, torch.bfloat16),
        (16, 2, 128, torch.bfloat16),
    ],
)
def test_heads_and_dtypes(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """GQA groups of 1, 2, 4, 7, 8, 16 and 24 query heads for each KV head, of every head_dim."""
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
    lengths = {"max_level_len": sized(32, 48), "max_private_len": sized(20, 40), "max_extend_len": 9}
    case = make_case(2, mode="mixed", num_levels=2, num_sequences=sized(4, 7), **lengths, **shape)
    _check(_attention(case), case)


@pytest.mark.parametrize("frozen", [True, False])
def test_each_plan_replaces_the_one_before(frozen: bool) -> None:
    """Long lists, short ones, long ones again: nothing of another step is read, and frozen buffers stay in place."""
    steps = [
        make_case(3, num_levels=3, num_sequences=sized(20, 40), max_level_len=sized(30, 60), **_TINY),
        make_case(4, num_levels=0, num_sequences=2, **_TINY),
        make_case(5, mode="extend", num_levels=2, num_sequences=5, **_TINY),
        make_case(6, num_levels=1, num_sequences=sized(15, 30), **_TINY),
    ]
    attention = _attention(steps[0], frozen=frozen)
    buffers = _addresses(attention)
    for case in steps:
        # Every buffer, those on the host too, full of the longest lists.
        for _ in range(4):
            attention.plan(steps[0].layout, steps[0].table)
        _check(attention, case, num_padding=3)
    if frozen:
        assert _addresses(attention) == buffers


def test_host_buffers_take_turns() -> None:
    """The lists of a step stay as they are while the next three are planned: their copy may not have run yet."""
    case = make_case(7, num_levels=1, **_TINY)
    attention = _attention(case)
    filled = []
    for _ in range(4):
        attention.plan(case.layout, case.table)
        filled.append(attention._host[attention._turn].data_ptr())
    assert len(set(filled)) == 4


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_any_number_of_programs_does_all_tiles(programs: int) -> None:
    case = make_case(8, num_levels=2, num_sequences=6, max_level_len=40, **_TINY)
    attention = _attention(case, config=replace(_SMALL, programs_per_processor=programs, tiles_per_program=1))
    attention.plan(case.layout, case.table)
    assert attention.work_list is not None
    num_tiles = len(attention.work_list.tiles) * case.k_cache.shape[1]
    assert (num_tiles > programs) == (programs < 1000)
    _check(attention, case)


@pytest.mark.parametrize("min_split", [16, 48, 1 << 20])
def test_splits_do_not_change_the_result(min_split: int) -> None:
    """Ranges that end on, before and behind a split's end, and none split at all."""
    case = make_case(9, num_levels=1, num_sequences=5, max_level_len=200, max_private_len=100, **_TINY)
    attention = _attention(case, config=replace(_SMALL, min_split=min_split))
    _check(attention, case)
    assert attention.work_list is not None
    slots_per_row = np.diff(attention.work_list.slot_indptr)
    assert slots_per_row.max() == 2 if min_split == 1 << 20 else slots_per_row.max() > 3


def test_rows_beyond_the_step_become_zero() -> None:
    """A CUDA graph of more rows than the step has runs on; what its padding holds, NaN even, reaches no one."""
    case = make_case(10, num_levels=1, **_TINY)
    _check(_attention(case), case, num_padding=5)


def test_no_sequence_at_all() -> None:
    empty = np.zeros(0, np.int32)
    pairs = np.zeros((0, 2), np.int32)
    layout = AttentionLayout(empty, np.zeros(1, np.int32), empty, empty, empty, pairs, pairs, empty)
    case = make_case(10, num_levels=1, **_TINY)
    _check(_attention(case), replace(case, q=case.q[:0], layout=layout), num_padding=3)


def test_queries_may_be_a_slice_of_something_wider() -> None:
    """As q is of the fused projection; only the last dimension is dense."""
    case = make_case(11, num_levels=1, **_TINY)
    wide = torch.randn(len(case.q), 7, 16)
    wide[:, 3:5] = case.q
    _check(_attention(case), replace(case, q=wide[:, 3:5]))


def test_logit_cap() -> None:
    """As in Gemma 2: every score is `cap * tanh(score / cap)`."""
    case = make_case(12, num_levels=1, num_sequences=2, **_TINY)
    attention = _attention(case, logit_cap=2.0)
    attention.plan(case.layout, case.table)
    out = torch.empty_like(case.q)
    attention.run(case.q, case.k_cache, case.v_cache, out)
    check_close(out, _reference(case, logit_cap=2.0), "triton")


def test_frozen_buffers_split_less_rather_than_grow() -> None:
    case = make_case(13, num_levels=1, num_sequences=6, max_level_len=300, **_TINY)
    free = _attention(case)
    free.plan(case.layout, case.table)
    assert free.work_list is not None
    wanted = free.work_list.num_slots
    frozen = _attention(case, frozen=True, max_slots=wanted // 2)
    _check(frozen, case)
    assert frozen.work_list is not None and frozen.work_list.num_slots <= wanted // 2
    with pytest.raises(ValueError, match="there is room for 3"):
        _attention(case, frozen=True, max_slots=3).plan(case.layout, case.table)


def test_what_does_not_fit_the_plan_is_refused() -> None:
    case = make_case(14, num_levels=1, **_TINY)
    attention = _attention(case, max_rows=20)
    tensors = {"query": case.q, "key_cache": case.k_cache, "value_cache": case.v_cache, "output": case.q.clone()}
    with pytest.raises(ValueError, match="planned for"):
        attention.run(**tensors)
    attention.plan(case.layout, case.table)
    wrong = [
        ("planned for", {"query": case.q[:-1]}),
        ("planned for", {"output": case.q[:, :1]}),
        ("a cache is", {"key_cache": case.k_cache[:, :, :8]}),
        ("must be torch.float32", {"key_cache": case.k_cache.half()}),
        ("dense", {"value_cache": case.v_cache.transpose(0, 2).contiguous().transpose(0, 2)}),
    ]
    for message, tensor in wrong:
        with pytest.raises(ValueError, match=message):
            attention.run(**{**tensors, **tensor})
    with pytest.raises(ValueError, match="must be of int32"):
        attention.plan(case.layout, case.table.long())
    with pytest.raises(ValueError, match="at most 20"):
        attention.plan(case.layout, case.table, num_rows=21)
    with pytest.raises(ValueError, match="power of two"):
        SharedAttention(LayerShape(4, 2, 80, torch.float32, 1.0), "cpu", max_rows=1)


def test_rows_that_were_not_planned_are_left_alone() -> None:
    """Tensors may be longer than the step: a backend's buffers are."""
    case = make_case(15, num_levels=1, **_TINY)
    query = torch.cat([case.q, torch.ones(4, 2, 16)])
    output = torch.full_like(query, 7.0)
    attention = _attention(case)
    attention.plan(case.layout, case.table)
    attention.run(query, case.k_cache, case.v_cache, output)
    check_close(output[: len(case.q)], _reference(case), "triton")
    assert (output[len(case.q) :] == 7).all()
