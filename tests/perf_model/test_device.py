"""Devices are what their data sheets say, and wrong names and numbers are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchllm.errors import ConfigError
from batchllm.perf_model import DEVICES, get_device


@pytest.mark.parametrize(
    ("name", "tera_flops", "tera_bytes", "gigabytes"),
    [("A100-80GB", 312, 2.039, 80), ("MI200", 191.5, 1.6, 64), ("H100", 989, 3.35, 80), ("H200", 989, 4.8, 141)],
)
def test_peaks_are_those_of_the_data_sheet(name: str, tera_flops: float, tera_bytes: float, gigabytes: int) -> None:
    device = get_device(name)
    assert device.name == name
    assert device.dense_flops == pytest.approx(tera_flops * 1e12, rel=1e-3)
    assert device.memory_bandwidth == pytest.approx(tera_bytes * 1e12)
    assert device.memory_bytes == gigabytes * 2**30


def test_several_devices_are_one_that_is_larger() -> None:
    one = get_device("H200")
    four = replace(one, num_devices=4)
    assert four.total_flops == 4 * one.total_flops
    assert four.total_bandwidth == 4 * one.total_bandwidth
    assert four.total_memory_bytes == 4 * one.total_memory_bytes


@pytest.mark.parametrize(("name", "nearest"), [("a100", "A100-80GB"), ("MI250", "MI200"), ("H20", "H200")])
def test_an_unknown_device_is_refused_with_the_nearest_and_the_list(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"device '{name}' is not known\. Did you mean '{nearest}'\?") as error:
        get_device(name)
    assert str(error.value).endswith(", ".join(DEVICES))


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(ConfigError, match=r"device 'xyz' is not known\. Known: A100-80GB, MI200, H100, H200"):
        get_device("xyz")


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_rates_must_be_above_zero_and_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=f"device 'H100': memory_bandwidth must be .* not {value}"):
        replace(get_device("H100"), memory_bandwidth=value)
