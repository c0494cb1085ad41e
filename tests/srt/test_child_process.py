"""A process of an engine does not outlive the driver, whenever that dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_SCRIPT = """
import multiprocessing, os, sys, time

def child(path):
    with open(path + ".tmp", "w") as file:
        file.write(str(os.getpid()))
    os.replace(path + ".tmp", path)
    while os.getppid() == multiprocessing.parent_process().pid and sys.argv[2] == "before":
        time.sleep(0.01)  # as if it were still importing when its parent dies
    from batchllm.srt.entrypoints import child_process
    child_process.begin("child")
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1],)).start()
    time.sleep(600)
"""


def test_a_child_ends_with_its_parent_also_one_that_died_before_it_began(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    for when in ("before", "after"):
        named = tmp_path / when
        with subprocess.Popen([sys.executable, str(script), str(named), when]) as parent:
            _wait_until(named.exists)
            child = psutil.Process(int(named.read_text()))
            if when == "after":
                time.sleep(0.2)
            parent.kill()
        _wait_until(lambda child=child: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
