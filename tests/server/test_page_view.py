"""Claims about what the page says, as values: from records and counts to words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchllm.dataset import BadRow
from batchllm.offline.stats import JobStats
from batchllm.planner import PrefixSummary
from batchllm.server.batch_activity import BatchCosts
from batchllm.server.batch_store import BatchRecord
from batchllm.server.file_store import FileRecord
from batchllm.server.page import view
from batchllm.server.page.charts import SHOWN_S, draw_charts, recent_steps
from batchllm.server.page.session import LIFETIME_S, Sessions
from batchllm.trace.latency import LatencySummary
from batchllm.trace.steps import STEP_DTYPE, StepArray, checked_steps

HOSTILE = '<b onclick="x">\u202eevil\n\x1b[31m'

RECORD = BatchRecord(
    seq=1,
    id="batch_" + "0" * 32,
    status="in_progress",
    endpoint="/v1/completions",
    input_file_id="file-" + "0" * 32,
    completion_window="24h",
    metadata=None,
    output_expiry_s=None,
    created_at=0,
    expires_at=86_400,
    in_progress_at=1,
    finalizing_at=None,
    completed_at=None,
    failed_at=None,
    expired_at=None,
    cancelling_at=None,
    cancelled_at=None,
    model="m",
    errors=None,
    output_file_id=None,
    error_file_id=None,
    usage=None,
    num_rows=1200,
    num_answered=1000,
    num_failed=34,
    num_attempts=0,
    num_done_at_attempt=-1,
)
COSTS = BatchCosts(
    is_whole=True,
    stats=JobStats(num_prompt_tokens=1000, num_optimal_prompt_tokens=250, num_computed_prompt_tokens=300),
    failed_by_code={"a": 1, "b": 33},
    first_failed=[BadRow(kind="openai", given_id=HOSTILE, index=0, line=1, code="a", message=HOSTILE)],
    largest_prefixes=[],
)


def _steps(*rows: dict[str, Any]) -> StepArray:
    steps = np.zeros(len(rows), STEP_DTYPE)
    for step, row in zip(steps, rows, strict=True):
        for name, value in row.items():
            step[name] = value
    return steps


def test_a_batch_that_runs_says_how_far_it_is_and_can_be_cancelled() -> None:
    found = view.view_batch(RECORD)
    assert (found.status, found.progress, found.failed) == ("in progress", "1,034 of 1,200 rows", "34 failed")
    assert (found.done, found.total, found.can_cancel, found.is_active) == (1034, 1200, True, True)
    assert (found.created, found.ended) == ("1970-01-01 00:00:00 UTC", "")


@pytest.mark.parametrize(
    ("status", "can_cancel", "is_active"),
    [
        ("validating", True, True),
        ("in_progress", True, True),
        ("finalizing", False, True),
        ("cancelling", False, True),
        ("completed", False, False),
        ("failed", False, False),
        ("expired", False, False),
        ("cancelled", False, False),
    ],
)
def test_only_what_the_api_cancels_can_be_cancelled(status: Any, can_cancel: bool, is_active: bool) -> None:
    found = view.view_batch(replace(RECORD, status=status))
    assert (found.can_cancel, found.is_active) == (can_cancel, is_active)


def test_rows_that_are_not_counted_yet_are_not_said_to_be_none() -> None:
    assert view.view_batch(replace(RECORD, status="validating", num_rows=0)).progress == "not counted yet"
    assert view.view_batch(replace(RECORD, status="failed", num_rows=0)).progress == "no rows"


def test_reuse_is_what_was_counted_and_the_optimum_is_there_where_it_is_known() -> None:
    running = view.reuse_of_batch(RECORD, COSTS)
    assert running is not None
    assert (running.reuse, running.best, running.computed, running.optimal) == ("70.0%", "75.0%", "300", "250")
    usage = {"input": 1000, "cached": 600, "output": 5}
    ended = view.reuse_of_batch(replace(RECORD, usage=usage), COSTS)
    assert ended is not None and (ended.reuse, ended.best, ended.optimal) == ("60.0%", "", "")
    usage |= {"prompt": 2000, "computed": 500, "optimal": 400}
    whole = view.reuse_of_batch(replace(RECORD, usage=usage), None)
    assert whole is not None and (whole.reuse, whole.best, whole.prompt) == ("75.0%", "80.0%", "2,000")
    assert view.reuse_of_batch(RECORD, None) is None
    assert view.reuse_of_batch(replace(RECORD, usage={"input": 0, "cached": 0, "output": 0}), None) is None


def test_reasons_are_ordered_and_bounded() -> None:
    assert view.reasons_of(RECORD, COSTS) == [("b", "33"), ("a", "1")]
    ended = replace(RECORD, usage={"failed_by_code": {f"c{i}": i for i in range(1000)}})
    found = view.reasons_of(ended, COSTS)
    assert len(found) == view.MAX_REASONS and found[0] == ("c999", "999")
    assert view.reasons_of(RECORD, None) == []


def test_text_of_users_is_one_line_that_can_be_seen() -> None:
    """In ids, messages, names of files, models and metadata; escaping HTML is the template's."""
    (failure,) = view.failures_so_far(COSTS.first_failed)
    batch = view.view_batch(replace(RECORD, model=HOSTILE, metadata={HOSTILE: HOSTILE}))
    file = FileRecord(id="file-1", num_bytes=2048, created_at=0, expires_at=None, filename=HOSTILE, purpose="batch")
    for text in (failure.where, failure.message, batch.model, *batch.metadata[0], view.view_file(file).label):
        assert text.isprintable() and "<b onclick" in text and "\\u202e" in text
    assert view.shown("\ud800") == "\\ud800"
    assert len(view.shown("x" * 10_000)) == 301


