"""FlashInfer is planned rightly: its kernels cannot run here, so their stand-in computes what its plan says, in torch.

The stand-in takes exactly the calls that the installed FlashInfer takes: every one is bound to the real signature.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from itertools import pairwise
from typing import Any

import flashinfer  # SGLang depends on it
import pytest
import torch

from batchllm.attention import reference
from batchllm.attention.base import LayerShape
from batchllm.attention.flashinfer_shared import FlashInferSharedAttention, level_batches
from batchllm.attention.torch_shared import merge_states
from batchllm.errors import ConfigError
from tests.attention.cases import CASES, make_case


class _Wrapper:
    """`BatchPrefillWithPagedKVCacheWrapper`, dense and in torch, for pages of one token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inspect.signature(_REAL.__init__).bind(self, *args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(_REAL.plan).bind(self, *args, **kwargs)
        self.planned = bound.arguments
        for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"):
            assert self.planned[name].dtype == torch.int32
        assert self.planned["page_size"] == 1 and (self.planned["paged_kv_last_page_len"] == 1).all()
        assert (self.planned["paged_kv_indptr"].diff() > 0).all() and (self.planned["qo_indptr"].diff() > 0).all()

    def run(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        called = inspect.signature(_REAL.run).bind(self, *args, **kwargs).arguments
        assert called["return_lse"]
        q, (k_pages, v_pages) = called["q"], called["paged_kv_cache"]
        qo_indptr, kv_indptr = self.planned["qo_indptr"].tolist(), self.planned["paged_kv_indptr"].tolist()
        assert qo_indptr[-1] == len(q) and k_pages.shape[1] == 1
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32)
        for (first, last), (start, end) in zip(pairwise(qo_indptr), pairwise(kv_indptr), strict=True):
            slots = self.planned["paged_kv_indices"][start:end].long()
            num_tokens, num_kv = last - first, end - start
            seen = torch.ones(num_tokens, num_kv, dtype=torch.bool)
            if self.planned["causal"]:
                seen = seen.tril(num_kv - num_tokens)
            out[first:last], lse[first:last] = reference._attend(
                q[first:last], k_pages[slots, 0], v_pages[slots, 0], seen, self.planned["sm_scale"]
            )
        return out, lse


def _merge_state(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    v_a, s_a, v_b, s_b = inspect.signature(_REAL_MERGE).bind(*args, **kwargs).args
    return merge_states(torch.stack([v_a, v_b]), torch.stack([s_a, s_b]))


_REAL, _REAL_MERGE = flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.merge_state


@pytest.mark.parametrize("max_levels", [3, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_batches_of_all_levels_make_the_whole(name: str, max_levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that share nothing, that are nested differently deep, and deeper than there are levels."""
    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", _Wrapper)
    monkeypatch.setattr(flashinfer, "merge_state", _merge_state)
    case = make_case(1, **CASES[name], num_heads=4, num_kv_heads=2, head_dim=16)
    attention = FlashInferSharedAttention(case.shape(), "cpu", max_levels=max_levels)
    attention.plan(case.layout, case.table)
    output = torch.full_like(case.q, torch.nan)
    attention.run(case.q, case.k_cache, case.v_cache, output)
    expected = reference.attention(case.q, case.k_cache, case.v_cache, case.table, case.layout, case.scale)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="planned for"):
        attention.run(case.q[1:], case.k_cache, case.v_cache, output)


def test_only_readers_of_a_segment_are_in_its_level() -> None:
    case = make_case(2, num_levels=3, num_roots=2, num_sequences=20, share_alone=0.3)
    private, *levels = level_batches(case.layout)
    assert private.is_causal and len(private.qo_indptr) == 21
    assert len(levels) >= 2
    for batch in levels:
        assert not batch.is_causal
        assert len(batch.tokens) < 20 and (batch.qo_indptr[1:] - batch.qo_indptr[:-1] >= 2).all()


def test_without_flashinfer_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="install flashinfer-python"):
        FlashInferSharedAttention(LayerShape(4, 2, 64, torch.bfloat16, 1.0), "cpu")


def test_importing_the_room_imports_neither_torch_nor_triton_nor_flashinfer() -> None:
    """The planner's side of the layout must stay light."""
    code = "import sys, batchllm.attention; print([m for m in ('torch', 'triton', 'flashinfer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
