"""Steps as pictures: what is in the KV pool, and what steps carry, over the last minutes.

Knows steps and which of their fields are drawn; not HTML.

INVARIANT: what is drawn has at most `_MAX_BUCKETS` values a series; a time in which no step was recorded is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchllm.trace.steps import STEP_DTYPE, Float64Array, StepArray
from batchllm.trace.svg_path import Axis, Tick, count_ticks, linear_axis, step_band, time_ticks
from batchllm.trace.timeline import Timeline, downsample

SHOWN_S = 900.0
_GAP_S = 1.0
_MAX_BUCKETS = 300
_LEAST_SPAN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A series of a stack: its name, a class of the style sheet, and the path in the box of `svg_path`."""

    name: str
    color: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A stack over time. Ticks and the limit are placed in percent, from the left and from the top.

    Attributes:
        title: What is shown.
        note: How to read it.
        bands: From the bottom up.
        x_ticks: Places on the time axis, and their words.
        y_ticks: The same upwards.
        limit: Where a line is drawn over it, and its words.
        words: The picture in a sentence, for who does not see it.
    """

    title: str
    note: str
    bands: tuple[Band, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    limit: tuple[float, str] | None
    words: str


def recent_steps(steps: StepArray, now_s: float) -> StepArray:
    """The steps of the last `SHOWN_S` seconds, and empty ones for the times in which none was recorded.

    Args:
        steps: `STEP_DTYPE` ``[num_steps]``, in order of time.
        now_s: On the clock of their ``start_s``.

    Returns:
        `STEP_DTYPE`, ``start_s`` in seconds before now, so that it is not above 0.
    """
    ends = steps["start_s"] + steps["duration_s"]
    shown: StepArray = steps[ends > now_s - SHOWN_S].copy()
    if not len(shown):
        return shown
    shown["start_s"] -= now_s
    starts, ends = shown["start_s"], shown["start_s"] + shown["duration_s"]
    gaps = np.append(starts[1:], 0.0) - ends
    before = np.flatnonzero(gaps > _GAP_S)
    # Several, so that no bucket that begins with a step lasts through a gap.
    longest = max(-float(starts[0]) / (2 * _MAX_BUCKETS), _GAP_S)
    num_parts = np.ceil(gaps[before] / longest).astype(np.int64)
    places = np.repeat(before, num_parts)
    number = np.arange(len(places)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    empty = np.zeros(len(places), STEP_DTYPE)
    empty["duration_s"] = np.repeat(gaps[before] / num_parts, num_parts)
    empty["start_s"] = ends[places] + number * empty["duration_s"]
    return np.insert(shown, places + 1, empty)


def draw_charts(steps: StepArray, kv_limit_tokens: int) -> list[Chart]:
    """The KV pool and what steps carry; none where there are no steps.

    Args:
        steps: What `recent_steps` returned.
        kv_limit_tokens: Drawn as a line.
    """
    if not len(steps):
        return []
    timeline = downsample(steps, _MAX_BUCKETS)
    end = float(timeline.edges_s[-1])
    time_axis = Axis(min(float(timeline.edges_s[0]), end - _LEAST_SPAN_S), end)
    mean = timeline.mean
    return [
        _stack(
            "KV pool, tokens",
            "Pinned: planned prefixes, kept for requests to come. Private: what one request alone reads, live ones "
            "and their cache included.",
            timeline,
            time_axis,
            (
                ("pinned", "blue", mean["kv_pinned_tokens"]),
                ("private", "aqua", mean["kv_private_tokens"]),
                ("free", "neutral", mean["kv_free_tokens"]),
            ),
            limit=kv_limit_tokens,
        ),
        _stack(
            "Tokens per step",
            "Prompt tokens computed, and one token for each row that decodes; of batches, and of live requests.",
            timeline,
            time_axis,
            (
                ("planned decode", "violet", mean["num_decode_tokens"] - mean["num_live_decode_tokens"]),
                ("live decode", "magenta", mean["num_live_decode_tokens"]),
                ("planned prefill", "orange", mean["num_prefill_tokens"] - mean["num_live_prefill_tokens"]),
                ("live prefill", "yellow", mean["num_live_prefill_tokens"]),
            ),
        ),
    ]


def _stack(
    title: str,
    note: str,
    timeline: Timeline,
    time_axis: Axis,
    series: Sequence[tuple[str, str, Float64Array]],
    *,
    limit: int | None = None,
) -> Chart:
    top = np.sum([values for _, _, values in series], axis=0)
    axis = linear_axis(max(float(top.max(initial=0.0)), float(limit or 0)))
    edges = time_axis.x(timeline.edges_s)
    base = np.zeros(timeline.num_buckets)
    bands = []
    for name, color, values in series:
        bands.append(Band(name=name, color=color, path=step_band(edges, axis.y(base), axis.y(base + values))))
        base = base + values
    latest = ", ".join(f"{name} {values[-1]:,.0f}" for name, _, values in series)
    return Chart(
        title=title,
        note=note,
        bands=tuple(bands),
        x_ticks=_percent(time_ticks(time_axis, at_most=4), is_upwards=False),
        y_ticks=_percent(count_ticks(axis, at_most=4), is_upwards=True),
        limit=None if limit is None else (round(100 - 100 * limit / axis.high, 3), f"limit {limit:,}"),
        words=f"{title}; last value: {latest}.",
    )


def _percent(ticks: Sequence[Tick], *, is_upwards: bool) -> tuple[tuple[float, str], ...]:
    parts = ((1 - tick.part if is_upwards else tick.part, tick.text) for tick in ticks)
    return tuple((round(100 * part, 3), text) for part, text in parts)
