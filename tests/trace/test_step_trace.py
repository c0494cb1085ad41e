"""The trace: its file reads back exactly or says why not, and its numbers follow from the steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import ConfigError
from batchllm.trace import STEP_DTYPE, StepTrace
from tests.sizes import sized

Document = dict[str, Any]


def _document(trace: StepTrace, folder: Path) -> Document:
    path = folder / "trace.json"
    trace.write(path)
    document: Document = json.loads(path.read_text())
    return document


def _without_steps(trace: StepTrace) -> StepTrace:
    return replace(trace, steps=trace.steps[:0])


# The file


@settings(deadline=None, max_examples=sized(40, 100))
@given(data=st.data())
def test_a_trace_reads_back_exactly(
    data: st.DataObject, any_trace: st.SearchStrategy[StepTrace], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = data.draw(any_trace)
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace.write(path)
    again = StepTrace.read(path)
    assert again.steps.dtype == STEP_DTYPE
    assert again.steps.tobytes() == trace.steps.tobytes()
    assert (again.label, again.kv_capacity_tokens, again.kv_limit_tokens) == (
        trace.label,
        trace.kv_capacity_tokens,
        trace.kv_limit_tokens,
    )


def test_a_long_trace_reads_back_exactly(long: StepTrace, tmp_path: Path) -> None:
    """Longer than the pieces in which it is written."""
    long.write(tmp_path / "trace.json")
    assert StepTrace.read(tmp_path / "trace.json").steps.tobytes() == long.steps.tobytes()


def test_a_trace_replaces_an_older_file_and_leaves_nothing_else(small: StepTrace, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("old")
    small.write(tmp_path / "trace.json")
    assert StepTrace.read(tmp_path / "trace.json").num_steps == 4
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_that_cannot_be_written_leaves_the_older_file(
    small: StepTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError("No space left on device")

    (tmp_path / "trace.json").write_text("old")
    monkeypatch.setattr("batchllm.trace.whole_file.os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        small.write(tmp_path / "trace.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trace.json", "old")]


def test_the_viewers_see_an_event_a_step_with_all_its_fields(small: StepTrace, tmp_path: Path) -> None:
    events = _document(small, tmp_path)["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in steps] == ["prefill", "mixed", "decode", "decode"]
    assert [(event["ts"], event["dur"]) for event in steps] == [(1e6, 5e5), (1.5e6, 1e6), (2.5e6, 1e6), (3.5e6, 5e5)]
    for event, row in zip(steps, small.steps.tolist(), strict=True):
        assert event["args"] == dict(zip(STEP_DTYPE.names or (), row, strict=True))


def test_the_viewers_see_counters_where_they_change(small: StepTrace, tmp_path: Path) -> None:
    events = _document(small, tmp_path)["traceEvents"]
    counters = [(event["name"], event["ts"] / 1e6, event["args"]) for event in events if event["ph"] == "C"]
    assert [(at, args) for name, at, args in counters if name == "KV tokens"] == [
        (1.0, {"pinned": 20, "private": 30, "free": 50}),
        (1.5, {"pinned": 40, "private": 50, "free": 10}),
        (2.5, {"pinned": 40, "private": 60, "free": 0}),
        (3.5, {"pinned": 0, "private": 10, "free": 90}),
    ]
    assert [(at, args) for name, at, args in counters if name == "step tokens"] == [
        (1.0, {"prefill": 100, "decode": 0}),
        (1.5, {"prefill": 50, "decode": 3}),
        (2.5, {"prefill": 0, "decode": 4}),
        (3.5, {"prefill": 0, "decode": 2}),
    ]
    assert [(at, args) for name, at, args in counters if name == "open prefixes"] == [
        (1.0, {"open": 1}),
        (1.5, {"open": 2}),
        (3.5, {"open": 0}),
    ]


def test_the_viewers_see_names_and_a_unit_in_front_of_the_events(small: StepTrace, tmp_path: Path) -> None:
    document = _document(small, tmp_path)
    # Perfetto ignores a unit that comes late, and everything after a name it does not know.
    assert list(document) == ["displayTimeUnit", "traceEvents", "metadata"]
    names = {event["name"]: event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    assert names == {"process_name": "batchllm run rows.jsonl", "thread_name": "steps"}
    assert document["metadata"]["summary"] == small.summary()


def test_a_trace_that_another_tool_formatted_reads_back(small: StepTrace, tmp_path: Path) -> None:
    document = _document(small, tmp_path)
    (tmp_path / "pretty.json").write_text(json.dumps(document, indent=4, sort_keys=True))
    assert StepTrace.read(tmp_path / "pretty.json").steps.tobytes() == small.steps.tobytes()


# Files that are no traces


def _set(*path: str | int, to: object) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        inner: Any = document
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = to

    return change


_FIRST_STEP = ("traceEvents", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("metadata", to=None), "not a step trace of batchllm"),
        (_set("metadata", "format", to="other"), "not a step trace of batchllm"),
        (_set("metadata", "version", to=1), "of version 1; this batchllm reads 2"),
        (_set("metadata", "label", to=7), "metadata.label is 7, not a text"),
        (_set("metadata", "kv_limit_tokens", to=-1), "metadata.kv_limit_tokens is -1, not a count"),
        (_set("metadata", "kv_capacity_tokens", to=True), "metadata.kv_capacity_tokens is True, not a count"),
        (_set("metadata", "kv_capacity_tokens", to=2**63), "kv_capacity_tokens is 9223372036854775808, and must be"),
        (_set("metadata", "num_steps", to=None), "metadata.num_steps is None, not a count"),
        (_set("metadata", "num_steps", to=9), "4 of its 9 steps are there"),
        (_set("metadata", "num_steps", to=10**15), "4 of its 1000000000000000 steps are there"),
        (_set("traceEvents", to={}), "traceEvents is not a list of events"),
        (_set("traceEvents", to=[1]), "traceEvents is not a list of events"),
        (_set(*_FIRST_STEP, "args", to=[]), "step 0 has no args"),
        (_set(*_FIRST_STEP, "args", to={}), "step 0: start_s is None, not a number"),
        (_set(*_FIRST_STEP, "args", "host_s", to="1"), "step 0: host_s is '1', not a number"),
        (_set(*_FIRST_STEP, "args", "host_s", to=-1.0), "step 0: host_s is -1.0, and must be from 0"),
        (_set(*_FIRST_STEP, "args", "start_s", to=1.7e9), r"step 0: start_s is 1700000000.0, and must be from 0 to"),
        (_set(*_FIRST_STEP, "args", "start_s", to=3.0), "step 1: start_s is 1.5, before that of step 0, 3.0"),
        (_set(*_FIRST_STEP, "args", "num_running", to=1.5), "step 0: num_running is 1.5, not a whole number"),
        (_set(*_FIRST_STEP, "args", "num_running", to=False), "step 0: num_running is False, not a whole number"),
        (_set(*_FIRST_STEP, "args", "num_running", to=2**31), "num_running has a number too large"),
        (_set(*_FIRST_STEP, "args", "kv_free_tokens", to=2**60), "step 0: kv_free_tokens is 1152921504606846976, and"),
        (_set(*_FIRST_STEP, "args", "num_running", to=-1), "step 0: num_running is -1, and must be from 0 to"),
    ],
)
def test_a_damaged_trace_is_refused_with_the_file_the_fault_and_a_way_out(
    small: StepTrace, tmp_path: Path, change: Callable[[Document], None], message: str
) -> None:
    document = _document(small, tmp_path)
    change(document)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message) as caught:
        StepTrace.read(path)
    assert str(path) in str(caught.value)
    assert "name a trace file as batchllm wrote it, or record the run again" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"step,seconds\n1,2\n", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "it is JSON, but not a step trace of batchllm"),
        (b'{"traceEvents":[]}', "it is JSON, but not a step trace of batchllm"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"other.json.*{message}"):
        StepTrace.read(path)


def test_a_trace_cut_anywhere_is_refused(small: StepTrace, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    small.write(path)
    for length in reversed(range(path.stat().st_size - 2)):  # without its last newline it is whole
        os.truncate(path, length)  # a file that is written anew each time waits for the disk
        with pytest.raises(ConfigError, match="was cut short or damaged" if length > 50 else "is not JSON|cut short"):
            StepTrace.read(path)


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.json.*No such file or directory; check the path"):
        StepTrace.read(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="Is a directory; check the path"):
        StepTrace.read(tmp_path)
    with pytest.raises(ConfigError, match="null byte; check the path"):
        StepTrace.read("a\0b")


# What a trace takes


def test_steps_of_another_type_or_shape_are_refused() -> None:
    for steps in (np.zeros(3), np.zeros((2, 2), dtype=STEP_DTYPE)):
        with pytest.raises(ValueError, match=r"not STEP_DTYPE \[num_steps\]"):
            StepTrace(label="", kv_capacity_tokens=1, kv_limit_tokens=1, steps=steps)


def test_times_that_are_no_numbers_are_refused(small: StepTrace) -> None:
    for value in (float("nan"), float("inf")):
        steps = small.steps.copy()
        steps["duration_s"][2] = value
        with pytest.raises(ValueError, match="step 2: duration_s is"):
            replace(small, steps=steps)


def test_a_trace_cannot_be_changed_and_the_array_it_was_made_from_can(small: StepTrace) -> None:
    steps = small.steps.copy()
    trace = replace(small, steps=steps)
    with pytest.raises(ValueError, match="read-only"):
        trace.steps["num_running"] = 0
    steps["num_running"] = 0


def test_a_label_is_one_printable_line(small: StepTrace) -> None:
    assert replace(small, label="run é \n\x1b[31m\ud800.jsonl").label == r"run é \n\x1b[31m\ud800.jsonl"


# Numbers


def test_shares_of_the_kinds_of_steps(small: StepTrace) -> None:
    assert small.kind_shares == {"idle": 0.0, "prefill": 0.25, "decode": 0.5, "mixed": 0.25}


def test_occupancy_is_a_part_of_the_limit_and_weighed_by_time(small: StepTrace) -> None:
    assert small.occupancy.tolist() == [50 / 80, 90 / 80, 100 / 80, 10 / 80]
    assert small.mean_occupancy == pytest.approx((50 * 0.5 + 90 + 100 + 10 * 0.5) / 3 / 80)


def test_the_saturated_phase_is_while_work_waits_without_the_ramp(small: StepTrace) -> None:
    assert small.saturated == slice(1, 3)
    assert small.saturated_s == 2.0
    assert small.saturated_occupancy == pytest.approx(95 / 80)


def test_the_saturated_phase_begins_no_earlier_than_the_waiting(small: StepTrace) -> None:
    steps = small.steps.copy()
    steps["num_waiting"] = [0, 0, 1, 0]
    assert replace(small, steps=steps).saturated == slice(2, 3)


def test_there_is_no_saturated_phase_if_nothing_waits_once_the_kv_is_full(small: StepTrace) -> None:
    for waiting in ([0, 0, 0, 0], [9, 0, 0, 0]):
        steps = small.steps.copy()
        steps["num_waiting"] = waiting
        trace = replace(small, steps=steps)
        assert not len(trace.steps[trace.saturated])
        assert (trace.saturated_s, trace.saturated_occupancy) == (0.0, 0.0)
        assert "nothing waited once the KV was full" in trace.render()


def test_step_times_are_percentiles(small: StepTrace) -> None:
    assert small.median_step_s == 0.75
    assert small.p99_step_s == 1.0
    assert small.median_host_s == pytest.approx(0.15)
    assert small.elapsed_s == 3.0


def test_the_summary_has_exactly_the_documented_names_in_order(small: StepTrace) -> None:
    assert list(small.summary()) == [
        "num_steps",
        "idle_share",
        "prefill_share",
        "decode_share",
        "mixed_share",
        "elapsed_s",
        "median_step_s",
        "p99_step_s",
        "median_host_s",
        "num_prefill_tokens",
        "num_decode_tokens",
        "mean_decode_rows",
        "kv_capacity_tokens",
        "kv_limit_tokens",
        "peak_kv_tokens",
        "mean_occupancy",
        "saturated_occupancy",
        "saturated_s",
        "num_retracted",
    ]


def test_nothing_done_is_zero_everywhere(small: StepTrace) -> None:
    trace = replace(_without_steps(small), kv_capacity_tokens=0, kv_limit_tokens=0)
    assert set(trace.summary().values()) == {0}
    assert "0.0%" in trace.render()


@settings(deadline=None, max_examples=sized(40, 100))
@given(data=st.data())
def test_every_number_of_any_trace_is_finite(data: st.DataObject, any_trace: st.SearchStrategy[StepTrace]) -> None:
    trace = data.draw(any_trace)
    assert all(np.isfinite(value) and value >= 0 for value in trace.summary().values())
    assert sum(trace.kind_shares.values()) == pytest.approx(1.0 if trace.num_steps else 0.0)
    assert trace.render()


def test_the_table_is_aligned_and_readable(small: StepTrace) -> None:
    assert small.render().splitlines() == [
        "run rows.jsonl",
        "steps                   4  prefill 25.0%, decode 50.0%, mixed 25.0%",
        "elapsed            3.00 s  first step to last",
        "step time       750.00 ms  median; p99 1,000.00 ms",
        "host time       150.00 ms  median of the scheduler's own time in a step",
        "prefill tokens        150",
        "decode tokens           9  2.2 rows a step",
        "KV limit               80  tokens, of 100",
        "  peak                100  tokens pinned or private",
        "  mean use          91.7%  of the limit, over the time of all steps",
        "  saturated        118.8%  while work waited: steps 1 to 2, 2.00 s",
        "retractions             1",
    ]
