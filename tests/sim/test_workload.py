"""Workloads have the statistics they state, and a wrong line of text is refused with what would be right."""

from __future__ import annotations

import numpy as np
import pytest

from batchllm.errors import ConfigError, WorkloadError
from batchllm.planner import plan_batch
from batchllm.sim import WORKLOAD_KINDS, OutputDraw, SimWorkload, parse_workload, shared, snippet, unshared
from batchllm.tokens import TokenTable

_FIXED = OutputDraw(median_len=10)


@pytest.mark.parametrize(
    ("prefix_len", "private_len", "sharing", "saving"),
    [(2000, 200, 16, 0.852), (2000, 1000, 16, 0.625), (1000, 1000, 4, 0.375)],
)
def test_the_grid_of_the_paper_saves_what_it_can_save_there(
    prefix_len: int, private_len: int, sharing: int, saving: float
) -> None:
    workload = shared(prefix_len=prefix_len, private_len=private_len, sharing=sharing, num_requests=320, output=_FIXED)
    plan = plan_batch(workload.table)
    assert plan.optimal_reuse == pytest.approx(saving, abs=0.0006)
    assert plan.num_prefixes == 320 // sharing
    assert set(plan.end_len.tolist()) == {prefix_len}
    assert set(plan.num_consumers.tolist()) == {sharing}


def test_a_shared_workload_is_shuffled() -> None:
    first = shared(prefix_len=8, private_len=2, sharing=4, num_requests=64, output=_FIXED)
    assert (np.diff(first.table.tokens[::10]) != 0).sum() > 32


def test_the_same_seed_gives_the_same_workload_and_another_one_another() -> None:
    draw = OutputDraw(median_len=10, sigma=1.0)
    one, same, other = (snippet(num_requests=50, delay=5.0, output=draw, seed=seed) for seed in (1, 1, 2))
    assert one.table.content_hash() == same.table.content_hash() != other.table.content_hash()
    assert (one.output_len == same.output_len).all()
    assert (one.output_len != other.output_len).any()


def test_log_normal_outputs_have_their_median_and_spread_and_stop_at_the_limit() -> None:
    lens = OutputDraw(median_len=100, sigma=1.0, max_new_len=1024).draw(100_000, np.random.default_rng(0))
    assert np.median(lens) == pytest.approx(100, rel=0.02)
    assert np.percentile(lens, 84.13) == pytest.approx(100 * np.e, rel=0.03)
    assert (lens.min(), lens.max()) == (1, 1024)
    assert OutputDraw(median_len=100, sigma=1.0).limit == 4096
    assert OutputDraw(median_len=100).limit == 100


def test_the_snippet_workload_has_the_averages_of_the_paper() -> None:
    workload = snippet(num_requests=8000, delay=100.0, output=_FIXED)
    plan = plan_batch(workload.table)
    assert plan.optimal_reuse == pytest.approx(0.581, abs=0.01)
    documents = plan.parent >= 0
    assert plan.num_consumers[documents].mean() == pytest.approx(3.0, abs=0.1)
    prefix_len = plan.end_len_of(plan.request_prefix)
    shared_rows = prefix_len > prefix_len.min()
    assert prefix_len[shared_rows].mean() == pytest.approx(1570, rel=0.03)
    assert (plan.prompt_lens - prefix_len)[shared_rows].mean() == pytest.approx(30, abs=1)
    assert plan.prompt_lens.mean() == pytest.approx(1600, rel=0.03)
    instruction = int(np.flatnonzero(plan.parent < 0)[0])
    assert (plan.end_len[instruction], plan.num_consumers[instruction]) == (64, 8000)


def test_snippet_queries_of_a_document_come_together_without_delay_and_apart_with_it() -> None:
    def num_neighbours(delay: float) -> int:
        table = snippet(num_requests=2000, delay=delay, output=_FIXED).table
        document = table.tokens[table.offsets[:-1] + 64]
        return int((np.diff(document) == 0).sum())

    together, near, apart = (num_neighbours(delay) for delay in (0.0, 3.0, 1000.0))
    assert together > 1000 > near > 50 > apart


def test_nothing_is_shared_in_an_unshared_workload() -> None:
    assert plan_batch(unshared(prompt_len=5, num_requests=9, output=_FIXED).table).num_prefixes == 0


@pytest.mark.parametrize("kind", WORKLOAD_KINDS)
def test_every_kind_is_parsed(kind: str) -> None:
    workload = parse_workload(f"{kind}:requests=7,output=3,max_new=9,seed=1")
    assert workload.num_requests == 7
    assert set(workload.max_new_len.tolist()) == {9}


def test_known_lengths_are_told_and_others_are_not() -> None:
    assert (parse_workload("shared:requests=4,prefix=3,private=2,output=5").known_len == 5).all()
    assert (parse_workload("lognormal:requests=4,prefix=3,private=2").known_len == 0).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("paper", "kind 'paper' is not known. Known: shared, lognormal, snippet, unshared"),
        ("", "kind '' is not known"),
        ("shared:depth=3", "'depth=3' is not a setting of 'shared'. Known: prefix=2000, private=200"),
        ("shared:prefix", "'prefix' is not a setting"),
        ("unshared:sharing=3", "'sharing=3' is not a setting of 'unshared'"),
        ("shared:prefix=x", "prefix must be a whole number of at least 1, not 'x'"),
        ("shared:prefix=2.5", "prefix must be a whole number"),
        ("shared:requests=0", "requests must be a whole number of at least 1, not '0'"),
        ("shared:sigma=nan", "sigma must be a number of at least 0, not 'nan'"),
        ("snippet:delay=-1", "delay must be a number of at least 0"),
        ("shared:known=2", "known must be 0 or 1, not 2"),
        ("shared:output=9,max_new=8", "max_new is below output"),
    ],
)
def test_a_bad_line_names_what_is_wrong_and_what_is_known(spec: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_workload(spec)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output_len": np.array([1, 0])}, "row 1: output_len 0"),
        ({"output_len": np.array([1, 9]), "max_new_len": np.array([1, 8])}, "row 1: output_len 9"),
        ({"output_len": np.array([1])}, "output_len must be 2 integers"),
        ({"known_len": np.array([-1, 1])}, "row 0"),
        ({"task": np.zeros(2)}, "task must be 2 integers, not float64"),
    ],
)
def test_lengths_that_do_not_fit_the_rows_are_refused(change: dict[str, np.ndarray], said: str) -> None:
    arguments = {"output_len": np.array([1, 2]), **change}
    with pytest.raises(WorkloadError, match=said):
        SimWorkload.from_lengths("w", TokenTable.from_lists([[1], [2]]), **arguments)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(WorkloadError, match="row 1 is an empty prompt"):
        SimWorkload.from_lengths("w", TokenTable.from_lists([[1], []]), np.array([1, 1]))
