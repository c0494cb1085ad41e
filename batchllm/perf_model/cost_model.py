"""Seconds of a step: a roofline for each part of it, at the efficiencies a device reaches.

Knows: a device, a model, counts. Must not know: what the counts came from, clocks.
Invariant: seconds never fall when a count rises, and never are below `CostModel.lower_bound_s`.

Left out, each usually a few percent of a step: norms and activations, writing new KV, and what several devices tell
each other. Fitted efficiencies take them in; bounds stay bounds without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from batchllm.errors import ConfigError
from batchllm.perf_model.device import DeviceSpec
from batchllm.perf_model.fields import check_positive
from batchllm.perf_model.model import ModelShape
from batchllm.perf_model.step import StepWork

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What a runtime reaches on a device.

    Attributes:
        flops_efficiency: Share of the peak FLOP/s in matrix products of weights, above 0 and at most 1.
        bandwidth_efficiency: Share of the peak bytes/s when weights or KV are read, above 0 and at most 1.
        attention_efficiency: Share of the peak FLOP/s in attention, above 0 and at most 1.
        step_overhead_s: Seconds of every step, whatever is in it.
        request_overhead_s: Seconds of every sampled row: sampling, and the runtime's care for the request.

    Raises:
        ConfigError: A number is out of its range.
    """

    flops_efficiency: float
    bandwidth_efficiency: float
    attention_efficiency: float
    step_overhead_s: float
    request_overhead_s: float

    def __post_init__(self) -> None:
        shares = {
            name: getattr(self, name) for name in ("flops_efficiency", "bandwidth_efficiency", "attention_efficiency")
        }
        check_positive("coefficients", **shares)
        for name, share in shares.items():
            if share > 1:
                raise ConfigError(f"coefficients: {name} is a share of the peak and at most 1, not {share}")
        for name in ("step_overhead_s", "request_overhead_s"):
            seconds = getattr(self, name)
            if not 0 <= seconds < float("inf"):
                raise ConfigError(f"coefficients: {name} must be 0 or more and finite, not {seconds}")


def _assumed(flops: float, bandwidth: float, attention: float) -> Coefficients:
    """The overheads are the host's, so they do not depend on the device."""
    return Coefficients(
        flops_efficiency=flops,
        bandwidth_efficiency=bandwidth,
        attention_efficiency=attention,
        step_overhead_s=2e-3,
        request_overhead_s=2e-5,
    )


DEFAULT_COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType(
    {
        "A100-80GB": _assumed(0.60, 0.80, 0.45),
        "MI200": _assumed(0.48, 0.65, 0.25),
        "H100": _assumed(0.55, 0.80, 0.45),
        "H200": _assumed(0.55, 0.80, 0.45),
    }
)
"""ASSUMPTIONS, not measurements: a well-kept 16-bit runtime on each device. `fit` replaces them by measured ones.

* Linear layers on A100: 0.60 of the peak in a step, between the 0.39 that the BatchLLM paper's best run comes to as a
  whole (18 requests/s of Llama-3.1-8B, 2000-token prefixes shared by 16, 200 tokens each, 100 generated; attention,
  gaps and the run's ends included) and the 0.7 to 0.8 that large matrix products alone reach. H100 and H200 are
  limited by power and reach a smaller share. MI200: the A100's times 0.80, since the paper's industry run is 0.489 as
  fast there as on A100, with 0.614 of the peak.
* Reads of weights and KV: 0.80 of the peak, usual for large contiguous reads; less on MI200, whose kernels are younger.
* Attention: paged kernels reach less than matrix products of weights, most of all on MI200.
* Overheads: 2 ms a step and 20 us a row, for a scheduler in Python that runs ahead of the device. Older runtimes take
  several times that.
"""

_UNKNOWN_DEVICE = _assumed(0.50, 0.75, 0.35)


def default_coefficients(device: DeviceSpec) -> Coefficients:
    """Assumed coefficients of a device, by its name; moderate ones if the name is not known."""
    return DEFAULT_COEFFICIENTS.get(device.name, _UNKNOWN_DEVICE)


class RooflineSeconds(NamedTuple):
    """Seconds that each resource needs for each part of a step at its peak."""

    linear_flops: float
    linear_bytes: float
    lm_head_flops: float
    lm_head_bytes: float
    attention_flops: float
    attention_bytes: float


