"""A signal is a request first, and an end later."""

from __future__ import annotations

import os
import signal
import time

import pytest

from batchllm.offline.stop import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_where_signals_are_heeded_the_first_asks_the_second_insists_and_the_third_ends(number: signal.Signals) -> None:
    with StopSignal(grace_s=30.0) as stop, stop.heeded():
        assert not stop.is_set
        os.kill(os.getpid(), number)
        assert (stop.is_set, stop.name, stop.is_overdue) == (True, number.name, False)
        os.kill(os.getpid(), number)
        assert stop.is_overdue
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_signal_ends_at_once_where_nobody_heeds_it() -> None:
    with StopSignal(grace_s=30.0) as stop:
        with stop.heeded():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set


def test_of_signals_that_come_at_once_one_ends_the_work_and_the_others_let_it_clean_up() -> None:
    num_raised = 0
    with StopSignal(grace_s=30.0) as stop:
        for _ in range(10):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                num_raised += 1
        assert (num_raised, stop.is_overdue) == (1, True)
        with stop.heeded():
            os.kill(os.getpid(), signal.SIGTERM)
    assert num_raised == 1


def test_what_runs_is_overdue_when_the_grace_is_over() -> None:
    with StopSignal(grace_s=0.05) as stop, stop.heeded():
        assert not stop.is_overdue
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.06)
        assert stop.is_overdue


def test_the_handlers_of_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal(grace_s=1.0):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_end_of_a_terminal_is_ignored_where_whoever_started_us_ignores_it() -> None:
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(grace_s=1.0) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGHUP, before)
