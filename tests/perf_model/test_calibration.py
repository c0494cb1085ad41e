"""A fit finds the coefficients that made the samples, says what it could not find, and survives a file."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import ConfigError
from batchllm.perf_model import (
    Coefficients,
    CostModel,
    Fit,
    StepWork,
    default_coefficients,
    fit,
    get_device,
    get_model,
    prefill_pairs,
)
from tests.sizes import sized

DEVICE, MODEL = get_device("H200"), get_model("Qwen2.5-7B")
TRUE = Coefficients(
    flops_efficiency=0.47,
    bandwidth_efficiency=0.71,
    attention_efficiency=0.33,
    step_overhead_s=3.1e-3,
    request_overhead_s=4.2e-5,
)
NAMES = [field.name for field in fields(Coefficients)]
Samples = list[tuple[StepWork, float]]


def _prefill(num_tokens: int, cached_len: int = 0) -> StepWork:
    return StepWork(
        num_prefill_tokens=num_tokens,
        num_sampled=1,
        prefill_pairs=prefill_pairs(cached_len, num_tokens),
        kv_read_tokens=cached_len + num_tokens,
    )


def _decode(num_rows: int, context_len: int) -> StepWork:
    num_kv_tokens = num_rows * context_len
    return StepWork(
        num_decode_tokens=num_rows,
        num_sampled=num_rows,
        decode_kv_tokens=num_kv_tokens,
        kv_read_tokens=num_kv_tokens,
    )


PREFILLS = [_prefill(n, cached) for n in (16, 128, 512, 2048, 8192) for cached in (0, 2000, 16000)]
DECODES = [_decode(rows, context) for rows in (1, 8, 64, 256) for context in (100, 1000, 8000)]
MIXED = [prefill + decode for prefill in PREFILLS[::3] for decode in DECODES[::3]]


def _samples(true: Coefficients, works: list[StepWork], noise: float = 0.0, seed: int = 0) -> Samples:
    clock = CostModel(device=DEVICE, model=MODEL, coefficients=true)
    factors = np.exp(np.random.default_rng(seed).normal(0, noise, len(works)))
    return [(work, clock.step_s(work) * factor) for work, factor in zip(works, factors.tolist(), strict=True)]


def _predicts(found: Fit, samples: Samples) -> float:
    """Largest relative error over the samples."""
    return max(abs(found.cost_model.step_s(work) / seconds - 1) for work, seconds in samples)


@given(
    st.builds(
        Coefficients,
        flops_efficiency=st.floats(0.2, 0.95),
        bandwidth_efficiency=st.floats(0.3, 0.95),
        attention_efficiency=st.floats(0.1, 0.5),
        step_overhead_s=st.floats(1e-3, 2e-2),
        request_overhead_s=st.floats(1e-5, 2e-4),
    )
)
@settings(deadline=None, max_examples=sized(25, 40), database=None)
def test_exact_samples_give_the_coefficients_back(true: Coefficients) -> None:
    found = fit(DEVICE, MODEL, _samples(true, PREFILLS + DECODES + MIXED))
    assert found.assumed == ()
    for name in NAMES:
        assert getattr(found.cost_model.coefficients, name) == pytest.approx(getattr(true, name), rel=1e-3)
    assert found.p90_relative_error < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_noisy_samples_give_them_nearly(seed: int) -> None:
    """With 3 % of noise, efficiencies within 10 %, overheads within 20 %, and predictions better than a sample."""
    works = (PREFILLS + DECODES + MIXED) * 3
    found = fit(DEVICE, MODEL, _samples(TRUE, works, noise=0.03, seed=seed))
    assert found.assumed == ()
    for name in NAMES:
        rel = 0.1 if "efficiency" in name else 0.2
        assert getattr(found.cost_model.coefficients, name) == pytest.approx(getattr(TRUE, name), rel=rel)
    assert _predicts(found, _samples(TRUE, works)) < 0.03
    assert 0.01 < found.median_relative_error < 0.03 < found.p90_relative_error < 0.08
    assert found.num_samples == len(works)


def test_a_few_hiccups_do_not_carry_the_fit_away() -> None:
    """One step of 25 took ten times its time."""
    samples = _samples(TRUE, (PREFILLS + DECODES + MIXED) * 2, noise=0.02)
    hiccups = [(work, seconds * (10 if i % 25 == 7 else 1)) for i, (work, seconds) in enumerate(samples)]
    found = fit(DEVICE, MODEL, hiccups)
    assert found.median_relative_error < 0.1


def test_what_the_samples_do_not_tell_keeps_its_default_and_is_named() -> None:
    """Decode of few rows is bound by reads: neither FLOP nor attention efficiency shows."""
    decodes = [work for work in DECODES if work.num_sampled < 100]
    samples = _samples(TRUE, decodes * 3, noise=0.01)
    found = fit(DEVICE, MODEL, samples)
    assert {"flops_efficiency", "attention_efficiency"} <= set(found.assumed)
    assert "bandwidth_efficiency" not in found.assumed
    defaults = default_coefficients(DEVICE)
    for name in found.assumed:
        assert getattr(found.cost_model.coefficients, name) == pytest.approx(getattr(defaults, name))
    assert _predicts(found, _samples(TRUE, decodes)) < 0.05


def test_a_fit_is_physical_even_if_the_samples_are_not() -> None:
    """Steps faster than the device can be: no efficiency above 1, no negative overhead, and the error shows it."""
    fast = [(work, seconds / 10) for work, seconds in _samples(TRUE, PREFILLS + DECODES + MIXED)]
    found = fit(DEVICE, MODEL, fast)
    assert found.cost_model.coefficients.flops_efficiency <= 1
    assert found.cost_model.coefficients.step_overhead_s >= 0
    assert found.median_relative_error > 0.2


def test_the_same_samples_give_the_same_fit() -> None:
    samples = _samples(TRUE, PREFILLS + DECODES, noise=0.05)
    assert fit(DEVICE, MODEL, samples) == fit(DEVICE, MODEL, samples)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        pytest.param([], "0 steps are too few .* at least 10 steps", id="none"),
        pytest.param(_samples(TRUE, PREFILLS[:9]), "9 steps are too few", id="too few"),
        pytest.param(_samples(TRUE, [_decode(8, 100)] * 50), "50 steps are of 1 kinds only", id="all the same"),
        pytest.param(_samples(TRUE, DECODES[:5] * 9), "45 steps are of 5 kinds only", id="few kinds"),
        pytest.param(
            _samples(TRUE, [_decode(1, context) for context in range(10, 60)], noise=0.05),
            "the 50 steps differ too little: they tell only bandwidth_efficiency",
            id="kinds that do not differ enough",
        ),
    ],
)
def test_samples_that_tell_too_little_are_refused_with_what_is_needed(samples: Samples, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        fit(DEVICE, MODEL, samples)
    assert "short and long contexts" in str(error.value)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_no_step_takes_is_refused_by_its_place(seconds: float) -> None:
    samples = _samples(TRUE, PREFILLS)
    samples[3] = (samples[3][0], seconds)
    with pytest.raises(ConfigError, match="sample 3: "):
        fit(DEVICE, MODEL, samples)


def test_a_step_without_tokens_is_no_sample() -> None:
    with pytest.raises(ConfigError, match="sample 0: "):
        fit(DEVICE, MODEL, [(StepWork(), 1.0)])


FIT = Fit(
    cost_model=CostModel(device=replace(DEVICE, num_devices=2), model=MODEL, coefficients=TRUE),
    median_relative_error=0.031,
    p90_relative_error=0.08,
    num_samples=77,
    assumed=("attention_efficiency",),
)


def test_a_fit_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    FIT.save(path)
    assert Fit.load(path) == FIT
    assert Fit.from_dict(json.loads(json.dumps(FIT.to_dict()))) == FIT


def _changed(key: str, value: Any, part: str | None = None) -> dict[str, Any]:
    document = FIT.to_dict()
    target = document[part] if part else document
    target[key] = value
    return document


def _without(key: str, part: str | None = None) -> dict[str, Any]:
    document = FIT.to_dict()
    del (document[part] if part else document)[key]
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is not a calibrated cost model"),
        ({}, "is not a calibrated cost model"),
        (_changed("version", 2), "version 2 is not 1; fit again"),
        (_without("coefficients"), "missing required field `coefficients`"),
        (_changed("device", 3), r"Expected `object`, got `int` - at `\$.device`"),
        (_without("flops_efficiency", "coefficients"), r"missing .* `flops_efficiency` - at `\$.coefficients`"),
        (_changed("flops", 1.0, "coefficients"), "unknown field 'flops' of coefficients; known: flops_efficiency"),
        (_changed("flops_efficiency", 1.5, "coefficients"), "flops_efficiency is a share of the peak"),
        (_changed("flops_efficiency", "0.5", "coefficients"), r"got `str` - at `\$.coefficients.flops_efficiency`"),
        (_changed("num_layers", 2.5, "model"), r"Expected `int`, got `float` - at `\$.model.num_layers`"),
        (_changed("is_tied", 1, "model"), r"Expected `bool`, got `int` - at `\$.model.is_tied`"),
        (_changed("dense_flops", True, "device"), r"Expected `float`, got `bool` - at `\$.device.dense_flops`"),
        (_changed("name", None, "device"), r"Expected `str`, got `null` - at `\$.device.name`"),
        (_changed("num_samples", None), r"Expected `int`, got `null` - at `\$.num_samples`"),
        (_changed("assumed", ["speed"]), r"'speed' - at `\$.assumed\[0\]`"),
    ],
)
def test_a_malformed_document_is_refused_by_file_and_field(document: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        Fit.load(path)
    assert str(error.value).startswith(str(path))


def test_a_field_with_a_default_may_be_absent() -> None:
    assert Fit.from_dict(_without("num_devices", "device")).cost_model.device == DEVICE


def test_files_that_are_no_json_or_not_there_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json: the calibration cannot be read: No such file"):
        Fit.load(tmp_path / "none.json")
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad.json: the calibration is not JSON"):
            Fit.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="the calibration cannot be written: No such file"):
        FIT.save(tmp_path / "no" / "h200.json")
