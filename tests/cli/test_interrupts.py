"""A command answers Ctrl-C, SIGTERM and SIGHUP from its first moment to its last, with its words and exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from batchllm.cli import interrupts
from batchllm.cli.interrupts import Interrupts
from batchllm.offline.stop import SIGNALS

_WHILE_IMPORTING = """
import builtins, os
from batchllm.cli import command
before = builtins.__import__
def imports(name, *arguments, **options):
    if name == {module!r} and builtins.__import__ is imports:
        builtins.__import__ = before
        for _ in range({times}):
            os.kill(os.getpid(), {number})
    return before(name, *arguments, **options)
builtins.__import__ = imports
raise SystemExit(command(["plan", "-i", "in.jsonl"]))
"""
_AT_THE_END = """
import atexit, os
from batchllm.cli import command
status = command(["status", "nowhere"])
atexit.register(os.kill, os.getpid(), {number})
raise SystemExit(status)
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("number", "module", "times"),
    [
        (signal.SIGINT, "batchllm.cli.outcome", 1),
        (signal.SIGTERM, "batchllm.dataset.schema_support", 1),
        (signal.SIGHUP, "batchllm.cli.parser", 2),
    ],
)
def test_a_signal_that_comes_while_modules_are_imported_ends_the_command_in_its_words(
    number: signal.Signals, module: str, times: int
) -> None:
    """Once: they are imported first. Twice: at once."""
    done = _run(_WHILE_IMPORTING.format(module=module, number=int(number), times=times))
    assert (done.returncode, done.stdout, done.stderr) == (3, "", interrupts.WORDS)


def test_a_signal_that_comes_when_a_command_has_ended_leaves_its_exit_status() -> None:
    done = _run(_AT_THE_END.format(number=int(signal.SIGINT)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


def test_nothing_is_imported_before_signals_are_answered_that_takes_time() -> None:
    code = "import sys, batchllm.cli\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(_run(code).stdout.split())
    assert "batchllm" in loaded
    assert not loaded & {"argparse", "msgspec", "numba", "numpy", "psutil", "tokenizers", "transformers"}


def test_one_signal_is_noted_and_answered_when_it_can_be_and_the_next_one_at_once() -> None:
    signals = Interrupts()
    signals.note()
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        signals.act()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    signals.note()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_end_of_the_terminal_is_ignored_where_whoever_starts_the_command_ignores_it() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Interrupts()
    signals.note()
    signals.act()
    interrupts.pass_on_hangup()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_server_takes_the_end_of_the_terminal_for_sigterm() -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupts.pass_on_hangup()
    os.kill(os.getpid(), signal.SIGHUP)
    assert heard == [signal.SIGTERM]
