"""The page: complete, self-contained, escaped, small, and its areas are where the numbers say."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm.trace import StepTrace, render_html, write_html
from batchllm.trace.svg_path import BOX_HEIGHT, BOX_WIDTH
from batchllm.trace.timeline import downsample
from tests.sizes import sized

_SERIES = [
    ["kv_pinned_tokens", "kv_private_tokens", "kv_free_tokens"],
    ["num_decode_tokens", "num_prefill_tokens"],
    ["num_running", "num_waiting"],
    ["num_open_prefixes"],
    ["duration_s", "host_s"],
]
_VOID = {"meta", "line", "path"}


class _Page(HTMLParser):
    """Elements in their order; fails on an element closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def _paths(page: str) -> dict[str, str]:
    """Path of each series by field."""
    paths = (path for svg in _svgs(page) for path in svg.iterfind("path[@data-series]"))
    return {path.attrib["data-series"]: path.attrib["d"] for path in paths}


def _peaks(page: str) -> list[list[str]]:
    """Fields whose peaks are drawn, chart by chart."""
    return [[path.attrib["data-peak"] for path in svg.iterfind("path[@class='peak']")] for svg in _svgs(page)]


def _area(path: str) -> float:
    """Area inside a closed path, by the shoelace formula."""
    points, x, y = [], 0.0, 0.0
    for command, numbers in re.findall(r"([MLHVZ])([\d ]*)", path):
        values = [float(number) for number in numbers.split()]
        if command in "ML":
            x, y = values
        elif command == "H":
            x = values[0]
        elif command == "V":
            y = values[0]
        points.append((x, y))
    (xs, ys) = np.array(points).T
    return float(abs(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1)) / 2)


def test_the_page_is_well_formed_with_one_path_for_each_series(small: StepTrace, long: StepTrace) -> None:
    for trace in (small, long):
        page = render_html(trace)
        assert _Page(page).elements[0][0] == "html"
        drawn = [[path.get("data-series") for path in svg.iterfind("path[@data-series]")] for svg in _svgs(page)]
        assert drawn == _SERIES


def test_the_page_needs_no_network(long: StepTrace) -> None:
    page = render_html(long)
    assert "//" not in re.sub(r"^\s*// .*$", "", page, flags=re.MULTILINE)
    assert not re.search(r"\burl\(|@import|\bfetch\(|XMLHttpRequest", page)
    for _, attributes in _Page(page).elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    assert "default-src 'none'" in page


def test_a_label_is_shown_and_never_run(small: StepTrace) -> None:
    label = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} & é"
    page = render_html(replace(small, label=label))
    parsed = _Page(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 2  # the data, and the page's own
    assert "img" not in {tag for tag, _ in parsed.elements}
    assert parsed.text.count(label) == 1
    assert f"{label} - batchllm step trace" in parsed.text


def test_the_summary_is_on_the_page(small: StepTrace) -> None:
    text = _Page(render_html(small)).text
    for row in small.table():
        assert all(cell in text for cell in row if cell)


def test_a_run_of_any_length_gives_a_page_of_bounded_size(long: StepTrace) -> None:
    repeated = np.tile(long.steps, 10)
    for part in range(10):
        repeated["start_s"][part * 20_000 : (part + 1) * 20_000] += part * long.elapsed_s
    assert len(render_html(replace(long, steps=repeated))) < 1_000_000


def test_a_trace_without_steps_and_one_with_one_step_are_drawn(small: StepTrace) -> None:
    for num_steps in (0, 1):
        page = render_html(replace(small, steps=small.steps[:num_steps]))
        _Page(page)
        assert len(_svgs(page)) == 5
        assert ("no steps" in page) == (num_steps == 0)
        assert all(bool(path) == bool(num_steps) for path in _paths(page).values())


@settings(deadline=None, max_examples=sized(25, 30), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_trace_is_drawn_inside_its_boxes(data: st.DataObject, any_trace: st.SearchStrategy[StepTrace]) -> None:
    page = render_html(data.draw(any_trace))
    _Page(page)
    assert "nan" not in page.split("<script")[1] and "Infinity" not in page.split("<script")[1]
    for path in _paths(page).values():
        for command, numbers in re.findall(r"([MLHV])([\d ]+)", path):
            *xs, last = (int(number) for number in numbers.split())
            assert 0 <= last <= (BOX_WIDTH if command == "H" else BOX_HEIGHT)
            assert all(0 <= x <= BOX_WIDTH for x in xs)


def test_the_areas_of_the_kv_are_its_means_and_fill_the_capacity(long: StepTrace) -> None:
    """The box is 4 % higher than the capacity; a coordinate is rounded by at most half a unit of 2,000."""
    paths = _paths(render_html(long))
    areas = {name: _area(paths[name]) / (BOX_WIDTH * BOX_HEIGHT) * 1.04 for name in _SERIES[0]}
    assert sum(areas.values()) == pytest.approx(1.0, abs=1e-3)
    seconds = long.steps["duration_s"]
    for name, area in areas.items():
        mean = np.average(long.steps[name], weights=seconds) / long.kv_capacity_tokens
        assert area == pytest.approx(mean, abs=1e-3)


def test_the_limit_is_a_line_at_its_height(small: StepTrace) -> None:
    kv, *others = _svgs(render_html(small))
    (limit,) = kv.iterfind("line[@class='limit']")
    assert limit.attrib["y1"] == limit.attrib["y2"] == str(round(BOX_HEIGHT * (1 - 80 / 104)))
    assert not [line for svg in others for line in svg.iterfind("line[@class='limit']")]


def test_peaks_are_drawn_only_where_a_stretch_has_several_steps(small: StepTrace, long: StepTrace) -> None:
    assert _peaks(render_html(small)) == [[]] * 5
    assert _peaks(render_html(long)) == [["kv_used_tokens"], ["num_step_tokens"], *_SERIES[2:]]


def test_the_read_out_has_the_mean_and_the_peak_of_every_stretch(small: StepTrace, long: StepTrace) -> None:
    for trace in (small, long):
        timeline = downsample(trace.steps)
        (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', render_html(trace))
        data = json.loads(text)
        np.testing.assert_allclose(data["edges_s"], timeline.edges_s, rtol=1e-9)
        assert data["num_steps"] == timeline.num_steps.tolist()
        for chart, fields in zip(data["charts"], _SERIES, strict=True):
            for series, field in zip(chart["series"], fields, strict=True):
                np.testing.assert_allclose(series["mean"], timeline.mean[field], rtol=1e-6)
                # Where each step is a bucket, the mean is all there is.
                np.testing.assert_allclose(series["peak"], [] if timeline.is_exact else timeline.peak[field], rtol=1e-6)


def test_a_page_replaces_an_older_file(small: StepTrace, tmp_path: Path) -> None:
    (tmp_path / "trace.html").write_text("old")
    write_html(small, tmp_path / "trace.html")
    assert (tmp_path / "trace.html").read_text(encoding="utf-8") == render_html(small)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]
