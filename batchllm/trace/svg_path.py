"""From numbers to coordinates: axes, their ticks, and the paths of step functions.

Knows no fields and no page. Coordinates are whole numbers in a box of `BOX_WIDTH` by `BOX_HEIGHT`, y downwards.

INVARIANT: what an axis maps lies in the box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from batchllm.trace.steps import Float64Array, Int64Array

BOX_WIDTH = 6000
BOX_HEIGHT = 2000

_COUNT_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIME_UNITS = ((7200.0, 3600.0, "h"), (600.0, 60.0, "min"), (1.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (0.0, 1e-6, "µs"))
"""From how many seconds on a unit is used, its seconds, its name."""
_MAX_DECADES = 6
_LEAST_POWER = -6  # no logarithmic axis ends below 1 µs


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: where, as a part of its length from the low end, and what it says."""

    part: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, at equal distances or (``is_log``) at equal ratios; `low` < `high`."""

    low: float
    high: float
    is_log: bool = False

    def parts(self, values: Float64Array) -> Float64Array:
        """Where values lie, 0 at the low end to 1; what is outside goes to the nearer end."""
        low, high, inside = self.low, self.high, np.clip(values, self.low, self.high)
        if self.is_log:
            low, high, inside = math.log10(low), math.log10(high), np.log10(inside)
        return np.clip((inside - low) / (high - low), 0.0, 1.0)

    def x(self, values: Float64Array) -> Int64Array:
        """Horizontal coordinates, low end on the left."""
        return np.rint(self.parts(values) * BOX_WIDTH).astype(np.int64)

    def y(self, values: Float64Array) -> Int64Array:
        """Vertical coordinates, low end at the bottom."""
        return np.rint((1.0 - self.parts(values)) * BOX_HEIGHT).astype(np.int64)


def linear_axis(high: float) -> Axis:
    """From 0 to a little above the greatest count, and at least to 1."""
    return Axis(0.0, max(high * 1.04, 1.0))


def log_axis(values: list[Float64Array]) -> Axis:
    """Whole decades around all values above 0, at most six; from 1 ms to 10 ms if there are none."""
    positive = [part[part > 0] for part in values if (part > 0).any()]
    if not positive:
        return Axis(1e-3, 1e-2, is_log=True)
    high = math.ceil(math.log10(max(float(part.max()) for part in positive)))
    low = math.floor(math.log10(min(float(part.min()) for part in positive)))
    high = max(high, _LEAST_POWER)
    low = min(max(low, high - _MAX_DECADES), high - 1)
    return Axis(10.0**low, 10.0**high, is_log=True)


def count_ticks(axis: Axis, at_most: int = 6) -> list[Tick]:
    """Round whole numbers with k, M, G or T, from an axis that begins at 0."""
    divisor, unit = next(((size, unit) for size, unit in _COUNT_UNITS if axis.high >= 2 * size), (1.0, ""))
    step = _round_step((axis.high - axis.low) / divisor / at_most)
    step = max(step, 1.0 / divisor)
    ticks = _ticks(axis, divisor, step, unit)
    return [Tick(tick.part, tick.text if tick.part else "0") for tick in ticks]


def time_ticks(axis: Axis, at_most: int = 10) -> list[Tick]:
    """Round times of a span, all in one unit."""
    span_s = axis.high - axis.low
    divisor, unit = next((size, unit) for least, size, unit in _TIME_UNITS if span_s >= least)
    return _ticks(axis, divisor, _round_step(span_s / divisor / at_most), f" {unit}")


def decade_ticks(axis: Axis) -> list[Tick]:
    """A tick for each decade of a logarithmic axis of seconds."""
    low, high = round(math.log10(axis.low)), round(math.log10(axis.high))
    return [Tick((power - low) / (high - low), duration_text(10.0**power)) for power in range(low, high + 1)]


def duration_text(seconds: float) -> str:
    """A short time with its unit, s, ms, µs or ns, at most four digits."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size * (1 - 1e-9):
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def step_line(edges: Int64Array, y: Int64Array) -> str:
    """Path of a step function.

    Args:
        edges: Where its values begin and the last ends, ``[num_values + 1]``.
        y: Its values, ``[num_values]``; none give an empty path.
    """
    if not len(y):
        return ""
    xs, ys = edges.tolist(), y.tolist()
    parts = [f"M{xs[0]} {ys[0]}"]
    for at in range(1, len(ys)):
        if ys[at] != ys[at - 1]:
            parts.append(f"H{xs[at]}V{ys[at]}")
    parts.append(f"H{xs[-1]}")
    return "".join(parts)


def step_band(edges: Int64Array, low: Int64Array, high: Int64Array) -> str:
    """Closed path between two step functions over the same edges, arguments as `step_line`'s."""
    if not len(high):
        return ""
    # Back from right to left: the lower line of the mirrored function.
    back = step_line(edges[::-1], low[::-1])
    return f"{step_line(edges, high)}L{back[1:]}Z"


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50, ... and their tenths that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _ticks(axis: Axis, divisor: float, step: float, unit: str) -> list[Tick]:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(axis.low / divisor / step - 1e-9), math.floor(axis.high / divisor / step + 1e-9)
    ticks = []
    for number in range(first, last + 1):
        part = (number * step * divisor - axis.low) / (axis.high - axis.low)
        # Late and short: times a few roundings apart.
        ticks.append(Tick(min(max(part, 0.0), 1.0), f"{number * step:,.{decimals}f}{unit}"))
    return ticks
