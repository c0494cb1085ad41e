"""The bar: right numbers by the given clock, and silence where there is no terminal."""

from __future__ import annotations

import io

from batchllm.offline.progress import REFRESH_EVERY_S, Progress


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
