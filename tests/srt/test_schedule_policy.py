"""Claims about what `PlannedPrefillAdder` takes into a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult

from batchllm.srt.managers.prefill_pass import PlannedPrefillAdder
from batchllm.srt.managers.schedule_batch import PlannedReq


class _Cache:
    """Counts locks; nothing is cached."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def supports_mamba(self) -> bool:
        return False

    def evictable_size(self) -> int:
        return 0

    def inc_lock_ref(self, node: Any) -> Any:
        return SimpleNamespace(delta=0, swa_uuid_for_lock=None)

    def start(self, req: Any) -> None:
        self.started.append(req)


def _planned(num_tokens: int, max_new_len: int) -> Any:
    req = object.__new__(PlannedReq)
    req.full_untruncated_fill_ids = [1] * num_tokens
    req.prefix_indices = []
    req.output = SimpleNamespace(max_new_len=max_new_len)
    req.output_ids = []
    req.retracted_stain = False
    req.last_node = None
    return req


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(1, 80),
    st.integers(1, 120),
    st.booleans(),
)
def test_the_prompt_in_pieces_is_one_that_the_step_has_taken(
    lens: list[tuple[int, int]], chunk: int, free: int, takes_live: bool
) -> None:
    """Also where the step has tokens left for a piece, and the pool, beside a live request, has none."""
    cache = _Cache()
    pool = SimpleNamespace(available_size=lambda: free)
    no_context_parallel = {"is_dsa_prefill_cp_in_seq_split": bool, "is_prefill_context_parallel_enabled": bool}
    with patch.multiple(schedule_policy, **no_context_parallel):
        adder = PlannedPrefillAdder(1, cache, pool, None, 0.5, 1000, chunk)
    adder.takes_live = takes_live
    for num_tokens, max_new_len in lens:
        req = _planned(num_tokens, max_new_len)
        if adder.add_one_req(req, has_chunked_req=False, truncation_align_size=None) != AddReqResult.CONTINUE:
            break
    assert adder.can_run_list == cache.started
    assert adder.new_chunked_req is None or adder.new_chunked_req in adder.can_run_list
    assert sum(req.extend_range.length for req in adder.can_run_list) <= chunk
