"""The file of a step trace: Chrome's Trace Event JSON, so that Perfetto and chrome://tracing open it as it is.

Knows the format only. What a trace means is `step_trace`'s.

INVARIANT: `decode` of what `encode` gave is the same header and the same steps, bit for bit. It reads the ``args`` of
the step events and ``metadata``; everything else in the file is for the viewers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from batchllm.trace.steps import FIELD_NAMES, STEP_DTYPE, STEP_KINDS, TIME_FIELDS, StepArray, step_kinds

_FORMAT = "batchllm step trace"
_VERSION = 2
# Perfetto wants the unit in front of the events, and stops at a top-level name it does not know.
_OPENING = b'{"displayTimeUnit":"ms","traceEvents":['
_CHUNK_LEN = 8192  # steps turned into Python objects at a time
_PID, _TID = 1, 1

_COUNTERS = (
    ("KV tokens", {"pinned": "kv_pinned_tokens", "private": "kv_private_tokens", "free": "kv_free_tokens"}),
    ("step tokens", {"prefill": "num_prefill_tokens", "decode": "num_decode_tokens"}),
    ("open prefixes", {"open": "num_open_prefixes"}),
)
"""Counter tracks of the viewers: name, and which field each of its series shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a trace file says beside its steps.

    Attributes:
        label: What ran.
        kv_capacity_tokens: Slots of the KV pool.
        kv_limit_tokens: Slots of it that may be used.
    """

    label: str
    kv_capacity_tokens: int
    kv_limit_tokens: int


def encode(header: Header, steps: StepArray, summary: dict[str, Any]) -> Iterator[bytes]:
    """The file in parts, one event a line.

    Args:
        header: Goes into ``metadata``.
        steps: `STEP_DTYPE` ``[num_steps]``.
        summary: Goes into ``metadata`` for whoever looks at the file; not read back.
    """
    yield _OPENING + b"\n" + b",\n".join(map(orjson.dumps, _name_events(header.label)))
    for event in _step_events(steps):
        yield b",\n" + orjson.dumps(event)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "label": header.label,
        "kv_capacity_tokens": header.kv_capacity_tokens,
        "kv_limit_tokens": header.kv_limit_tokens,
        "num_steps": len(steps),
        "summary": summary,
    }
    yield b'\n],"metadata":' + orjson.dumps(metadata) + b"}\n"


def decode(raw: bytes) -> tuple[Header, StepArray]:
    """Header and steps `STEP_DTYPE` ``[num_steps]`` of a file's content.

    Raises:
        ValueError: It is not JSON, was cut short, is not such a trace, or has a value of a wrong type.
    """
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        was_ours = raw.startswith(_OPENING)
        what = "was cut short or damaged" if was_ours else "is not JSON"
        raise ValueError(f"the file {what} (line {error.lineno}: {error.msg})") from error
    metadata = document.get("metadata") if isinstance(document, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError("it is JSON, but not a step trace of batchllm")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"it is a step trace of version {metadata.get('version')!r}; this batchllm reads {_VERSION}")
    label = metadata.get("label")
    if not isinstance(label, str):
        raise ValueError(f"metadata.label is {label!r}, not a text")
    header = Header(
        label=label,
        kv_capacity_tokens=_metadata_count(metadata, "kv_capacity_tokens"),
        kv_limit_tokens=_metadata_count(metadata, "kv_limit_tokens"),
    )
    rows = _step_args(document.get("traceEvents"))
    num_steps = _metadata_count(metadata, "num_steps")
    if len(rows) != num_steps:
        raise ValueError(f"{len(rows)} of its {num_steps} steps are there")
    steps = np.empty(num_steps, dtype=STEP_DTYPE)
    for name in FIELD_NAMES:
        steps[name] = _column(rows, name)
    return header, steps


def _name_events(label: str) -> Iterator[dict[str, Any]]:
    yield {"name": "process_name", "ph": "M", "pid": _PID, "tid": _TID, "args": {"name": f"batchllm {label}"}}
    yield {"name": "thread_name", "ph": "M", "pid": _PID, "tid": _TID, "args": {"name": "steps"}}


def _step_events(steps: StepArray) -> Iterator[dict[str, Any]]:
    """A complete event for each step, and after it the counters that it changed. Times in microseconds."""
    has_changed = [_changed(steps, fields.values()) for _, fields in _COUNTERS]
    kinds = step_kinds(steps)
    for begin in range(0, len(steps), _CHUNK_LEN):
        chunk = slice(begin, begin + _CHUNK_LEN)
        starts_us = np.round(steps["start_s"][chunk] * 1e6, 3).tolist()
        durations_us = np.round(steps["duration_s"][chunk] * 1e6, 3).tolist()
        changes = zip(*(changed[chunk].tolist() for changed in has_changed), strict=True)
        for start_us, duration_us, kind, row, is_new in zip(
            starts_us, durations_us, kinds[chunk].tolist(), steps[chunk].tolist(), changes, strict=True
        ):
            args = dict(zip(FIELD_NAMES, row, strict=True))
            yield {
                "name": STEP_KINDS[kind],
                "cat": "step",
                "ph": "X",
                "pid": _PID,
                "tid": _TID,
                "ts": start_us,
                "dur": duration_us,
                "args": args,
            }
            for (name, fields), is_shown in zip(_COUNTERS, is_new, strict=True):
                if is_shown:  # a viewer keeps the last value
                    values = {series: args[field] for series, field in fields.items()}
                    yield {"name": name, "ph": "C", "pid": _PID, "ts": start_us, "args": values}


def _changed(steps: StepArray, fields: Iterable[str]) -> npt.NDArray[np.bool_]:
    """Steps where any of the fields differs from the step before, bool ``[num_steps]``; the first does."""
    changed = np.zeros(len(steps), dtype=np.bool_)
    changed[:1] = True
    for field in fields:
        changed[1:] |= steps[field][1:] != steps[field][:-1]
    return changed


def _metadata_count(metadata: dict[str, Any], name: str) -> int:
    value = metadata.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"metadata.{name} is {value!r}, not a count")
    return value


def _step_args(events: object) -> list[dict[str, Any]]:
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ValueError("traceEvents is not a list of events")
    rows = [event.get("args") for event in events if event.get("ph") == "X"]
    for at, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"step {at} has no args")
    return rows


def _column(rows: list[dict[str, Any]], name: str) -> npt.NDArray[Any]:
    """One field of all steps, in its type of `STEP_DTYPE`."""
    values = [row.get(name) for row in rows]
    types = (float, int) if name in TIME_FIELDS else (int,)
    if not set(map(type, values)) <= set(types):
        at = next(at for at, value in enumerate(values) if type(value) not in types)
        wanted = "a number" if name in TIME_FIELDS else "a whole number"
        raise ValueError(f"step {at}: {name} is {values[at]!r}, not {wanted}")
    try:
        return np.array(values, dtype=STEP_DTYPE[name])
    except OverflowError as error:
        raise ValueError(f"{name} has a number too large: {error}") from error
