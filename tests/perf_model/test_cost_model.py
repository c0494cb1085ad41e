"""The clock never runs backwards and never beats the device; KV capacity is what the weights leave."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import ConfigError
from batchllm.perf_model import (
    DEVICES,
    MODELS,
    Coefficients,
    CostModel,
    StepWork,
    default_coefficients,
    get_device,
    get_model,
)
from tests.sizes import sized

A100_8B = CostModel.with_defaults(get_device("A100-80GB"), get_model("Llama-3.1-8B"))

quick = settings(deadline=None, max_examples=sized(60, 200), database=None)
shares = st.floats(0.01, 1.0)
seconds = st.floats(0.0, 0.1)
coefficients = st.builds(
    Coefficients,
    flops_efficiency=shares,
    bandwidth_efficiency=shares,
    attention_efficiency=shares,
    step_overhead_s=seconds,
    request_overhead_s=seconds,
)
cost_models = st.builds(
    CostModel,
    device=st.sampled_from(list(DEVICES.values())),
    model=st.sampled_from(list(MODELS.values())),
    coefficients=coefficients,
)


@st.composite
def works(draw: st.DrawFn) -> StepWork:
    num_prefill_tokens, num_decode_tokens = draw(st.integers(0, 10_000)), draw(st.integers(0, 1000))
    num_tokens = num_prefill_tokens + num_decode_tokens
    contexts = st.integers(1, 20_000)
    return StepWork(
        num_prefill_tokens=num_prefill_tokens,
        num_decode_tokens=num_decode_tokens,
        num_sampled=draw(st.integers(num_decode_tokens, num_tokens)),
        prefill_pairs=num_prefill_tokens * draw(contexts),
        decode_kv_tokens=num_decode_tokens * draw(contexts),
        kv_read_tokens=draw(st.integers(0, 10**7)) if num_tokens else 0,
    )


@quick
@given(cost_models, works(), works())
def test_more_work_never_takes_less_time(cost_model: CostModel, work: StepWork, more: StepWork) -> None:
    assert cost_model.step_s(work) <= cost_model.step_s(work + more) * (1 + 1e-9)


@quick
@given(cost_models, works(), works())
def test_two_steps_never_take_less_than_one_with_both_works(cost_model: CostModel, a: StepWork, b: StepWork) -> None:
    """So batching never costs time by this clock."""
    assert cost_model.step_s(a + b) <= (cost_model.step_s(a) + cost_model.step_s(b)) * (1 + 1e-9)


@quick
@given(cost_models, st.lists(works(), min_size=1, max_size=5))
def test_no_run_beats_the_lower_bound_of_its_totals(cost_model: CostModel, steps: list[StepWork]) -> None:
    totals = sum(steps, StepWork())
    num_sampling_steps = max(1, sum(step.num_sampled > 0 for step in steps))
    run_s = sum(map(cost_model.step_s, steps)) * (1 + 1e-9)
    assert run_s >= cost_model.lower_bound_s(totals, num_steps=num_sampling_steps)
    assert run_s >= cost_model.lower_bound_s(totals)


@quick
@given(cost_models, works(), st.sampled_from([field.name for field in fields(Coefficients)]))
def test_a_worse_coefficient_never_saves_time(cost_model: CostModel, work: StepWork, name: str) -> None:
    value = getattr(cost_model.coefficients, name)
    worse = replace(cost_model.coefficients, **{name: value / 2 if "efficiency" in name else value + 0.01})
    assert replace(cost_model, coefficients=worse).step_s(work) >= cost_model.step_s(work)


def test_a_step_without_tokens_takes_no_time() -> None:
    assert A100_8B.step_s(StepWork()) == 0
    assert A100_8B.lower_bound_s(StepWork()) == 0


def test_the_parts_add_up_to_the_step() -> None:
    work = StepWork(
        num_prefill_tokens=100,
        num_decode_tokens=9,
        num_sampled=10,
        prefill_pairs=5050,
        decode_kv_tokens=900,
        kv_read_tokens=1000,
    )
    parts = A100_8B.breakdown(work)
    assert sum(parts) == A100_8B.step_s(work)
    assert all(part > 0 for part in parts)


def test_a_small_decode_step_is_bound_by_reading_the_weights() -> None:
    one = StepWork(num_decode_tokens=1, num_sampled=1, decode_kv_tokens=10, kv_read_tokens=10)
    eight = StepWork(num_decode_tokens=8, num_sampled=8, decode_kv_tokens=80, kv_read_tokens=80)
    reads_s = A100_8B.model.linear_weight_bytes / 2.039e12 / A100_8B.coefficients.bandwidth_efficiency
    assert A100_8B.breakdown(one).linear == A100_8B.breakdown(eight).linear == pytest.approx(reads_s)


def test_a_large_prefill_step_is_bound_by_flops() -> None:
    work = StepWork(num_prefill_tokens=2048, num_sampled=1, prefill_pairs=2048 * 1024, kv_read_tokens=2048)
    flops_s = 2048 * A100_8B.model.linear_flops_per_token / 312e12
    assert A100_8B.breakdown(work).linear == pytest.approx(flops_s / A100_8B.coefficients.flops_efficiency)


def test_only_a_step_that_samples_reads_the_output_layer() -> None:
    work = StepWork(num_prefill_tokens=100, prefill_pairs=5050, kv_read_tokens=100)
    assert A100_8B.breakdown(work).lm_head == 0
    assert A100_8B.breakdown(replace(work, num_sampled=1)).lm_head > 0


def test_reading_shared_kv_once_saves_time_in_decode() -> None:
    alone = StepWork(num_decode_tokens=64, num_sampled=64, decode_kv_tokens=64 * 2000, kv_read_tokens=64 * 2000)
    shared = replace(alone, kv_read_tokens=2000)
    assert A100_8B.step_s(shared) < A100_8B.step_s(alone)


def test_two_devices_halve_everything_but_overheads() -> None:
    work = StepWork(num_prefill_tokens=500, num_sampled=1, prefill_pairs=10**6, kv_read_tokens=500)
    one = A100_8B.breakdown(work)
    two = replace(A100_8B, device=replace(A100_8B.device, num_devices=2)).breakdown(work)
    assert two[:3] == pytest.approx([part / 2 for part in one[:3]])
    assert two.overhead == one.overhead


def test_the_default_clock_of_the_papers_hardware_lies_between_its_best_run_and_the_peak() -> None:
    """A 2048-token step of the paper's best run: 0.39 of the peak as measured for the whole run."""
    num_rows = 482
    step = StepWork(
        num_prefill_tokens=2048 - num_rows,
        num_decode_tokens=num_rows,
        num_sampled=num_rows + 5,
        prefill_pairs=(2048 - num_rows) * 1560,
        decode_kv_tokens=num_rows * 2250,
        kv_read_tokens=30 * 2000 + num_rows * 250,
    )
    reached = step.num_tokens * A100_8B.model.linear_flops_per_token / A100_8B.step_s(step) / 312e12
    assert 0.39 < reached < 0.60


