"""A scored prompt shares what is in front of the first token that it scores, less one, and computes the rest alone."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.planner import GROUP_ORDERS, GroupOrder, plan_batch
from batchllm.tokens import TokenTable
from tests.sizes import sized

untimed = settings(deadline=None, max_examples=sized(50, 100))

prompts = st.lists(st.sampled_from([[0], [1], [0, 1, 2], [0, 1, 3], [4] * 4]), min_size=1, max_size=5).map(
    lambda runs: [token for run in runs for token in run]
)
scored = prompts.flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, len(tokens))))
page_sizes = st.sampled_from([1, 2, 4])


def _fewest(rows: list[tuple[list[int], int]], page_size: int) -> int:
    """What the best order computes if nothing that may be shared is forgotten, and nothing else is kept."""
    best = []
    for order in permutations(rows):
        cached: set[tuple[int, ...]] = set()
        computed = 0
        for tokens, share_len in order:
            pages = [tuple(tokens[:end]) for end in range(page_size, share_len + 1, page_size)]
            computed += len(tokens) - page_size * sum(page in cached and len(page) < share_len for page in pages)
            cached.update(pages)
        best.append(computed)
    return min(best)


@untimed
@given(st.lists(scored, max_size=4), page_sizes, st.sampled_from(GROUP_ORDERS))
def test_the_optimum_counts_scored_tokens_for_each_row(
    rows: list[tuple[list[int], int]], page_size: int, group_order: GroupOrder
) -> None:
    table = TokenTable.from_lists([tokens for tokens, _ in rows])
    share_lens = np.array([share_len for _, share_len in rows], np.int32)
    plan = plan_batch(table, page_size=page_size, group_order=group_order, share_lens=share_lens)
    plan.validate(table)
    assert plan.optimal_prefill_tokens == _fewest(rows, page_size)
    assert (plan.end_len_of(plan.request_prefix) <= share_lens[plan.order]).all()


@untimed
@given(st.lists(prompts, max_size=20), page_sizes)
def test_a_plan_in_which_all_may_be_shared_is_that_without_limits(rows: list[list[int]], page_size: int) -> None:
    table = TokenTable.from_lists(rows)
    plan = plan_batch(table, page_size=page_size)
    limited = plan_batch(table, page_size=page_size, share_lens=table.lengths.astype(np.int32))
    assert limited.computed_lens().tolist() == plan.computed_lens().tolist()
    assert limited.order.tolist() == plan.order.tolist()


def test_continuations_of_one_context_share_all_of_it_but_its_last_token() -> None:
    context = list(range(10))
    table = TokenTable.from_lists([[*context, 20 + i, 30, 40] for i in range(4)])
    plan = plan_batch(table, share_lens=np.full(4, 10, np.int32))
    assert plan.optimal_prefill_tokens == 9 + 4 * 4
    assert plan.end_len.tolist() == [9]


def test_a_limit_outside_its_prompt_is_an_error_that_names_the_row() -> None:
    table = TokenTable.from_lists([[1, 2], [3]])
    with pytest.raises(WorkloadError, match="row 1 has a share_len of 2"):
        plan_batch(table, share_lens=np.array([1, 2], np.int32))
    with pytest.raises(WorkloadError, match="row 0 has a share_len of 0"):
        plan_batch(table, share_lens=np.array([0, 1], np.int32))