def test_failures_are_read_from_the_beginning_of_a_file() -> None:
    """In both forms of a line; one that was cut off is left out, and no more are shown than fit."""
    failed = {"custom_id": "r1", "error": None, "response": {"body": {"error": {"code": "c", "message": "m"}}}}
    missing = {"custom_id": None, "response": None, "error": {"code": "batch_cancelled", "message": "was cancelled"}}
    lines = [json.dumps(line).encode() for line in (failed, missing)]
    found = view.failures_of_file(b"\n".join([*lines, lines[0][:20]]))
    assert found == [("r1", "c", "m"), ("row without an id", "batch_cancelled", "was cancelled")]
    assert len(view.failures_of_file(b"".join(line + b"\n" for line in lines * 500))) == view.MAX_FAILURES
    assert view.failures_of_file(lines[0][:20]) == []


def test_faults_of_a_file_name_their_lines() -> None:
    errors = [{"code": "c", "line": number, "message": "m", "param": None} for number in range(1, 100)]
    found = view.faults_of_file(replace(RECORD, errors=errors))
    assert len(found) == view.MAX_FAILURES and found[0] == ("line 1", "c", "m")
    assert view.faults_of_file(replace(RECORD, errors=[{"code": "c", "line": None, "message": "m"}]))[0].where == ""


def test_rows_of_prefixes_are_counted_from_one() -> None:
    prefix = PrefixSummary(level=2, own_len=10, end_len=30, num_consumers=1000, saved_tokens=9990, example_row=0)
    assert view.view_prefixes([prefix]) == [("9,990", "1,000", "10", "30", "2", "1")]


def test_the_step_mix_adds_up_to_the_tokens_of_the_steps() -> None:
    steps = _steps(
        {"num_prefill_tokens": 60, "num_live_prefill_tokens": 10, "num_decode_tokens": 30, "num_live_decode_tokens": 5},
        {"num_decode_tokens": 10},
    )
    assert view.view_step_mix(steps) == [
        ("planned prefill", "50", "50.0%"),
        ("planned decode", "35", "35.0%"),
        ("live prefill", "10", "10.0%"),
        ("live decode", "5", "5.0%"),
    ]
    assert view.view_step_mix(_steps()) == view.view_step_mix(_steps({})) == []


def test_latency_has_units_and_none_is_not_zero() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert view.view_latency("a", LatencySummary(1200, 0.0123, 1.5)) == ("a", f"12.3{space}ms", f"1.5{space}s", "1,200")
    assert view.view_latency("a", LatencySummary(0, 0.0, 0.0)) == ("a", "none", "none", "0")


def test_times_without_steps_are_empty_steps() -> None:
    """Between steps and behind the last; what is older than the window is left out."""
    steps = _steps(
        {"start_s": 1000.0, "duration_s": 1.0, "kv_free_tokens": 1},
        {"start_s": 2000.0, "duration_s": 10.0, "kv_free_tokens": 5},
        {"start_s": 2100.0, "duration_s": 10.0, "kv_free_tokens": 5},
    )
    found = recent_steps(steps, 2000.0 + SHOWN_S)
    assert found["duration_s"].sum() == pytest.approx(SHOWN_S)
    assert found["duration_s"][found["kv_free_tokens"] == 5].tolist() == [10.0, 10.0]
    assert found["start_s"][0] == -SHOWN_S
    ends = found["start_s"] + found["duration_s"]
    assert np.allclose(found["start_s"][1:], ends[:-1]) and ends[-1] == pytest.approx(0.0)
    found["start_s"] += SHOWN_S
    checked_steps(found)
    assert len(recent_steps(steps, 1e6)) == 0 and draw_charts(_steps(), 10) == []


def test_charts_are_bounded_and_say_what_they_show() -> None:
    steps = np.zeros(10_000, STEP_DTYPE)
    steps["duration_s"], steps["start_s"] = 0.05, np.arange(10_000) * 0.05
    steps["kv_pinned_tokens"], steps["kv_private_tokens"], steps["kv_free_tokens"] = np.arange(10_000), 7, 90_000
    kv, tokens = draw_charts(recent_steps(steps, 500.0), 80_000)
    assert [band.name for band in kv.bands] == ["pinned", "private", "free"]
    assert "pinned 9,98" in kv.words and "private 7" in kv.words
    assert kv.limit is not None and kv.limit[1] == "limit 80,000"
    assert all(band.path.count("V") <= 600 for band in (*kv.bands, *tokens.bands))


def test_a_token_is_good_for_its_key_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions("sk-1")
    token = sessions.new_token()
    assert sessions.is_good(token) and not Sessions("sk-2").is_good(token)
    expiry, nonce, signature = token.split(".")
    for other in (None, "", ".", "..", f"{int(expiry) + 1}.{nonce}.{signature}", f"{expiry}.{nonce}.", "é.\ud800"):
        assert not sessions.is_good(other)
    assert sessions.is_key("sk-1") and not sessions.is_key("") and not sessions.is_key("sk-\ud800")
    monkeypatch.setattr("batchllm.server.page.session.unix_now", lambda: int(expiry) + LIFETIME_S)
    assert not sessions.is_good(token)
