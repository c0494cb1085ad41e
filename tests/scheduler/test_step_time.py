"""Claims about predictions of step times: learned from noisy steps, safe, and inverted exactly."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.scheduler.step_time import StepLoad, StepTimeModel
from tests.sizes import sized


def with_rows(load: StepLoad, num_rows: int, kv_tokens: int) -> StepLoad:
    """The load with so many more rows that decode and attend to ``kv_tokens`` together."""
    return replace(
        load, num_decode_rows=load.num_decode_rows + num_rows, decode_kv_tokens=load.decode_kv_tokens + kv_tokens
    )


_EXAMPLES = sized(100, 2000)
_SECONDS = (5e-3, 1e-4, 2e-7, 2e-3, 8e-5, 1e-8)


def _seconds(load: StepLoad, costs: tuple[float, ...] = _SECONDS) -> float:
    """What a machine whose times are linear takes."""
    step, row, kv_token, prefill, token, pair = costs
    return (
        step
        + row * load.num_decode_rows
        + kv_token * load.decode_kv_tokens
        + prefill * (load.num_prefill_tokens > 0)
        + token * load.num_prefill_tokens
        + pair * load.prefill_pairs
    )


def _draw_load(draw: random.Random) -> StepLoad:
    rows = draw.randint(0, 100)
    load = StepLoad(rows, rows * draw.randint(1, 500))
    if rows == 0 or draw.random() < 0.3:
        load = load.with_prefill(draw.randint(1, 1000), draw.randint(0, 2000))
    return load


def _trained(seed: int, num_steps: int = 400, noise: float = 0.05) -> StepTimeModel:
    draw, model = random.Random(seed), StepTimeModel()
    for _ in range(num_steps):
        load = _draw_load(draw)
        model.observe(load, _seconds(load) * draw.lognormvariate(0, noise))
    return model


_COUNTS = st.tuples(st.integers(0, 200), st.integers(0, 400), st.integers(0, 2000), st.integers(0, 4000))


def _load(counts: tuple[int, int, int, int]) -> StepLoad:
    rows, kv_len, tokens, cached = counts
    load = StepLoad(rows, rows * kv_len)
    return load.with_prefill(tokens, cached) if tokens else load


def test_a_linear_machine_is_learned_from_noisy_steps() -> None:
    draw = random.Random(1)
    for seed in range(5):
        model = _trained(seed)
        for _ in range(50):
            load = _draw_load(draw)
            assert abs(model.predict(load) / _seconds(load) - 1) < 0.1


def test_a_machine_that_becomes_slower_is_learned_anew() -> None:
    """Another process takes half of it: six hundred steps later the predictions are twice as long."""
    model, draw = _trained(0), random.Random(2)
    for _ in range(600):
        load = _draw_load(draw)
        model.observe(load, 2 * _seconds(load))
    for _ in range(50):
        load = _draw_load(draw)
        assert 1.8 < model.predict(load) / _seconds(load) < 2.2


def test_decode_steps_do_not_make_it_forget_what_a_prompt_costs() -> None:
    model, draw = _trained(0), random.Random(3)
    for _ in range(5000):
        rows = draw.randint(1, 100)
        load = StepLoad(rows, rows * draw.randint(1, 500))
        model.observe(load, _seconds(load))
    load = StepLoad(20, 2000).with_prefill(500, 100)
    assert abs(model.predict(load) / _seconds(load) - 1) < 0.1


def test_few_steps_exceed_the_margin_whatever_the_noise() -> None:
    for noise in (0.02, 0.1, 0.2):
        draw, model = random.Random(4), _trained(0, 2000, noise)
        num_over = 0
        for _ in range(2000):
            load = _draw_load(draw)
            seconds = _seconds(load) * draw.lognormvariate(0, noise)
            num_over += seconds > model.upper(load)
            model.observe(load, seconds)
        assert num_over <= 0.03 * 2000, (noise, num_over)


@settings(max_examples=_EXAMPLES, deadline=None)
@given(
    steps=st.lists(st.tuples(_COUNTS, st.floats(1e-6, 10.0)), max_size=40),
    base=_COUNTS,
    more=st.tuples(st.integers(0, 50), st.integers(0, 1000), st.integers(0, 500)),
)
def test_no_prediction_falls_when_a_step_grows(
    steps: list[tuple[tuple[int, int, int, int], float]],
    base: tuple[int, int, int, int],
    more: tuple[int, int, int],
) -> None:
    """Whatever it has seen: contradictory, huge, or nothing."""
    model = StepTimeModel()
    for counts, seconds in steps:
        model.observe(_load(counts), seconds)
    load = _load(base)
    larger = with_rows(load, more[0], more[1])
    larger = larger.with_prefill(more[2], 10) if more[2] else larger
    assert np.isfinite(model.predict(larger))
    assert 0 <= model.predict(load) <= model.predict(larger) * (1 + 1e-9)
    assert 1.0 <= model.margin <= 2.0


@settings(max_examples=_EXAMPLES, deadline=None)
@given(seed=st.integers(0, 5), base=_COUNTS, cached_len=st.integers(0, 4000), limit=st.floats(1e-3, 0.2))
def test_as_many_prompt_tokens_fit_as_said_and_not_one_more(
    seed: int, base: tuple[int, int, int, int], cached_len: int, limit: float
) -> None:
    model, load = _trained(seed, 60), _load(base)
    num = model.prefill_that_fits(load, cached_len, limit)
    if num:
        assert model.upper(load.with_prefill(num, cached_len)) <= limit * (1 + 1e-6)
    if num < 2 * 1000:  # the cap: twice what a step has carried
        assert model.upper(load.with_prefill(num + 2, cached_len)) > limit * (1 - 1e-6) or num >= 1


@settings(max_examples=_EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 5),
    base=_COUNTS,
    kv_lens=st.lists(st.integers(1, 5000), max_size=60),
    limit=st.floats(1e-3, 0.2),
)
def test_as_many_rows_fit_as_said_and_not_one_more(
    seed: int, base: tuple[int, int, int, int], kv_lens: list[int], limit: float
) -> None:
    model, load = _trained(seed, 60), _load(base)
    num = model.rows_that_fit(load, np.array(kv_lens, np.int64), limit)
    if num:
        assert model.upper(with_rows(load, num, sum(kv_lens[:num]))) <= limit * (1 + 1e-6)
    if num < len(kv_lens):
        assert model.upper(with_rows(load, num + 1, sum(kv_lens[: num + 1]))) > limit * (1 - 1e-6)
