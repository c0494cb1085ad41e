"""Coefficients from measured steps.

Knows: counts of steps, and the seconds they took. Must not know: how either was obtained.
Invariant: a fitted coefficient is physical (no efficiency above 1, no negative overhead), and one that the samples do
not tell is named in `Fit.assumed` and keeps its default.

Seconds are linear in (step overhead, row overhead, 1 / each efficiency) once it is known which side of each roofline
a step is on. So: assume the sides that the present coefficients imply, solve bounded least squares, repeat; from many
starts, as a step may lie on the wrong side at first. Errors count relative to the measured seconds: a step of 5 ms
matters like one of 500, and a hiccup that made one step ten times longer weighs at most like an error of 100 %.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from batchllm.errors import ConfigError
from batchllm.perf_model.cost_model import Coefficients, CostModel, default_coefficients, roofline_seconds
from batchllm.perf_model.device import DeviceSpec
from batchllm.perf_model.model import ModelShape
from batchllm.perf_model.step import StepWork
from batchllm.trace.steps import StepArray

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_COUNTS = tuple(field.name for field in fields(StepWork))
_WARM_UP_SHARE = 50

MIN_SAMPLES = 10
MIN_DISTINCT_WORKS = 6
_WHAT_IS_NEEDED = (
    f"Time at least {MIN_SAMPLES} steps of at least {MIN_DISTINCT_WORKS} kinds: prefill of few and of thousands of "
    f"tokens, short and long contexts, and decode of few and of many rows"
)

_FORMAT = "batchllm-cost-model"
_VERSION = 1

_Name = Literal[
    "step_overhead_s", "request_overhead_s", "flops_efficiency", "bandwidth_efficiency", "attention_efficiency"
]
# The order of the unknowns. The last three are solved for as 1 / efficiency.
_NAMES: tuple[_Name, ...] = get_args(_Name)
_MAIN_NAMES = ("flops_efficiency", "bandwidth_efficiency")
_MIN_DETERMINED = 2
_LEAST = np.array([0.0, 0.0, 1.0, 1.0, 1.0])
_EFFICIENCIES_TO_START_FROM = (0.2, 0.5, 0.9)
_MAX_ROUNDS = 50

# Relative error that any timing has. Keeps exact samples from claiming what they cannot tell.
_LEAST_NOISE = 1e-3

# The samples determine a coefficient if wrong values of it fit worse by so many standard deviations.
_NUM_DEVIATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A cost model fitted to measured steps, and how well it fits them.

    Attributes:
        cost_model: The model, with the fitted coefficients.
        median_relative_error: Median over the samples of |predicted - measured| / measured.
        p90_relative_error: 90th percentile of the same.
        num_samples: Steps fitted to.
        assumed: Coefficients that the samples do not tell; they have their default values.
    """

    cost_model: CostModel
    median_relative_error: float
    p90_relative_error: float
    num_samples: int
    assumed: tuple[_Name, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, ready for JSON."""
        fields = msgspec.to_builtins(self)
        return {"format": _FORMAT, "version": _VERSION, **fields.pop("cost_model"), **fields}

    @classmethod
    def from_dict(cls, document: Any) -> Fit:
        """What `to_dict` made.

        Raises:
            ConfigError: It is not such a dict; names the field at fault.
        """
        if not isinstance(document, Mapping) or document.get("format") != _FORMAT:
            raise ConfigError(f'this is not a calibrated cost model: no "format": "{_FORMAT}"')
        if document.get("version") != _VERSION:
            raise ConfigError(f"version {document.get('version')!r} is not {_VERSION}; fit again")
        try:
            found = msgspec.convert({**document, "cost_model": document}, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(str(error).replace("$.cost_model", "$")) from error
        known = found.to_dict()
        for part in ("device", "model", "coefficients"):
            for name in document[part].keys() - known[part].keys():
                raise ConfigError(f"unknown field {name!r} of {part}; known: {', '.join(known[part])}")
        return found

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file.

        Raises:
            ConfigError: The file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: the calibration cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Fit:
        """Read what `save` wrote.

        Raises:
            ConfigError: The file cannot be read, is not JSON, or is not a calibration.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path}: the calibration cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: the calibration is not JSON: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def samples_of(steps: StepArray) -> list[tuple[StepWork, float]]:
    """The work of each step of a run, and its seconds; without the first ones, in which a process warms up.

    Args:
        steps: Steps of a `batchllm.trace.StepTrace`.
    """
    samples = []
    for step in steps[len(steps) // _WARM_UP_SHARE :]:
        work = StepWork(**{name: int(step[name]) for name in _COUNTS})
        if work.num_tokens:
            samples.append((work, float(step["duration_s"])))
    return samples


def fit(device: DeviceSpec, model: ModelShape, samples: Sequence[tuple[StepWork, float]]) -> Fit:
    """Fit a cost model to measured steps.

    Args:
        device: What ran them; its defaults stand in for what the samples do not tell.
        model: What was run.
        samples: The work of each step and its seconds. Leave out the first steps of a process, which compile.

    Raises:
        ConfigError: Too few samples, too few kinds of step, a step without tokens or without time, or samples that
            differ too little: they tell fewer than two coefficients, or neither the efficiency of FLOP nor of reads.
    """
    _check_samples(samples)
    problem = _Problem.of(device, model, samples)
    default = _unknowns(default_coefficients(device))
    is_free = np.ones(len(_NAMES), np.bool_)
    found = min((problem.solve(start, is_free) for start in _starts(default)), key=problem.loss)
    while (least_determined := problem.least_determined(found, default, is_free)) is not None:
        is_free[least_determined] = False
        found[least_determined] = default[least_determined]
        found = problem.solve(found, is_free)
    assumed = tuple(name for name, free in zip(_NAMES, is_free, strict=True) if not free)
    determined = set(_NAMES) - set(assumed)
    if len(determined) < _MIN_DETERMINED or determined.isdisjoint(_MAIN_NAMES):
        names = " and ".join(sorted(determined)) or "nothing"
        raise ConfigError(f"the {len(samples)} steps differ too little: they tell only {names}. {_WHAT_IS_NEEDED}")
    errors = np.abs(problem.relative_seconds(found) - 1)
    return Fit(
        cost_model=CostModel(device=device, model=model, coefficients=_coefficients(found)),
        median_relative_error=float(np.median(errors)),
        p90_relative_error=float(np.quantile(errors, 0.9)),
        num_samples=len(samples),
        assumed=assumed,
    )


def _check_samples(samples: Sequence[tuple[StepWork, float]]) -> None:
    for i, (work, seconds) in enumerate(samples):
        if not (work.num_tokens > 0 and 0 < seconds < float("inf")):
            raise ConfigError(f"sample {i}: {work} in {seconds} s; a step has tokens and takes a positive, finite time")
    if len(samples) < MIN_SAMPLES:
        raise ConfigError(f"{len(samples)} steps are too few to fit {len(_NAMES)} coefficients. {_WHAT_IS_NEEDED}")
    num_kinds = len({work for work, _ in samples})
    if num_kinds < MIN_DISTINCT_WORKS:
        raise ConfigError(f"the {len(samples)} steps are of {num_kinds} kinds only. {_WHAT_IS_NEEDED}")


def _unknowns(coefficients: Coefficients) -> Float64Array:
    values = np.array([getattr(coefficients, name) for name in _NAMES])
    values[2:] = 1 / values[2:]
    return values


def _coefficients(unknowns: Float64Array) -> Coefficients:
    values = unknowns.copy()
    values[2:] = 1 / values[2:]
    return Coefficients(**dict(zip(_NAMES, values.tolist(), strict=True)))


def _starts(default: Float64Array) -> Iterator[Float64Array]:
    """The defaults, and efficiencies in all proportions: they decide which side of a roofline a step is on."""
    yield default.copy()
    for efficiencies in product(_EFFICIENCIES_TO_START_FROM, repeat=3):
        yield np.array([0.0, 0.0, *(1 / e for e in efficiencies)])


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The samples as arrays, divided by the measured seconds, so that all seconds to be reached are 1.

    Attributes:
        overheads: float64[num_samples, 2], what a second of each overhead adds.
        peaks: float64[num_samples, 6], `RooflineSeconds` of each step.
    """

    overheads: Float64Array
    peaks: Float64Array

    @classmethod
    def of(cls, device: DeviceSpec, model: ModelShape, samples: Sequence[tuple[StepWork, float]]) -> _Problem:
        seconds = np.array([s for _, s in samples])[:, None]
        overheads = np.array([[1.0, work.num_sampled] for work, _ in samples])
        peaks = np.array([roofline_seconds(device, model, work) for work, _ in samples])
        return cls(overheads / seconds, peaks / seconds)

    def design(self, unknowns: Float64Array) -> Float64Array:
        """What one of each unknown adds to each step, on the sides of the rooflines where these unknowns put it.

        Seconds are ``design(unknowns) @ unknowns``.
        """
        _, _, per_flops, per_bytes, per_attention = unknowns
        linear, linear_bytes, head, head_bytes, attention, attention_bytes = self.peaks.T
        by_flops, head_by_flops = (
            linear * per_flops >= linear_bytes * per_bytes,
            head * per_flops >= head_bytes * per_bytes,
        )
        attention_by_flops = attention * per_attention >= attention_bytes * per_bytes
        read = linear_bytes * ~by_flops + head_bytes * ~head_by_flops + attention_bytes * ~attention_by_flops
        computed = linear * by_flops + head * head_by_flops
        return np.column_stack([self.overheads, computed, read, attention * attention_by_flops])

    def relative_seconds(self, unknowns: Float64Array) -> Float64Array:
        """Predicted over measured seconds of each step."""
        return np.asarray(self.design(unknowns) @ unknowns)

    def loss(self, unknowns: Float64Array) -> float:
        """Sum of squared relative errors."""
        return float(((self.relative_seconds(unknowns) - 1) ** 2).sum())

    def solve(self, start: Float64Array, is_free: BoolArray) -> Float64Array:
        """The least loss found from a start; unknowns that are not free stay. Every round lowers the loss."""
        best, best_loss = start, self.loss(start)
        for _ in range(_MAX_ROUNDS):
            aim = _bounded_least_squares(self.design(best), best, is_free)
            # The aim holds for the present sides; if it changes too many of them, go only part of the way.
            for share in (1.0, 0.5, 0.25, 0.05):
                trial = best + share * (aim - best)
                trial_loss = self.loss(trial)
                if trial_loss < best_loss * (1 - 1e-9):
                    break
            else:
                return best
            best, best_loss = trial, trial_loss
        return best

    def least_determined(self, unknowns: Float64Array, default: Float64Array, is_free: BoolArray) -> int | None:
        """The free unknown that the samples say least about, if it is too little; None if all are determined.

        One whose default the samples contradict counts as determined, although they may only
        say on which side of it the truth is.
        """
        loss = self.loss(unknowns)
        noise = max(float(np.sqrt(loss / len(self.peaks))), _LEAST_NOISE)
        doubtful = []
        for j in np.flatnonzero(is_free).tolist():
            penalty = min(self._loss_at(j, rival, unknowns, is_free) - loss for rival in _rivals(j, unknowns, default))
            if penalty < _NUM_DEVIATIONS**2 * noise**2:
                doubtful.append((penalty, j))
        for _, j in sorted(doubtful):
            if self._loss_at(j, default[j], unknowns, is_free) < loss + _NUM_DEVIATIONS**2 * noise**2:
                return int(j)
        return None

    def _loss_at(self, j: int, value: float, unknowns: Float64Array, is_free: BoolArray) -> float:
        """Least loss with unknown ``j`` at this value and the other free ones as suits it best."""
        moved, rest = unknowns.copy(), is_free.copy()
        moved[j], rest[j] = value, False
        return self.loss(self.solve(moved, rest))


def _rivals(j: int, unknowns: Float64Array, default: Float64Array) -> Iterator[float]:
    """Values of an unknown that must fit worse if it is determined: twice and half of an efficiency, where physical.

    An overhead may be nothing, so it moves by its default if that is more.
    """
    value = float(unknowns[j])
    if _LEAST[j] > 0:
        yield 2 * value
        if value / 2 >= _LEAST[j]:
            yield value / 2
    else:
        step = max(value, float(default[j]))
        yield value + step
        if value - step >= 0:
            yield value - step


def _bounded_least_squares(design: Float64Array, near: Float64Array, is_free: BoolArray) -> Float64Array:
    """Least ``|design @ x - 1|`` with ``x >= _LEAST``, and ``x == near`` where not free; of equals, one near it."""
    from scipy.optimize import lsq_linear  # half a second to import

    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    free = np.flatnonzero(is_free)
    # Without these rows, columns that say the same would leave the minimum open.
    rows = np.vstack([(design / scale)[:, free], 1e-6 * np.eye(len(free))])
    aims = np.append(1 - design @ near, np.zeros(len(free)))
    moves = lsq_linear(rows, aims, (((_LEAST - near) * scale)[free], np.inf), method="bvls").x
    found = near.copy()
    found[free] = np.maximum(near[free] + moves / scale[free], _LEAST[free])
    return found
