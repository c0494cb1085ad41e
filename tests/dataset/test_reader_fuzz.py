"""Whatever bytes come in: no exception, and one row or bad row for each non-blank line."""

from __future__ import annotations

import io
import json
from typing import Any

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm.dataset import BadRow, Row, read_rows, render_error
from batchllm.dataset.sampling import SGLANG_FIELDS
from batchllm.errors import WorkloadError
from batchllm.request import SamplingParams

BOM = b"\xef\xbb\xbf"


def check_reading(data: bytes) -> list[Row | BadRow]:
    """Reads, and checks the room's invariant against an independent count of the lines."""
    lines = data.removeprefix(BOM).split(b"\n")
    expected = [number for number, line in enumerate(lines, start=1) if line.strip()]
    rows: list[Row | BadRow] = []
    try:
        rows.extend(read_rows(io.BytesIO(data), defaults=SamplingParams()))
    except WorkloadError:
        assert not expected
    assert [row.line for row in rows] == expected
    for position, row in enumerate(rows):
        assert (row.request.index if isinstance(row, Row) else row.index) == position
        if isinstance(row, BadRow):
            assert row.code and row.message and len(row.message) < 1500
            orjson.dumps(render_error(row))
    return rows


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
field_names = st.sampled_from(
    [
        *("id", "prompt", "input_ids", "messages", "sampling_params", "namespace"),
        *("custom_id", "method", "url", "body", "zzz"),
    ]
)
known_values = st.sampled_from(
    [
        *("POST", "/v1/completions", "/v1/chat/completions", [1, 2], [[1]], ["a"], "text", 5),
        *([{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "x"}]}]),
        {"prompt": "x", "max_tokens": 3, "response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True},
        {"max_new_tokens": 3, "stop": ["x"]},
    ]
)
sampling_like = st.dictionaries(
    st.sampled_from([*SGLANG_FIELDS, "max_tokens", "prompt", "response_format", "stream"]),
    json_values | known_values,
    max_size=4,
)
records = st.dictionaries(field_names, known_values | sampling_like | json_values, max_size=5)

GOOD = b'{"id":"good-%d","prompt":"x"}'


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data: bytes) -> None:
    check_reading(data)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b" ", b"{}", b"x", b"\x0c", BOM])))
def test_every_mix_of_line_ends_counts_lines_right(pieces: list[bytes]) -> None:
    check_reading(b"".join(pieces))


@settings(max_examples=200, deadline=None)
@given(st.lists(records, max_size=4))
def test_json_of_the_wrong_shape_never_raises(lines: list[dict[str, Any]]) -> None:
    check_reading(b"\n".join(json.dumps(line).encode() for line in lines))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(records, st.integers(min_value=0), st.binary(max_size=3), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    )
)
def test_good_rows_around_mutated_ones_survive(
    mutations: list[tuple[dict[str, Any], int, bytes, int]],
) -> None:
    lines = [GOOD % 0]
    for number, (record, at, inserted, num_cut) in enumerate(mutations, start=1):
        whole = json.dumps(record).encode()
        at %= len(whole)
        mutated = whole[:at] + inserted + whole[at + num_cut :]
        lines += [mutated.replace(b"\n", b" "), GOOD % number]
    rows = check_reading(b"\n".join(lines))
    survivors = [row.given_id for row in rows if isinstance(row, Row)]
    expected = [f"good-{number}" for number in range(len(mutations) + 1)]
    assert [given_id for given_id in survivors if str(given_id).startswith("good-")] == expected


@settings(max_examples=200, deadline=None)
@given(sampling_like)
def test_sampling_that_is_read_is_within_its_ranges(mapping: dict[str, Any]) -> None:
    line = json.dumps({"prompt": "x", "sampling_params": mapping}).encode()
    (row,) = check_reading(line)
    if isinstance(row, Row):
        sampling = row.request.sampling
        assert sampling.max_new_tokens >= max(1, sampling.min_new_tokens)
        assert 0 < sampling.top_p <= 1
        assert 1 <= sampling.n <= 128
        assert "" not in sampling.stop
