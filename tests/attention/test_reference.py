"""The specification agrees with itself, with torch's own attention, and with the tolerances that are built on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from batchllm.attention.reference import attention
from tests.attention.by_segments import attention_parts, shared_attention
from tests.attention.cases import CASES, Case, make_case
from tests.attention.tolerance import TOLERANCES, check_close


def _fields(case: Case) -> tuple[object, ...]:
    return tuple(getattr(case, field.name) for field in dataclasses.fields(case))


def _by_torch(case: Case) -> torch.Tensor:
    """Each sequence through torch's fused attention, in the dtype of the case."""
    layout, outs = case.layout, []
    for s, (row, kv_len) in enumerate(zip(layout.table_rows.tolist(), layout.kv_len.tolist(), strict=True)):
        q = case.q[layout.qo_indptr[s] : layout.qo_indptr[s + 1]]
        slots = case.table[row, :kv_len].long()
        seen = torch.ones(len(q), kv_len).tril(kv_len - len(q)).bool()
        heads_first = (x.transpose(0, 1)[None] for x in (q, case.k_cache[slots], case.v_cache[slots]))
        out = scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=case.scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", CASES)
def test_segment_by_segment_is_the_same_as_each_sequence_for_itself(name: str) -> None:
    for seed in range(2):
        case = make_case(seed, head_dim=16, dtype=torch.float64, **CASES[name])
        check_close(shared_attention(*_fields(case)), attention(*_fields(case)), "reference")


@pytest.mark.parametrize("name", CASES)
def test_the_specification_is_torchs_attention(name: str) -> None:
    case = make_case(2, head_dim=16, dtype=torch.float64, **CASES[name])
    check_close(_by_torch(case), attention(*_fields(case)), "reference")


@pytest.mark.parametrize(("logit_cap", "window"), [(0.5, 0), (0.0, 1), (0.0, 20), (2.0, 33)])
@pytest.mark.parametrize("name", CASES)
def test_caps_and_windows_are_the_same_segment_by_segment(name: str, logit_cap: float, window: int) -> None:
    case = make_case(3, head_dim=16, dtype=torch.float64, **CASES[name])
    alone = attention(*_fields(case), logit_cap=logit_cap, window=window)
    check_close(shared_attention(*_fields(case), logit_cap=logit_cap, window=window), alone, "reference")
    assert not torch.equal(alone, attention(*_fields(case)))


def test_what_caps_and_windows_are() -> None:
    """As Hugging Face's Gemma 2 has them: a token sees ``window`` tokens with itself, a score is capped when scaled."""
    case = make_case(4, num_heads=1, num_kv_heads=1, dtype=torch.float64, mode="mixed", num_levels=2)
    out = attention(*_fields(case), logit_cap=0.3, window=7)
    for s, row in enumerate(case.layout.table_rows.tolist()):
        first, last = case.layout.qo_indptr[s : s + 2].tolist()
        for token in range(first, last):
            own = int(case.layout.kv_len[s]) - (last - token)
            slots = case.table[row, max(0, own - 6) : own + 1].long()
            scores = 0.3 * torch.tanh(case.k_cache[slots, 0] @ case.q[token, 0] * case.scale / 0.3)
            check_close(out[token, 0], scores.softmax(0) @ case.v_cache[slots, 0], "reference")


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["decode", "mixed"])
def test_query_heads_share_kv_heads(num_kv_heads: int, mode: str) -> None:
    """Eight query heads, neighbours of which read one KV head; head_dim is odd."""
    heads = {"num_heads": 8, "num_kv_heads": num_kv_heads, "head_dim": 13}
    case = make_case(3, dtype=torch.float64, mode=mode, num_levels=2, **heads)
    out = attention(*_fields(case))
    check_close(_by_torch(case), out, "reference")
    check_close(shared_attention(*_fields(case)), out, "reference")
    group = 8 // num_kv_heads
    head = dataclasses.replace(case, q=case.q[:, 5:6], k_cache=case.k_cache[:, 5 // group, None])
    head = dataclasses.replace(head, v_cache=case.v_cache[:, 5 // group, None])
    check_close(attention(*_fields(head)), out[:, 5:6], "reference")


def test_parts_are_the_segments_and_then_the_private_parts() -> None:
    """Each has the tokens that read it, and a log-sum-exp that says how much of the whole it is."""
    case = make_case(4, dtype=torch.float64, mode="mixed", num_levels=2)
    layout = case.layout
    parts = attention_parts(*_fields(case))
    assert len(parts) == len(layout.segment_span) + len(layout.kv_len)
    for part, (first, last) in zip(parts, layout.segment_readers.tolist(), strict=False):
        tokens = [t for s in layout.order[first:last] for t in range(layout.qo_indptr[s], layout.qo_indptr[s + 1])]
        assert part.tokens.tolist() == tokens
    keys = case.k_cache[case.table[layout.table_rows[0], : layout.kv_len[0] - layout.qo_indptr[1] + 1].long()]
    scores = torch.einsum("hd,mhd->hm", case.q[0], keys.repeat_interleave(2, dim=1)) * case.scale
    lses = torch.stack([part.lse[part.tokens == 0][0] for part in parts if 0 in part.tokens])
    torch.testing.assert_close(lses.logsumexp(0), scores.logsumexp(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torchs_fused_attention_is_within_the_tolerance(dtype: torch.dtype) -> None:
    """An implementation that rounds as matrix units do passes, so a backend may be asked to."""
    for name in ("decode, many readers of one prefix", "mixed, three nested levels"):
        case = make_case(5, dtype=dtype, **CASES[name])
        check_close(_by_torch(case), attention(*_fields(case)), "triton")


@pytest.mark.parametrize(("backend", "dtype"), TOLERANCES)
def test_one_position_read_wrongly_is_outside_every_tolerance(backend: str, dtype: torch.dtype) -> None:
    """A slot of the cached prefix is exchanged for another's: of one row, the last position of a segment."""
    case = make_case(6, dtype=dtype, **CASES["decode, one group"])
    expected = attention(*_fields(case))
    table = case.table.clone()
    table[int(case.layout.table_rows[0]), int(case.layout.segment_span[0, 1]) - 1] = table[
        int(case.layout.table_rows[1]), int(case.layout.kv_len[1]) - 1
    ]
    wrong = attention(*_fields(dataclasses.replace(case, table=table)))
    check_close(expected.to(dtype), expected, backend)
    with pytest.raises(AssertionError):
        check_close(wrong.to(dtype), expected, backend)
