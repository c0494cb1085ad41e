"""Progress: right numbers by the given clock, silence where there is no terminal, and a file that never stops a job."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from batchllm.errors import ConfigError
from batchllm.offline.progress import HEARTBEAT_EVERY_S, REFRESH_EVERY_S, Progress
from tests.disk_limits import files_may_have


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_summary_has_speed_reuse_failures_and_time_left() -> None:
    clock = Clock()
    progress = Progress(100, show=False, clock=clock)
    clock.now += 10
    progress.update(num_rows=20, num_prompt_tokens=8000, num_computed=2000, num_output_tokens=2000, num_failed=1)
    assert progress.summary() == "1,000 tok/s, reuse 75.0%, 1 failed, 0:40 left"


def test_counts_add_up_over_updates() -> None:
    clock = Clock()
    progress = Progress(4, show=False, clock=clock)
    clock.now += 2
    for _ in range(2):
        progress.update(num_rows=1, num_prompt_tokens=50, num_computed=50)
    assert progress.summary() == "50 tok/s, reuse 0.0%, 0:02 left"


def test_nothing_done_yet_promises_nothing() -> None:
    assert Progress(10, show=False, clock=Clock()).summary() == "0 tok/s, ? left"


def test_time_left_of_long_jobs_is_in_hours() -> None:
    clock = Clock()
    progress = Progress(101, show=False, clock=clock)
    clock.now += 100
    progress.update(num_rows=1)
    assert progress.summary().endswith("2:46:40 left")


def test_done_and_empty_jobs_have_no_time_left() -> None:
    assert Progress(0, show=False, clock=Clock()).summary() == "0 tok/s, 0:00 left"
    progress = Progress(1, show=False, clock=Clock())
    progress.update(num_rows=1)
    assert progress.summary().endswith("0:00 left")


def test_a_stream_that_is_no_terminal_stays_empty() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10, stream=stream, clock=clock) as progress:
        clock.now += 100
        progress.update(num_rows=10)
    assert stream.getvalue() == ""


def test_a_terminal_shows_rows_and_summary() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(10, stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(num_rows=3, num_output_tokens=30, num_failed=2)
        progress.close()
    last = stream.getvalue().rsplit("\r", 1)[-1]
    assert "3/10 rows" in last and "30%" in last
    assert "30 tok/s" in last and "2 failed" in last
    assert stream.getvalue().endswith("\n")


def test_showing_can_be_forced_both_ways() -> None:
    forced, silent = io.StringIO(), Terminal()
    Progress(1, show=True, stream=forced, clock=Clock()).close()
    Progress(1, show=False, stream=silent, clock=Clock()).close()
    assert forced.getvalue() != "" and silent.getvalue() == ""


def test_many_updates_draw_seldom() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(1000, stream=stream, clock=clock)
    num_drawn = stream.getvalue().count("\r")
    for _ in range(1000):
        clock.now += REFRESH_EVERY_S / 100
        progress.update(num_rows=1)
    assert stream.getvalue().count("\r") - num_drawn <= 11
    progress.close()


def test_a_resumed_job_begins_where_the_last_run_ended() -> None:
    """The bar starts there; speed and time left are of this run alone."""
    stream, clock = Terminal(), Clock()
    with Progress(100, num_done_before=60, stream=stream, clock=clock) as progress:
        assert "60/100 rows" in stream.getvalue()
        assert progress.summary().endswith("? left")
        clock.now += 10
        progress.update(num_rows=10, num_output_tokens=100)
        assert progress.summary() == "10 tok/s, 0:30 left"
    assert "70/100 rows" in stream.getvalue()


def test_rows_may_be_counted_later() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(num_rows=1)
        assert "1/? rows" in stream.getvalue() and progress.summary().endswith("? left")
        progress.set_num_rows(4)
        assert "1/4 rows" in stream.getvalue() and progress.summary().endswith("0:03 left")


def test_ticks_keep_the_bar_alive() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(10, stream=stream, clock=clock)
    num_drawn = stream.getvalue().count("\r")
    clock.now += REFRESH_EVERY_S
    progress.tick()
    assert stream.getvalue().count("\r") == num_drawn + 1
    progress.close()


def test_reuse_is_never_negative() -> None:
    """Tokens of requests that run are counted as computed before they are counted as prompts."""
    progress = Progress(10, show=False, clock=Clock())
    progress.update(num_prompt_tokens=10, num_computed=50)
    assert progress.snapshot().reuse == 0.0


# ---- The progress file


def heartbeats(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_heartbeat_has_every_count(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "progress.jsonl"
    before = time.time()
    with Progress(100, num_done_before=60, file=path, show=False, clock=clock) as progress:
        clock.now += 10
        progress.set_num_engine_restarts(1)
        progress.update(num_rows=10, num_failed=2, num_prompt_tokens=80, num_computed=20, num_output_tokens=20)
    last = heartbeats(path)[-1]
    assert before <= last.pop("time") <= time.time()
    assert last == {
        "state": "reading",
        "num_rows": 100,
        "num_done": 70,
        "num_failed": 2,
        "num_done_before": 60,
        "num_prompt_tokens": 80,
        "num_computed_prompt_tokens": 20,
        "num_output_tokens": 20,
        "tokens_per_s": 10.0,
        "reuse": 0.75,
        "time_left_s": 30.0,
        "num_engine_restarts": 1,
        "elapsed_s": 10.0,
    }


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    Progress(file=path, show=False, clock=Clock()).close()
    first, last = heartbeats(path)
    assert first["num_rows"] is first["time_left_s"] is last["num_rows"] is last["time_left_s"] is None


def test_heartbeats_are_the_first_the_last_each_change_and_one_a_second(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "progress.jsonl"
    with Progress(10, file=path, show=False, clock=clock) as progress:
        assert len(heartbeats(path)) == 1
        progress.set_state("starting")
        progress.set_state("starting")
        progress.set_state("running")
        assert [beat["state"] for beat in heartbeats(path)] == ["reading", "starting", "running"]
        for _ in range(40):
            clock.now += HEARTBEAT_EVERY_S / 4
            progress.tick()
        assert len(heartbeats(path)) == 3 + 10
        progress.update(num_rows=10)
        assert len(heartbeats(path)) == 3 + 10
        progress.close()
    assert len(heartbeats(path)) == 3 + 10 + 1
    assert heartbeats(path)[-1]["num_done"] == 10


def test_a_resumed_job_goes_on_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    for num_done_before in (0, 5):
        Progress(10, num_done_before=num_done_before, file=path, show=False, clock=Clock()).close()
    assert [beat["num_done"] for beat in heartbeats(path)] == [0, 0, 5, 5]


def test_a_file_that_takes_no_more_is_told_once_and_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(10, file=Path("/dev/full"), stream=stream, clock=clock) as progress:
        clock.now += 10
        progress.update(num_rows=1)
        progress.set_state("running")
        assert progress.snapshot().num_done == 1
    assert stream.getvalue() == "--progress-file /dev/full: No space left on device; going on without it\n"


def test_a_line_that_does_not_fit_whole_is_told(tmp_path: Path) -> None:
    stream = io.StringIO()
    path = tmp_path / "progress.jsonl"
    with files_may_have(100):
        Progress(10, file=path, stream=stream, clock=Clock())  # writes its first line
    assert path.stat().st_size == 100
    assert stream.getvalue() == f"--progress-file {path}: No space left on device; going on without it\n"


def test_a_file_that_cannot_be_opened_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--progress-file .*cannot be opened: No such file or directory"):
        Progress(10, file=tmp_path / "none" / "progress.jsonl", show=False)
