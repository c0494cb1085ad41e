"""What is expected of an output, before anything is known and while it is learned."""

from __future__ import annotations

import numpy as np
import pytest

from batchllm.scheduler.output_length import MIN_FINISHED, OutputEstimate, OutputLengths, PredictionError

_MAX = 1000


def _estimate(position: int = 0, *, known_len: int = 0, kind: int = 0, max_new_len: int = _MAX) -> OutputEstimate:
    return OutputEstimate(max_new_len=max_new_len, known_len=known_len, kind=kind, position=position)


def _expected(lengths: OutputLengths, estimate: OutputEstimate, num_generated: int = 0) -> int:
    return int(lengths.expected_lens([estimate], [num_generated])[0])


def _learned(lens: list[int], kind: int = 0, lengths: OutputLengths | None = None) -> OutputLengths:
    """These have finished and nothing runs."""
    lengths = lengths or OutputLengths()
    for n in lens:
        lengths.finish(_estimate(kind=kind), n)
    lengths.refresh([], [])
    return lengths


def test_nothing_known_means_the_limit() -> None:
    lengths = OutputLengths()
    assert all(_expected(lengths, _estimate(i), g) == _MAX for i in range(20) for g in (0, 5, 999))


def test_a_known_length_is_expected_whatever_was_learned() -> None:
    assert _expected(_learned([5] * 100), _estimate(known_len=70)) == 70


def test_a_known_length_is_cut_at_the_limit() -> None:
    assert _expected(OutputLengths(), _estimate(known_len=70, max_new_len=50)) == 50


def test_a_hint_that_was_too_small_counts_as_unknown_from_there_on() -> None:
    assert _expected(OutputLengths(), _estimate(known_len=70), 70) == _MAX


def test_a_request_that_goes_on_is_expected_to_generate_at_least_one_more() -> None:
    lengths = _learned([5] * 100)
    for num_generated in (0, 4, 5, 6, 998):
        expected = lengths.expected_lens([_estimate(i) for i in range(50)], [num_generated] * 50)
        assert (expected > num_generated).all()
        assert (expected <= _MAX).all()


def test_lengths_expected_of_many_are_spread_as_the_lengths_learned() -> None:
    rng = np.random.default_rng(0)
    lens = np.clip(rng.lognormal(4, 1, 4000), 1, _MAX).astype(int)
    lengths = _learned(lens.tolist())
    expected = lengths.expected_lens([_estimate(i) for i in range(2000)], [0] * 2000)
    assert expected.mean() == pytest.approx(lens.mean(), rel=0.05)
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(expected, quantile) == pytest.approx(np.quantile(lens, quantile), rel=0.1)


def test_having_come_far_is_taken_into_account() -> None:
    """Of lengths 10 and 200, half each, whoever passes 10 ends at 200."""
    lengths = _learned([10, 200] * 100)
    estimates = [_estimate(i) for i in range(100)]
    assert set(lengths.expected_lens(estimates, [0] * 100).tolist()) == {10, 200}
    assert set(lengths.expected_lens(estimates, [10] * 100).tolist()) == {200}


def test_what_still_runs_is_not_taken_for_short() -> None:
    """100 start together; 30 end after 10 tokens, 70 run on: only three in ten are expected to end there."""
    lengths = OutputLengths()
    for _ in range(40):
        lengths.finish(_estimate(), 10)
    running = [_estimate(i) for i in range(60)]
    lengths.refresh(running, [11] * 60)
    expected = lengths.expected_lens([_estimate(i) for i in range(1000)], [0] * 1000)
    assert (expected == 10).mean() == pytest.approx(0.4, abs=0.02)
    assert set(expected.tolist()) == {10, _MAX}


def test_an_answer_cut_at_its_limit_says_nothing_of_where_it_would_have_ended() -> None:
    lengths = OutputLengths()
    for _ in range(50):
        lengths.finish(_estimate(max_new_len=20), 20)
        lengths.finish(_estimate(max_new_len=20), 10)
    lengths.refresh([], [])
    expected = lengths.expected_lens([_estimate(i) for i in range(100)], [0] * 100)
    assert set(expected.tolist()) == {10, _MAX}


def test_a_kind_is_taken_for_its_parent_until_enough_of_it_is_known() -> None:
    lengths = OutputLengths()
    job = lengths.kind("job")
    task = lengths.kind("task", job)
    _learned([100] * 100, lengths.kind("other", job), lengths)
    _learned([5] * (MIN_FINISHED - 1), task, lengths)
    assert _expected(lengths, _estimate(kind=task)) in (5, 100)
    assert {_expected(lengths, _estimate(i, kind=task)) for i in range(50)} == {5, 100}
    _learned([5] * 20, task, lengths)
    assert {_expected(lengths, _estimate(i, kind=task)) for i in range(50)} == {5}


def test_a_kind_has_one_number_and_can_be_forgotten_with_all_under_it() -> None:
    lengths = OutputLengths()
    job = lengths.kind("job")
    task = lengths.kind("task", job)
    assert (lengths.kind("job"), lengths.kind("task", job)) == (job, task)
    lengths.forget("job")
    assert lengths.kind("job") != job
    assert lengths.kind("task", lengths.kind("job")) != task
    lengths.forget("no such")


def test_distributions_are_made_anew_only_when_something_new_rests_on_them() -> None:
    lengths = _learned([10] * 1000)
    lengths.finish(_estimate(), 500)
    lengths.refresh([], [])
    assert {_expected(lengths, _estimate(i)) for i in range(5000)} == {10}
    _learned([500] * 30, lengths=lengths)
    assert {_expected(lengths, _estimate(i)) for i in range(5000)} == {10, 500}


def test_the_error_compares_the_mean_expected_at_the_start_with_what_came() -> None:
    lengths = _learned([10, 30] * 100)
    error = PredictionError()
    for position, actual in enumerate((10, 30)):
        estimate = _estimate(position)
        lengths.start(estimate)
        error.add(estimate, actual)
    known = _estimate(known_len=7)
    lengths.start(known)
    error.add(known, 7)
    assert (error.num_requests, error.num_actual_tokens) == (2, 40)
    assert error.num_predicted_tokens == pytest.approx(40)
    assert error.sum_absolute_error == pytest.approx(20)


def test_a_request_that_starts_again_keeps_its_first_prediction() -> None:
    lengths = OutputLengths()
    estimate = _estimate()
    lengths.start(estimate)
    _learned([10] * 100, lengths=lengths)
    lengths.start(estimate)
    assert estimate.predicted_len == _MAX
