"""Attention over parts, merged, is attention over the whole."""

from __future__ import annotations

import pytest
import torch

from batchllm.attention.torch_shared import merge_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 800])
def test_parts_merge_to_the_whole(dtype: torch.dtype, offset: float) -> None:
    """Also where scores are far apart, and where their exponentials would overflow."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, 40, generator=random, dtype=dtype) * 30 + offset
    values = torch.randn(5, 3, 40, 8, generator=random, dtype=dtype)
    cuts = list(zip([0, 1, 7, 30], [1, 7, 30, 40], strict=True))

    def attend(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = scores[..., start:end]
        return (part.softmax(-1)[..., None] * values[..., start:end, :]).sum(-2), part.logsumexp(-1)

    outs, lses = (torch.stack(parts) for parts in zip(*(attend(*cut) for cut in cuts), strict=True))
    out, lse = merge_states(outs, lses)
    expected_out, expected_lse = attend(0, 40)
    assert out.dtype == lse.dtype == dtype
    # A weight is as exact as the log-sum-exp that it is from.
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(lse, expected_lse, atol=0, rtol=rtol)
    torch.testing.assert_close(out, expected_out, atol=2 * rtol * float(expected_lse.abs().max()), rtol=0)


@pytest.mark.parametrize("rubbish", [0.0, 5.0, torch.nan, torch.inf])
def test_an_empty_part_weighs_nothing_whatever_its_output_is(rubbish: float) -> None:
    outs = torch.tensor([[1.0, 2.0], [rubbish, rubbish]])
    out, lse = merge_states(outs, torch.tensor([3.0, -torch.inf]))
    assert out.tolist() == [1.0, 2.0] and lse.item() == 3.0


def test_nothing_but_empty_parts_is_empty() -> None:
    out, lse = merge_states(torch.full((3, 2, 4), torch.nan), torch.full((3, 2), -torch.inf))
    assert out.tolist() == [[0.0] * 4] * 2 and lse.tolist() == [-torch.inf] * 2
