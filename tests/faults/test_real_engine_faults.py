"""Processes of a real engine that end or are in trouble, one after the other, under one job: rows once, nothing left.

One driver and one template serve all of it; an engine is started in the place of each that ends. What of the matrix is
held where is in `tests/faults/matrix.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.environment import of_user
from tests.faults.matrix import HOLDERS, REAL, Cell
from tests.shared_memory import left_behind, ownerless

pytestmark = [pytest.mark.engine, pytest.mark.thorough]

NUM_ROWS = 6000
NUM_OUTPUT_TOKENS = 24
_TIMEOUT_S = 120
_ENDS = REAL + "test_a_process_of_the_engine_that_ends_is_replaced"
_TROUBLES = REAL + "test_an_engine_survives_faults_around_it"
_CLOCK = """
import os, time
real, path = time.time, os.environ["TEST_CLOCK"]
time.time = lambda: real() + 9 * 3600 * os.stat(path).st_size
"""
"""A clock that is set on by nine hours with each byte that is written to a file."""


class RealJob:
    """A job on a real engine, in a process of its own."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.out = base / "out.jsonl"
        self.temporary = base / "tmp"
        self.temporary.mkdir()
        self.clock = base / "clock"
        self.clock.touch()
        (base / "path").mkdir()
        (base / "path" / "sitecustomize.py").write_text(_CLOCK)
        sampling = {"temperature": 0, "max_new_tokens": NUM_OUTPUT_TOKENS, "ignore_eos": True}
        rows = [
            {"id": f"r{i}", "input_ids": [10 + i // 20, *range(50, 146), 1000 + i % 3000], "sampling_params": sampling}
            for i in range(NUM_ROWS)
        ]
        (base / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["run", "-i", str(base / "in.jsonl"), "-o", str(self.out), "--max-total-tokens", "8192"]
        environment = of_user()
        self._log = (base / "log").open("ab")
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "batchllm", *command, "--progress-file", str(base / "progress.jsonl")],
            stderr=self._log,
            env=environment
            | {"TMPDIR": str(self.temporary), "PYTHONPATH": str(base / "path"), "TEST_CLOCK": str(self.clock)},
        )
        self.recorded: dict[int, int] = {}
        self.seen: list[psutil.Process] = []

    def close(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.wait()
        self._log.close()

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not is_so():
            assert self.driver.poll() is None and time.monotonic() < deadline, (what, (self.base / "log").read_text())
            time.sleep(0.02)

    def processes(self) -> dict[str, psutil.Process]:
        """The engine's processes that compute, by name."""
        found = {}
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline()).strip()
            except psutil.Error:
                continue
            found |= {name: process for name in ("scheduler", "detokenizer") if title.endswith(f"::{name}")}
        return found

    def look(self) -> dict[int, int]:
        """Rows that are recorded, and in which place; what was stays."""
        path = Path(f"{self.out}.job", "journal.db")
        if not path.exists():
            return {}
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT idx, seq FROM result").fetchall()
        assert len(dict(found)) == len(found), "a row has two results"
        assert self.recorded.items() <= dict(found).items(), "a row that was acknowledged is gone, or was done again"
        self.recorded = dict(found)
        return self.recorded

    def state(self) -> tuple[str, int]:
        """What the driver does, and engines started in the place of others."""
        line = json.loads((self.base / "progress.jsonl").read_text().splitlines()[-1])
        return line["state"], line["num_engine_restarts"]

    def wait_for_phase(self, phase: str) -> dict[str, psutil.Process]:
        """Wait until an engine is in it, and has been found so; its processes."""
        before = len(self.look())
        self.wait_until(lambda: len(self.processes()) == 2 and self.state()[0] == "running", "no engine")
        if phase == "decode":
            self.wait_until(lambda: len(self.look()) > before, "no row is answered")
        found = self.processes()
        self.seen += found.values()
        return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealJob]:
    job = RealJob(tmp_path_factory.mktemp("job"))
    yield job
    job.close()


def _in_turn(cells: list[Cell]) -> list[Cell]:
    """Those in which rows are answered between those in which none is: five deaths without an answer end a job."""
    return sorted(cells, key=lambda cell: (cell.fault, cell.process, cell.phase))


@pytest.mark.parametrize(("process", "fault"), [(c.process, c.fault) for c in HOLDERS[_TROUBLES]])
def test_an_engine_survives_faults_around_it(job: RealJob, process: str, fault: str) -> None:
    """SIGTERM, a log that cannot grow, a temporary folder that goes, a clock that is set: the same processes go on."""
    found = job.wait_for_phase("decode")
    if fault == "SIGTERM":
        found[process].send_signal(signal.SIGTERM)
    elif fault == "full disk":
        found[process].rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))
    elif fault == "removed folder":
        for folder in job.temporary.glob("batchllm-*"):
            shutil.rmtree(folder)
    else:
        with job.clock.open("ab") as file:
            file.write(b"x")
    num_before = len(job.look())
    job.wait_until(lambda: len(job.look()) > num_before, "no row is answered any more")
    assert job.processes() == found


@pytest.mark.parametrize(("process", "fault", "phase"), _in_turn(HOLDERS[_ENDS]))
def test_a_process_of_the_engine_that_ends_is_replaced(job: RealJob, process: str, fault: str, phase: str) -> None:
    """The whole engine is; rows that were acknowledged stay where they are.

    A process that gets no memory may not need any, since its pools are there, and goes on: it stands still in no case.
    """
    found = job.wait_for_phase(phase)
    num_restarts, num_before = job.state()[1], len(job.look())
    if fault == "no memory":
        found[process].rlimit(psutil.RLIMIT_AS, (1 << 20, psutil.RLIM_INFINITY))
    else:
        found[process].send_signal(signal.Signals[fault])

    def is_replaced() -> bool:
        state, num = job.state()
        return state == "running" and num > num_restarts

    job.wait_until(
        lambda: is_replaced() or (fault == "no memory" and len(job.look()) > num_before + 200),
        "the engine is not replaced",
    )
    assert not (is_replaced() and any(old.is_running() for old in found.values()))
    job.look()


def test_in_the_end_every_row_is_there_once_and_nothing_else(job: RealJob) -> None:
    shared_memory = ownerless()
    assert job.driver.wait(_TIMEOUT_S * 4) == 0, (job.base / "log").read_text()[-3000:]
    lines = [json.loads(line) for line in job.out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(NUM_ROWS)]
    assert {len(line["output_ids"]) for line in lines} == {NUM_OUTPUT_TOKENS}
    assert len(job.look()) == NUM_ROWS
    assert not any(process.is_running() for process in job.seen)
    assert [name for name in os.listdir(job.temporary) if "torch" not in name] == []
    assert not left_behind(shared_memory)
