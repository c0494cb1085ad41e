"""Attention on CPUs is the specification's, compiled for every instruction set and in plain torch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from batchllm.attention import PrefixPaths, check_layout, plan_layout, torch_shared
from batchllm.attention.base import LayerShape, StepAttention
from batchllm.attention.cpu_shared import CompiledSharedAttention, make_cpu_attention
from batchllm.attention.reference import attention
from batchllm.attention.torch_shared import TorchSharedAttention
from batchllm.kernels import cpu
from tests.attention.cases import CASES, POISON, Case, make_case
from tests.attention.tolerance import TOLERANCES, Backend, check_close
from tests.kernels.levels import LEVELS, kernels_of, num_threads

DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["torch", *LEVELS]

# A prefix in tokens, and of each of its readers cached tokens behind it and query tokens.
Group = tuple[int, list[tuple[int, int]]]


def _make(implementation: str, case: Case, **scores: Any) -> StepAttention:
    if implementation == "torch":
        return TorchSharedAttention(case.shape(**scores))
    return CompiledSharedAttention(kernels_of(implementation), case.shape(**scores))


def _backend(implementation: str, case: Case) -> Backend:
    """Whose tolerance it is: products of pairs of bfloat16 take the softmax's weights rounded."""
    is_paired = implementation == "avx512_bf16" and case.q.dtype == torch.bfloat16 and case.q.shape[-1] % 32 == 0
    return "cpu_pairs" if is_paired else "cpu"


def _run(attend: StepAttention, case: Case) -> torch.Tensor:
    output = torch.full_like(case.q, torch.nan)
    attend.plan(case.layout, case.table)
    attend.run(case.q, case.k_cache, case.v_cache, output)
    return output


def _expected(case: Case, **scores: Any) -> torch.Tensor:
    return attention(*(getattr(case, field.name) for field in dataclasses.fields(case)), **scores)


@functools.cache
def _drawn(seed: int, **options: Any) -> tuple[Case, torch.Tensor]:
    """A case and what is expected of it, once for all implementations."""
    case = make_case(seed, **options)
    return case, _expected(case)


def _named_case(name: str, dtype: torch.dtype) -> tuple[Case, torch.Tensor]:
    return _drawn(1, dtype=dtype, **CASES[name])


