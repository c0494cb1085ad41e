"""What all tests share: one import of SGLang, two workers, sizes, and how many engines may be started."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchllm.host import template
from tests.sizes import THOROUGH_VARIABLE

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests under nohup tests the same
_SCHEDULER_TITLE = b"sglang::scheduler"
_LOOK_EVERY_S = 0.3

# Files whose tests share an engine, or must not run beside each other, and in which order workers take them.
# What starts first takes longest; all other files are groups of their own, behind these.
_GROUPS = {
    "tests/srt/test_emulated_gpu.py": "emulated GPU",
    "tests/faults/test_real_engine_faults.py": "leftovers",
    "tests/srt/test_engine_life.py": "leftovers",
    "tests/srt": "one engine",
    "tests/host": "one engine",
    "tests/test_cli.py": "command",
    "tests/test_launch_server.py": "server",
    "tests/test_adapter_server.py": "leftovers",
    "tests/test_scoring_server.py": "leftovers",
    "tests/test_two_ranks.py": "leftovers",
    "tests/eval/test_gpu_bench.py": "leftovers",
    "tests/lang": "programs",
    "tests/distributed": "replicas",
    "tests/test_replica_server.py": "server of replicas",
    "tests/server/test_page_browser.py": "browser",
}
_ORDER = ("emulated GPU", "one engine", "command", "server", "leftovers", "programs", "replicas", "server of replicas")


@pytest.fixture(scope="session")
def engines() -> Iterator[None]:
    """Engines of tests are forked from one import of SGLang, with its strict memory checks on.

    Each computes on one thread: two workers have two cores. Commands and servers in processes of their own take as many
    as they do for a user.
    """
    os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    with template.held(is_verbose=False):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run property tests, fuzz and model checks in full size")
    parser.addini("max_engine_starts", "engines that the tests may start", default="0")
    parser.addini("max_thorough_engine_starts", "engines that they may start with --thorough", default="0")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--thorough"):
        os.environ[THOROUGH_VARIABLE] = "1"  # workers inherit it; tests read it when they are collected
    if not hasattr(config, "workerinput"):
        limit = "max_thorough_engine_starts" if config.getoption("--thorough") else "max_engine_starts"
        config.pluginmanager.register(EngineStarts(limit, int(config.getini(limit))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest comes first; what is for ``--thorough`` only is left out without it."""
    if not config.getoption("--thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    items.sort(key=lambda item: _ORDER.index(group) if (group := _group_of(item.nodeid)) in _ORDER else len(_ORDER))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What workers compute themselves, references mostly, takes one thread each: they share the processors, and torch's
    threads would wait for each other. Engines have processes of their own.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole groups."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

    return GroupScheduling(config, log)


def _group_of(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    return next((group for start, group in _GROUPS.items() if path.startswith(start)), path)


class EngineStarts:
    """Counts the schedulers that come up below this process; more than ``limit`` fail the run."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._seen: set[int] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._is_over.wait(_LOOK_EVERY_S):
            self._seen |= {pid for pid in psutil.pids() if pid not in self._seen and self._is_ours(pid)}

    @staticmethod
    def _is_ours(pid: int) -> bool:
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(_SCHEDULER_TITLE):
                return False
            return os.getpid() in [parent.pid for parent in psutil.Process(pid).parents()]
        except (OSError, psutil.Error):  # gone
            return False

    def pytest_sessionstart(self) -> None:
        self._thread.start()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._is_over.set()
        self._thread.join()
        if len(self._seen) > self._limit and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        words = f"engines started: {len(self._seen)}, at most {self._limit} ({self._name} in pyproject.toml)"
        terminalreporter.write_line(words, red=len(self._seen) > self._limit)
