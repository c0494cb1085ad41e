"""What a device can do at most, by its vendor's data sheet.

Knows: peak rates and sizes. Must not know: models, how much of a peak anything reaches.
Invariant: rates are dense ones; the doubled figures for 2:4 sparsity on data sheets are halved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from batchllm.errors import ConfigError
from batchllm.perf_model.fields import check_positive, lookup

_TERA = 1e12
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One device, or several equal ones that share every step (tensor parallel).

    Several devices are taken as one that is so many times larger; what they spend talking to each other is not counted
    and has to show in the efficiencies.

    Attributes:
        name: Name of the device, which also selects default efficiencies.
        dense_flops: Peak FLOP/s of one device in 16-bit dense matrix products.
        memory_bandwidth: Peak bytes/s between one device and its memory.
        memory_bytes: Memory of one device.
        num_devices: How many there are.

    Raises:
        ConfigError: A number is not above 0.
    """

    name: str
    dense_flops: float
    memory_bandwidth: float
    memory_bytes: int
    num_devices: int = 1

    def __post_init__(self) -> None:
        check_positive(
            f"device {self.name!r}",
            dense_flops=self.dense_flops,
            memory_bandwidth=self.memory_bandwidth,
            memory_bytes=self.memory_bytes,
            num_devices=self.num_devices,
        )

    @property
    def total_flops(self) -> float:
        """Peak FLOP/s of all devices together."""
        return self.dense_flops * self.num_devices

    @property
    def total_bandwidth(self) -> float:
        """Peak bytes/s of all devices together."""
        return self.memory_bandwidth * self.num_devices

    @property
    def total_memory_bytes(self) -> int:
        """Memory of all devices together."""
        return self.memory_bytes * self.num_devices


def _device(name: str, tera_flops: float, tera_bytes: float, memory_gib: int) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        dense_flops=tera_flops * _TERA,
        memory_bandwidth=tera_bytes * _TERA,
        memory_bytes=memory_gib * _GIB,
    )


DEVICES: Mapping[str, DeviceSpec] = MappingProxyType(
    {
        device.name: device
        for device in (
            _device("A100-80GB", 312.0, 2.039, 80),
            _device("MI200", 191.5, 1.6, 64),
            _device("H100", 989.5, 3.35, 80),
            _device("H200", 989.5, 4.8, 141),
        )
    }
)
"""Known devices by name.

* ``A100-80GB``: SXM4. NVIDIA A100 data sheet: BF16 and FP16 312 TFLOP/s dense, 2,039 GB/s, 80 GB.
* ``MI200``: one of the two dies (GCD) of an AMD Instinct MI250X, each a GPU of its own to software. AMD MI250X data
  sheet, halved: FP16 and BF16 383 -> 191.5 TFLOP/s, 3.2 -> 1.6 TB/s, 128 -> 64 GB.
* ``H100``: SXM5. NVIDIA H100 data sheet: BF16 and FP16 1,979 TFLOP/s with sparsity -> 989.5 dense, 3.35 TB/s, 80 GB.
* ``H200``: SXM. NVIDIA H200 data sheet: BF16 and FP16 1,979 TFLOP/s with sparsity -> 989.5 dense, 4.8 TB/s, 141 GB.

Memory sold as "80 GB" is close to 80 * 2**30 bytes: drivers show at most 2 % less than so many GiB.
"""


def parse_device(spec: str) -> DeviceSpec:
    """A known device by name, or another one as ``NAME:flops=F,bandwidth=B,memory=M`` (FLOP/s, bytes/s, bytes).

    Raises:
        ConfigError: The name is not known, or a number is missing, unknown or not above 0.
    """
    name, colon, rest = spec.partition(":")
    if not colon:
        return get_device(name)
    values: dict[str, float] = {}
    for item in rest.split(","):
        key, _, text = item.partition("=")
        try:
            values[key] = float(text)
        except ValueError:
            raise ConfigError(f"device {spec!r}: {item!r} is not KEY=NUMBER") from None
    if values.keys() != {"flops", "bandwidth", "memory"} or not all(0 < value < math.inf for value in values.values()):
        raise ConfigError(f"device {spec!r}: give flops, bandwidth and memory, each above 0")
    return DeviceSpec(
        name=name,
        dense_flops=values["flops"],
        memory_bandwidth=values["bandwidth"],
        memory_bytes=round(values["memory"]),
    )


def get_device(name: str) -> DeviceSpec:
    """The known device of that name.

    Raises:
        ConfigError: There is none; names the nearest and lists all.
    """
    return lookup("device", name, DEVICES)