def _case_of(groups: list[Group], **heads: Any) -> Case:
    """A step of these groups; slots in the order of the sequences, those of a prefix its first reader's."""
    sequences = [(g, prefix, *reader) for g, (prefix, readers) in enumerate(groups) for reader in readers]
    prefix_len, cached, qo_len = np.array([s[1:] for s in sequences], np.int32).reshape(-1, 3).T
    kv_len = prefix_len + cached + qo_len
    paths = PrefixPaths()
    leaf = np.array([s[0] for s in sequences], np.int32)
    for prefix, _ in groups:
        paths.add(-1, prefix)
    width = int(kv_len.max(initial=0)) + 1
    table = torch.arange(len(sequences) * width, dtype=torch.int32).view(-1, width)
    for s, first in enumerate(np.searchsorted(leaf, leaf)):
        table[s, : prefix_len[s]] = table[first, : prefix_len[s]]
    rows = np.arange(len(sequences), dtype=np.int32)
    layout = plan_layout(table_rows=rows, qo_len=qo_len, kv_len=kv_len, leaf=leaf, paths=paths)
    check_layout(layout, table.numpy(), is_thorough=True)
    other = make_case(0, num_levels=0, num_sequences=1, **heads)
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, *like.shape[1:], generator=random).to(like.dtype)
        for n, like in ((int(qo_len.sum()), other.q), *2 * [(max(1, table.numel()), other.k_cache)])
    )
    return Case(q, k, v, table, layout, other.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_specification(implementation: str, name: str, dtype: torch.dtype) -> None:
    case, expected = _named_case(name, dtype)
    with num_threads(1):
        check_close(_run(_make(implementation, case), case), expected, _backend(implementation, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_specification_with_two_threads(level: str, name: str, dtype: torch.dtype) -> None:
    """Which may cut the work otherwise: the result is the same up to rounding."""
    case, expected = _named_case(name, dtype)
    with num_threads(2):
        check_close(_run(_make(level, case), case), expected, _backend(level, case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode, three nested levels", "mixed, one group"])
def test_plain_torch_is_the_specification_with_two_threads(name: str, dtype: torch.dtype) -> None:
    case, expected = _named_case(name, dtype)
    with num_threads(2):
        check_close(_run(_make("torch", case), case), expected, "cpu")


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_computes_float64_as_such(name: str) -> None:
    case = make_case(2, dtype=torch.float64, **CASES[name])
    check_close(_run(_make("torch", case), case), _expected(case), "reference")


@pytest.mark.parametrize(
    "scores", [{"logit_cap": 0.5}, {"window": 1}, {"window": 70}, {"logit_cap": 2.0, "window": 20}]
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_caps_and_windows(implementation: str, name: str, scores: dict[str, Any]) -> None:
    """Windows that end in a private part, in a segment, in the middle of a tile, and beyond a prompt."""
    case, _ = _named_case(name, torch.float32)
    check_close(_run(_make(implementation, case, **scores), case), _expected(case, **scores), "cpu")


@pytest.mark.parametrize("window", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_windows_over_many_rows(implementation: str, window: int) -> None:
    """More rows than a block, of sequences of different lengths; rows whose window begins behind a whole tile."""
    case, _ = _many_rows(torch.float32)
    check_close(_run(_make(implementation, case, window=window), case), _expected(case, window=window), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sizes_of_heads(implementation: str, head_dim: int, dtype: torch.dtype) -> None:
    case, expected = _drawn(3, head_dim=head_dim, dtype=dtype, mode="mixed", num_levels=2)
    check_close(_run(_make(implementation, case), case), expected, _backend(implementation, case))


@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (8, 1), (12, 4), (14, 2), (32, 1), (96, 1)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_query_heads_of_a_kv_head(implementation: str, heads: tuple[int, int]) -> None:
    """Also groups that do not divide a block of the kernel, and one that fills it."""
    case, expected = _drawn(4, num_heads=heads[0], num_kv_heads=heads[1], mode="mixed", num_levels=2)
    check_close(_run(_make(implementation, case), case), expected, "cpu")


@functools.cache
def _many_rows(dtype: torch.dtype) -> tuple[Case, torch.Tensor]:
    groups: list[Group] = [
        (150, [(3 * i % 50, 1) for i in range(250)]),
        (100, [(20, 300), (0, 300), (7, 1)]),
        (33, [(i, 5) for i in range(40)]),
        (1, [(60, 260)]),
    ]
    case = _case_of(groups, dtype=dtype)
    return case, _expected(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_rows_than_a_block(implementation: str, dtype: torch.dtype) -> None:
    """Hundreds of decode rows of one prefix among others, and prompts of 300 tokens behind a cached one."""
    case, expected = _many_rows(dtype)
    check_close(_run(_make(implementation, case), case), expected, _backend(implementation, case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequences_without_query_tokens(implementation: str) -> None:
    """All readers of a segment, or some, have nothing to compute; shorter sequences come behind them."""
    none: list[Group] = [(30, [(3, 1), (5, 1)]), (70, [(3, 0), (5, 0)]), (20, [(4, 1), (2, 1)])]
    some: list[Group] = [(70, [(3, 0), (5, 1), (0, 0)]), (20, [(4, 2), (2, 0)])]
    for groups in (none, some):
        case = _case_of(groups)
        check_close(_run(_make(implementation, case), case), _expected(case), "cpu")


@pytest.mark.parametrize("groups", [[], [(70, [(3, 0), (5, 0)])]])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_without_query_tokens(implementation: str, groups: list[Group]) -> None:
    case = _case_of(groups)
    assert _run(_make(implementation, case), case).shape == (0, 4, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_tensors(implementation: str, dtype: torch.dtype) -> None:
    """Queries within a wider tensor, KV interleaved, output with rows to spare: what is beside them stays."""
    case = make_case(5, dtype=dtype, mode="mixed", num_levels=2)
    num_tokens, num_heads, head_dim = case.q.shape
    qkv = torch.full((num_tokens + 2, num_heads + 4, head_dim), POISON, dtype=dtype)
    qkv[:num_tokens, :num_heads] = case.q
    kv = torch.stack([case.k_cache, case.v_cache], dim=1)
    out = torch.full((num_tokens + 2, num_heads + 3, head_dim), 7.0, dtype=dtype)
    attend = _make(implementation, case)
    attend.plan(case.layout, case.table)
    attend.run(qkv[:, :num_heads], kv[:, 0], kv[:, 1], out[:, 2 : 2 + num_heads])
    check_close(out[:num_tokens, 2 : 2 + num_heads], _expected(case), _backend(implementation, case))
    assert (out[num_tokens:] == 7).all() and (out[:, :2] == 7).all() and (out[:, 2 + num_heads :] == 7).all()


@functools.cache
def _extreme_case(name: str, dtype: torch.dtype) -> tuple[Case, torch.Tensor]:
    case = make_case(6, dtype=dtype, **CASES[name])
    case = dataclasses.replace(case, q=case.q * 100)
    return case, _expected(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_scores(implementation: str, dtype: torch.dtype) -> None:
    """Scores of several hundred: float32 has them to some 1e-4, and so the weights relative to each other."""
    for name in ("decode, many readers of one prefix", "mixed, three nested levels", "extend, long chunks"):
        case, expected = _extreme_case(name, dtype)
        output = _run(_make(implementation, case), case)
        atol = max(1e-3, TOLERANCES[_backend(implementation, case), dtype].atol)
        torch.testing.assert_close(output.double(), expected, atol=atol, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_key_that_is_no_number_is_not_passed_over(implementation: str, dtype: torch.dtype) -> None:
    """Neither where few rows read it nor where many do: who reads it has no number either."""
    for num_readers in (1, 40):
        case = _case_of([(30, [(5, 1)] * num_readers), (30, [(5, 1)])], dtype=dtype)
        case.k_cache[case.table[0, 3]] = torch.nan
        output = _run(_make(implementation, case), case)
        assert output[:num_readers].isnan().all() and not output[num_readers:].isnan().any()


def _permuted(case: Case, permutation: np.ndarray) -> Case:
    """The same sequences in another order, planned anew from the segments as prefixes."""
    layout, paths = case.layout, PrefixPaths()
    leaf = np.full(len(layout.order), -1, np.int32)
    for (first, last), (_, end) in zip(layout.segment_readers, layout.segment_span, strict=True):
        readers = layout.order[first:last]
        leaf[readers] = paths.add(int(leaf[readers[0]]), int(end))
    planned = plan_layout(
        table_rows=layout.table_rows[permutation],
        qo_len=np.diff(layout.qo_indptr)[permutation],
        kv_len=layout.kv_len[permutation],
        leaf=leaf[permutation],
        paths=paths,
    )
    return dataclasses.replace(case, q=case.q[_tokens(layout.qo_indptr, permutation)], layout=planned)


def _tokens(qo_indptr: np.ndarray, sequences: np.ndarray) -> list[int]:
    return [token for s in sequences for token in range(qo_indptr[s], qo_indptr[s + 1])]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["torch", LEVELS[0]])
def test_the_order_of_the_batch_changes_nothing(implementation: str, name: str) -> None:
    case, expected = _named_case(name, torch.float32)
    permutation = np.random.default_rng(0).permutation(len(case.layout.order))
    output = _run(_make(implementation, case), _permuted(case, permutation))
    check_close(output, expected[_tokens(case.layout.qo_indptr, permutation)], "cpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_attention_takes_step_after_step_and_layer_after_layer(implementation: str) -> None:
    steps = [make_case(seed, mode=mode, num_levels=2) for seed, mode in enumerate(("mixed", "decode", "extend"))]
    attend = _make(implementation, steps[0])
    for case in steps:
        check_close(_run(attend, case), _expected(case), "cpu")
        layer = dataclasses.replace(case, q=case.q.flip(0), k_cache=case.v_cache, v_cache=case.k_cache)
        output = torch.empty_like(layer.q)
        attend.run(layer.q, layer.k_cache, layer.v_cache, output)
        check_close(output, _expected(layer), "cpu")


@pytest.mark.parametrize("name", ["decode, long", "extend, long chunks", "mixed, all at once"])
def test_plain_torch_cut_into_small_pieces(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As where memory is short for a step: a few rows and positions at a time, merged."""
    monkeypatch.setattr(torch_shared, "_BLOCK_ROWS", 5)
    monkeypatch.setattr(torch_shared, "_MAX_PIECE_SIZE", 7000)
    monkeypatch.setattr(torch_shared, "_MAX_BATCH_SIZE", 15000)
    case, expected = _named_case(name, torch.float32)
    check_close(_run(_make("torch", case), case), expected, "cpu")
    # Most rows see nothing of their first pieces.
    check_close(_run(_make("torch", case, window=9), case), _expected(case, window=9), "cpu")


def test_plain_torch_multiplies_little_that_is_not_read() -> None:
    """Decode rows beside a prompt of 512 tokens cost their own length; padding and mask at most as much again."""
    case = _case_of([(64, [(i % 40, 1) for i in range(48)]), (1, [(0, 511)])])
    num_read = sum(
        kv_len * qo_len - qo_len * (qo_len - 1) // 2
        for kv_len, qo_len in zip(case.layout.kv_len.tolist(), np.diff(case.layout.qo_indptr).tolist(), strict=True)
    )
    with FlopCounterMode(display=False) as counter:
        _run(_make("torch", case), case)
    # Two products of four heads and 64 elements; a multiplication and an addition each.
    assert counter.get_total_flops() < 2 * num_read * (2 * 4 * 64 * 2)


def test_the_compiled_kernels_are_taken_where_they_can_be_had() -> None:
    made, reason = make_cpu_attention(LayerShape(4, 2, 64, torch.bfloat16, 1.0))
    assert isinstance(made, CompiledSharedAttention), reason
    assert reason is None


@pytest.mark.parametrize(
    ("heads", "dtype", "said"),
    [
        ((4, 2, 72), torch.float32, "4 heads over 2 of 72 elements of torch.float32"),
        ((97, 1, 64), torch.float32, "97 heads over 1"),
        ((4, 2, 64), torch.float64, "torch.float64"),
        ((4, 2, 64), torch.float16, "torch.float16"),
    ],
)
def test_other_heads_and_dtypes_fall_back_to_torch_and_say_so(
    heads: tuple[int, int, int], dtype: torch.dtype, said: str
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    case = make_case(7, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, mode="mixed")
    made, reason = make_cpu_attention(case.shape())
    assert isinstance(made, TorchSharedAttention)
    assert reason is not None and said in reason
    check_close(_run(made, case), _expected(case), "reference" if dtype == torch.float64 else "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_may_be_the_beginning_of_keys(name: str, dtype: torch.dtype) -> None:
    """As latent attention keeps them: one head for all query heads, and no copy for the values."""
    case = make_case(9, dtype=dtype, **CASES[name] | {"num_heads": 6, "num_kv_heads": 1, "head_dim": 72})
    case = dataclasses.replace(case, v_cache=case.k_cache[..., :40])
    made, reason = make_cpu_attention(case.shape(value_dim=40))
    assert reason is not None and reason.endswith("with values of 40")
    output = torch.full((*case.q.shape[:2], 40), torch.nan, dtype=dtype)
    made.plan(case.layout, case.table)
    made.run(case.q, case.k_cache, case.v_cache, output)
    check_close(output, _expected(case), "cpu")


def test_without_kernels_the_loaders_sentence_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda: "no compiled kernels (avx2 was not built): install a compiler")
    made, reason = make_cpu_attention(LayerShape(4, 2, 64, torch.float32, 1.0))
    assert isinstance(made, TorchSharedAttention)
    assert reason == "no compiled kernels (avx2 was not built): install a compiler"


def test_tensors_that_the_kernels_would_misread_are_refused() -> None:
    """They take addresses: a wrong shape or stride would be read as if it were right."""
    case = make_case(8)
    attend = _make(LEVELS[0], case)
    tensors = {"query": case.q, "key_cache": case.k_cache, "value_cache": case.v_cache, "output": case.q.clone()}
    with pytest.raises(ValueError, match="plan"):
        attend.run(**tensors)
    attend.plan(case.layout, case.table)
    for name, tensor in tensors.items():
        apart = tensor.repeat_interleave(2, dim=2)[..., ::2]
        by_head = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for wrong in (apart, by_head, tensor.double(), tensor[:, :1], tensor[..., :32]):
            with pytest.raises(ValueError, match="side by side"):
                attend.run(**(tensors | {name: wrong}))
    with pytest.raises(ValueError, match="query tokens"):
        attend.run(**(tensors | {"output": case.q[:1].clone()}))
    with pytest.raises(ValueError, match="attention of"):
        attend.run(**(tensors | {"query": case.q[:1]}))


def test_query_heads_must_be_a_multiple_of_kv_heads() -> None:
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2"):
        LayerShape(3, 2, 64, torch.float32, 1.0)