def roofline_seconds(device: DeviceSpec, model: ModelShape, work: StepWork) -> RooflineSeconds:
    """What one step needs at the device's peaks: weights are read once, the output layer only if a row is sampled."""
    flops, bandwidth = device.total_flops, device.total_bandwidth
    return RooflineSeconds(
        linear_flops=work.num_tokens * model.linear_flops_per_token / flops,
        linear_bytes=model.linear_weight_bytes / bandwidth if work.num_tokens else 0.0,
        lm_head_flops=work.num_sampled * model.lm_head_flops_per_row / flops,
        lm_head_bytes=model.lm_head_weight_bytes / bandwidth if work.num_sampled else 0.0,
        attention_flops=work.num_pairs * model.attention_flops_per_pair / flops,
        attention_bytes=work.kv_read_tokens * model.kv_bytes_per_token / bandwidth,
    )


class StepSeconds(NamedTuple):
    """Where the time of a step goes, in seconds; their sum is the step."""

    linear: float
    lm_head: float
    attention: float
    overhead: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The clock: seconds of a step of one model on one device.

    Attributes:
        device: What runs it.
        model: What is run.
        coefficients: What of the device's peaks is reached.
    """

    device: DeviceSpec
    model: ModelShape
    coefficients: Coefficients

    @classmethod
    def with_defaults(cls, device: DeviceSpec, model: ModelShape) -> CostModel:
        """A cost model with `default_coefficients`, which are assumptions."""
        return cls(device=device, model=model, coefficients=default_coefficients(device))

    def breakdown(self, work: StepWork) -> StepSeconds:
        """Seconds of the parts of one step; nothing takes time in a step without tokens."""
        if work.num_tokens == 0:
            return StepSeconds(0.0, 0.0, 0.0, 0.0)
        c, peak = self.coefficients, roofline_seconds(self.device, self.model, work)
        return StepSeconds(
            linear=max(peak.linear_flops / c.flops_efficiency, peak.linear_bytes / c.bandwidth_efficiency),
            lm_head=max(peak.lm_head_flops / c.flops_efficiency, peak.lm_head_bytes / c.bandwidth_efficiency),
            attention=max(peak.attention_flops / c.attention_efficiency, peak.attention_bytes / c.bandwidth_efficiency),
            overhead=c.step_overhead_s + c.request_overhead_s * work.num_sampled,
        )

    def step_s(self, work: StepWork) -> float:
        """Seconds of one step."""
        return sum(self.breakdown(work))

    def lower_bound_s(self, totals: StepWork, *, num_steps: int = 1) -> float:
        """Seconds that no schedule and no runtime on this device can beat for this work, coefficients aside.

        Every FLOP at the peak and, beside it, every byte at the peak. With ``totals`` as small as any schedule can
        make them (distinct prompt tokens, shared KV read once a step), a measured time over this is the distance to
        the limit.

        Args:
            totals: The work of the whole run.
            num_steps: Steps that must sample, such as the tokens of the longest output; each reads all weights.

        Raises:
            ConfigError: ``num_steps`` is below 1 or, if anything is sampled, above ``totals.num_sampled``.
        """
        if num_steps < 1 or (num_steps > 1 and num_steps > totals.num_sampled):
            raise ConfigError(f"num_steps {num_steps} must be between 1 and the rows sampled ({totals.num_sampled})")
        peak = roofline_seconds(self.device, self.model, totals)
        flops_s = peak.linear_flops + peak.lm_head_flops + peak.attention_flops
        return max(flops_s, num_steps * (peak.linear_bytes + peak.lm_head_bytes) + peak.attention_bytes)

    def kv_capacity_tokens(self, memory_fraction: float = 0.9, activation_bytes: float = 2 * _GIB) -> int:
        """Tokens whose KV fits beside the weights.

        Args:
            memory_fraction: Share of the memory that may be used, above 0 and at most 1.
            activation_bytes: Kept for activations and buffers; an assumption, enough for steps of about 8,000 tokens.

        Raises:
            ConfigError: The fraction or the bytes are out of range, or the model leaves no room for a single token.
        """
        if not 0 < memory_fraction <= 1:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, not {memory_fraction}")
        if not 0 <= activation_bytes < float("inf"):
            raise ConfigError(f"activation_bytes must be 0 or more and finite, not {activation_bytes}")
        usable = self.device.total_memory_bytes * memory_fraction
        num_tokens = int((usable - self.model.weight_bytes - activation_bytes) // self.model.kv_bytes_per_token)
        if num_tokens < 1:
            raise ConfigError(
                f"model {self.model.name!r} does not fit device {self.device.name!r} x {self.device.num_devices}: "
                f"{memory_fraction:.0%} of its memory is {usable / _GIB:.1f} GiB; weights take "
                f"{self.model.weight_bytes / _GIB:.1f} GiB, activations {activation_bytes / _GIB:.1f} GiB. "
                f"Use more devices, a larger one, or fewer bytes per weight"
            )
        return num_tokens
