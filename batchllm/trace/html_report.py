"""A step trace as one page to look at: a table, and timelines of KV, tokens, requests, prefixes and times.

Knows which fields are drawn, and how. The page loads nothing: styles, script and data are inside it. Its size does not
grow with the run (`timeline`).

INVARIANT: text that came from outside goes into the page through the template, which escapes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from batchllm.trace.step_trace import StepTrace
from batchllm.trace.steps import Float64Array
from batchllm.trace.svg_path import (
    BOX_HEIGHT,
    BOX_WIDTH,
    Axis,
    Tick,
    count_ticks,
    decade_ticks,
    linear_axis,
    log_axis,
    step_band,
    step_line,
    time_ticks,
)
from batchllm.trace.timeline import Timeline, downsample
from batchllm.trace.whole_file import write_whole

_TEMPLATE = "report.html.jinja"
_LEAST_SPAN_S = 1e-6


@dataclass(frozen=True, slots=True)
class _Series:
    """A field that is drawn, its name on the page, and one of the colours of the template."""

    field: str
    name: str
    color: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """Series over time in one box.

    Attributes:
        title: What is shown, with its unit.
        note: How to read it.
        series: From the bottom up if they are stacked.
        total: Field whose peak is drawn over a stack; None: not stacked, each series has a peak.
        is_time: Seconds on a logarithmic axis, else counts from 0.
    """

    title: str
    note: str
    series: tuple[_Series, ...]
    total: _Series | None = None
    is_time: bool = False


_KV_CHART = _Chart(
    title="KV pool, tokens",
    note="Pinned: planned prefixes, computed once and read by many. Private: what one request alone reads.",
    series=(
        _Series("kv_pinned_tokens", "pinned", "blue"),
        _Series("kv_private_tokens", "private", "aqua"),
        _Series("kv_free_tokens", "free", "neutral"),
    ),
    total=_Series("kv_used_tokens", "pinned and private", "ink"),
)
_CHARTS = (
    _KV_CHART,
    _Chart(
        title="Tokens per step",
        note="Prompt tokens computed, and one token for each row that decoded.",
        series=(
            _Series("num_decode_tokens", "decode", "violet"),
            _Series("num_prefill_tokens", "prefill", "orange"),
        ),
        total=_Series("num_step_tokens", "prefill and decode", "ink"),
    ),
    _Chart(
        title="Requests",
        note="Waiting: in the scheduler's window, which is a part of the job.",
        series=(_Series("num_running", "running", "aqua"), _Series("num_waiting", "waiting", "yellow")),
    ),
    _Chart(
        title="Open prefixes",
        note="Planned prefixes that are being computed or are resident.",
        series=(_Series("num_open_prefixes", "open", "blue"),),
    ),
    _Chart(
        title="Time per step, logarithmic",
        note="Host: the scheduler's own time in the step, outside the forward pass.",
        series=(_Series("duration_s", "step", "slate"), _Series("host_s", "host", "magenta")),
        is_time=True,
    ),
)


def render_html(trace: StepTrace) -> str:
    """The page, complete and self-contained.

    Up to 1,500 steps are drawn as they are; more are drawn as that many stretches of equal time,
    with the mean and the greatest value of each.
    """
    timeline = downsample(trace.steps)
    time_axis = _time_axis(timeline)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files("batchllm.trace").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        label=trace.label,
        table=trace.table(),
        charts=[_drawn(chart, trace, timeline, time_axis) for chart in _CHARTS],
        time_ticks=_placed(time_ticks(time_axis)),
        box=(BOX_WIDTH, BOX_HEIGHT),
        num_steps=trace.num_steps,
        num_buckets=timeline.num_buckets,
        is_exact=timeline.is_exact,
        data=_hover_data(timeline, time_axis),
    )


def write_html(trace: StepTrace, path: str | os.PathLike[str]) -> None:
    """Writes `render_html`; the file appears complete or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    write_whole(path, [render_html(trace).encode()])


def _time_axis(timeline: Timeline) -> Axis:
    begin, end = float(timeline.edges_s[0]), float(timeline.edges_s[-1])
    return Axis(begin, max(end, begin + _LEAST_SPAN_S))


def _drawn(chart: _Chart, trace: StepTrace, timeline: Timeline, time_axis: Axis) -> dict[str, Any]:
    """What the template needs of a chart: paths, ticks, legend, limit."""
    axis = _value_axis(chart, trace, timeline)
    edges = time_axis.x(timeline.edges_s)
    paths = []
    base = np.zeros(timeline.num_buckets)
    for series in chart.series:
        mean = timeline.mean[series.field]
        if chart.total is None:
            path = step_line(edges, axis.y(mean))
        else:
            path = step_band(edges, axis.y(base), axis.y(base + mean))
            base = base + mean
        paths.append({"series": series, "d": path, "shape": "line" if chart.total is None else "area"})
    peaks = []
    if not timeline.is_exact:
        for series in (chart.total,) if chart.total else chart.series:
            peaks.append({"series": series, "d": step_line(edges, axis.y(timeline.peak[series.field]))})
    is_kv = chart is _KV_CHART
    return {
        "title": chart.title,
        "note": chart.note,
        "paths": paths,
        "peaks": peaks,
        "total": chart.total,
        "ticks": _placed(decade_ticks(axis) if chart.is_time else count_ticks(axis)),
        "limit": trace.kv_limit_tokens if is_kv else None,
        "limit_y": int(axis.y(np.array([float(trace.kv_limit_tokens)]))[0]) if is_kv else None,
    }


def _value_axis(chart: _Chart, trace: StepTrace, timeline: Timeline) -> Axis:
    fields = [series.field for series in chart.series]
    if chart.is_time:
        return log_axis([values[field] for field in fields for values in (timeline.mean, timeline.peak)])
    tops = [timeline.peak[field] for field in fields]
    if chart.total is not None:
        stack: Float64Array = np.sum([timeline.mean[field] for field in fields], axis=0)
        tops += [stack, timeline.peak[chart.total.field]]
    high = max(float(top.max(initial=0.0)) for top in tops)
    if chart is _KV_CHART:
        high = max(high, trace.kv_capacity_tokens, trace.kv_limit_tokens)
    return linear_axis(high)


def _placed(ticks: list[Tick]) -> list[dict[str, Any]]:
    """Ticks as the template takes them: percent of the axis, and the text."""
    return [{"percent": round(100 * tick.part, 3), "text": tick.text} for tick in ticks]


def _hover_data(timeline: Timeline, time_axis: Axis) -> dict[str, Any]:
    """What the script reads out: for each chart and series the mean and the peak of each bucket."""
    charts = [
        {
            "title": chart.title,
            "is_time": chart.is_time,
            "series": [
                {
                    "name": series.name,
                    "color": series.color,
                    "mean": _short(timeline.mean[series.field]),
                    # Where a bucket is a step, the mean is the value.
                    "peak": [] if timeline.is_exact else _short(timeline.peak[series.field]),
                }
                for series in chart.series
            ],
        }
        for chart in _CHARTS
    ]
    return {
        "span_s": [time_axis.low, time_axis.high],
        "edges_s": _short(timeline.edges_s, digits=10),
        "num_steps": timeline.num_steps.tolist(),
        "charts": charts,
    }


def _short(values: Float64Array, digits: int = 7) -> list[float | int]:
    """Numbers with no more digits than are shown, whole ones without a fraction."""
    rounded = (float(f"{value:.{digits}g}") for value in values.tolist())
    return [int(value) if value.is_integer() else value for value in rounded]