def test_more_steps_that_must_sample_raise_the_bound() -> None:
    """A single row that generates 100 tokens reads all weights 100 times."""
    work = StepWork(num_decode_tokens=100, num_sampled=100, decode_kv_tokens=5050, kv_read_tokens=5050)
    model = A100_8B.model
    weights_s = 100 * (model.linear_weight_bytes + model.lm_head_weight_bytes) / 2.039e12
    kv_s = 5050 * model.kv_bytes_per_token / 2.039e12
    assert A100_8B.lower_bound_s(work, num_steps=100) == pytest.approx(weights_s + kv_s)
    for num_steps in (0, 101):
        with pytest.raises(ConfigError, match=f"num_steps {num_steps} must be between 1 and the rows sampled"):
            A100_8B.lower_bound_s(work, num_steps=num_steps)


def test_defaults_depend_on_the_device_and_exist_for_unknown_ones() -> None:
    assert {name: default_coefficients(device) for name, device in DEVICES.items()}["A100-80GB"].flops_efficiency == 0.6
    unknown = default_coefficients(replace(get_device("H100"), name="B7"))
    assert 0 < unknown.flops_efficiency < 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flops_efficiency", 0.0),
        ("bandwidth_efficiency", 1.01),
        ("attention_efficiency", float("nan")),
        ("step_overhead_s", -1e-9),
        ("request_overhead_s", float("inf")),
    ],
)
def test_a_coefficient_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} .* not {value}"):
        replace(A100_8B.coefficients, **{name: value})


def test_kv_capacity_is_what_the_weights_and_activations_leave() -> None:
    left = 0.9 * 80 * 2**30 - A100_8B.model.weight_bytes - 2 * 2**30
    assert A100_8B.kv_capacity_tokens() == int(left / (128 * 1024))
    assert A100_8B.kv_capacity_tokens(memory_fraction=0.5) < A100_8B.kv_capacity_tokens()
    assert A100_8B.kv_capacity_tokens(activation_bytes=0) == A100_8B.kv_capacity_tokens() + 2 * 2**30 // (128 * 1024)


def test_every_model_of_the_paper_fits_an_a100() -> None:
    for model in MODELS.values():
        assert CostModel.with_defaults(get_device("A100-80GB"), model).kv_capacity_tokens() > 100_000


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    large = replace(get_model("Llama-3.1-70B"), weight_bytes_per_param=2.0)
    cost_model = CostModel.with_defaults(get_device("A100-80GB"), large)
    with pytest.raises(ConfigError, match=r"'A100-80GB' x 1: 90% .* is 72.0 GiB; weights take 131.4 GiB, .* 2.0 GiB"):
        cost_model.kv_capacity_tokens()
    assert replace(cost_model, device=replace(cost_model.device, num_devices=4)).kv_capacity_tokens() > 0


@pytest.mark.parametrize("arguments", [{"memory_fraction": 0}, {"memory_fraction": 1.1}, {"activation_bytes": -1}])
def test_capacity_arguments_out_of_range_are_named(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        A100_8B.kv_capacity_tokens(**arguments)
