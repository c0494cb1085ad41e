"""The summary says what a plan shares and saves, in numbers that add up and words one can read."""

from __future__ import annotations

import json
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner import explain, largest_prefixes, plan_batch
from batchllm.planner.explain import _saved_per_prefix
from batchllm.tokens import TokenTable
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None, max_examples=sized(50, 100))

prompts = st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=12), min_size=1, max_size=25)

TABLE = TokenTable.from_lists(
    [[1] * 10 + [branch] * 4 + [i] for branch in (2, 3) for i in (7, 8, 9)] + [[5, 6], [5, 6], [9]]
)


@untimed
@given(prompts, st.sampled_from([1, 2, 4]))
def test_what_the_prefixes_save_adds_up_to_what_the_plan_saves(rows: list[list[int]], page_size: int) -> None:
    plan = plan_batch(TokenTable.from_lists(rows), page_size=page_size)
    saved = plan.num_prompt_tokens - plan.optimal_prefill_tokens
    every = np.ones(plan.num_requests, bool)
    assert _saved_per_prefix(plan, every, plan.num_consumers).sum() == saved


@untimed
@given(prompts)
def test_duplicates_are_prompts_seen_before(rows: list[list[int]]) -> None:
    table = TokenTable.from_lists(rows)
    distinct = {tuple(row) for row in rows}
    assert explain(plan_batch(table), table).num_duplicates == len(rows) - len(distinct)


def test_the_numbers_are_those_of_the_plan() -> None:
    summary = explain(plan_batch(TABLE), TABLE)
    assert (summary.num_requests, summary.num_prompt_tokens) == (9, 95)
    assert (summary.optimal_prefill_tokens, summary.saved_tokens) == (28, 67)
    assert (summary.exact_one_level_saved_tokens, summary.greedy_one_level_saved_tokens) == (57, 51)
    assert (summary.num_prefixes, summary.prefixes_per_level) == (4, (2, 2))
    assert (summary.num_unshared_requests, summary.num_duplicates) == (1, 1)
    assert [p.saved_tokens for p in summary.largest] == [50, 8, 8, 1]
    largest = summary.largest[0]
    assert (largest.level, largest.own_len, largest.num_consumers) == (1, 10, 6)
    assert (summary.longest_path_len, summary.longest_prompt_len) == (14, 15)
    assert summary.kv_needed_tokens == 29


def test_kv_is_counted_in_whole_pages() -> None:
    assert explain(plan_batch(TABLE, page_size=4), TABLE).kv_needed_tokens == 28
    table = TokenTable.from_lists([[1] * 5])
    assert explain(plan_batch(table, page_size=4), table).kv_needed_tokens == 8


def test_only_the_ten_prefixes_that_save_most_are_listed() -> None:
    table = TokenTable.from_lists([[doc] * doc + [i] for doc in range(1, 31) for i in (77, 78)])
    largest = explain(plan_batch(table), table).largest
    assert [p.saved_tokens for p in largest] == list(range(30, 20, -1))


def test_the_text_says_what_is_shared_and_what_it_saves() -> None:
    summary = explain(plan_batch(TABLE), TABLE)
    text = str(summary)
    assert text == summary.render()
    assert "9 requests, 95 prompt tokens." in text
    assert "28 of them must be computed; the other 67 (70.5%) are read from shared prefixes." in text
    assert "4 shared prefixes: 2 at level 1, 2 at level 2." in text
    assert "Requests that share nothing: 1; that repeat another prompt exactly: 1." in text


def test_many_levels_are_summed_up() -> None:
    table = TokenTable.from_lists([[1] * n for n in range(1, 103)])
    assert "and 93 deeper levels" in str(explain(plan_batch(table), table))


def test_a_batch_that_shares_nothing_and_an_empty_one_are_described() -> None:
    table = TokenTable.from_lists([[1], [2]])
    assert "Requests that share nothing: 2" in str(explain(plan_batch(table), table))
    empty = TokenTable.from_lists([])
    assert str(explain(plan_batch(empty), empty)) == "Nothing to run: the batch has no requests."


def test_a_summary_becomes_json() -> None:
    summary = explain(plan_batch(TABLE), TABLE)
    fields = json.loads(json.dumps(summary.to_dict()))
    assert fields == summary.to_dict()
    assert fields["largest"][0]["num_consumers"] == 6
    assert np.isclose(fields["optimal_reuse"], 67 / 95)


@untimed
@given(prompts, st.randoms(use_true_random=False))
def test_of_some_requests_only_they_count(rows: list[list[int]], random: Random) -> None:
    """Consumers, the row and what is saved are those that counting one by one gives."""
    plan = plan_batch(TokenTable.from_lists(rows))
    chosen = np.array([random.random() < 0.5 for _ in rows], bool)
    for prefix in largest_prefixes(plan, chosen):
        tokens = rows[prefix.example_row][: prefix.end_len]
        readers = [at for at, row in enumerate(plan.order.tolist()) if rows[row][: prefix.end_len] == tokens]
        ours = [at for at in readers if chosen[at]]
        assert plan.order[ours[0]] == prefix.example_row
        assert prefix.num_consumers == len(ours)
        num_whole = sum(rows[plan.order[at]] == tokens for at in ours if at != readers[0])
        assert prefix.saved_tokens == (len(ours) - 1) * prefix.own_len - num_whole
