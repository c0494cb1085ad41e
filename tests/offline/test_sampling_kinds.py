"""What is found of sampling parameters once holds for every row that has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchllm.errors import RowError
from batchllm.offline.job_rows import UNLIMITED
from batchllm.offline.sampling_kinds import NO_SEED, SamplingKinds
from batchllm.request import SamplingParams


def test_more_ways_than_are_remembered_are_told_apart() -> None:
    """Objects of rows that are gone give their place in memory to those of other rows."""
    kinds = SamplingKinds(UNLIMITED)
    for _ in range(2):
        for number in range(3000):
            sampling = SamplingParams(max_new_tokens=number + 1, temperature=0.5 + number % 3, seed=number, n=2)
            found = kinds.check(sampling)
            assert found.sampling == sampling and found.seed == number
            assert kinds.all[found.kind].temperature == sampling.temperature
    assert len(kinds.all) == 3


def test_each_row_that_asks_for_what_the_engine_lacks_is_refused() -> None:
    kinds = SamplingKinds(replace(UNLIMITED, has_grammar=False))
    sampling = SamplingParams(regex="a+")
    for _ in range(2):
        with pytest.raises(RowError, match="structured output is switched off"):
            kinds.check(sampling)
    assert kinds.all == []


@pytest.mark.parametrize(
    ("sampling", "same_seed"),
    [
        (SamplingParams(), None),
        (SamplingParams(temperature=0.0, seed=3), NO_SEED),
        (SamplingParams(seed=3), 3),
        (SamplingParams(seed=3, n=2), None),
    ],
)
def test_rows_have_one_answer_where_nothing_is_drawn_or_all_is_drawn_with_one_seed(
    sampling: SamplingParams, same_seed: int | None
) -> None:
    assert SamplingKinds(UNLIMITED).check(sampling).same_seed == same_seed
