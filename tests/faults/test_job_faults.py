"""A job whose driver, engine, disk, folder or clock fails, in each phase: rows once, nothing lost, nothing left.

The engine is the instant one; what of the matrix is held where is in `tests/faults/matrix.py`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from batchllm.offline.journal import Journal
from tests.cli.jobs import read_lines, recorded_rows, status_of
from tests.faults.matrix import HOLDERS, JOB, phases_of
from tests.faulty_job import AT, IDS, NUM_ROWS, FaultyJob
from tests.mounted_disk import run_with_mounts
from tests.shared_memory import left_behind, ownerless

MOMENTS: dict[str, dict[str, Any]] = {
    "idle": {"moment": "start"},
    "prefill": {"at": 0},
    "decode": {"at": AT},
    "finalising": {"moment": "end"},
}
HOUR_S = 3600
_DRIVER = JOB + "test_a_job_whose_driver_ends_goes_on_with_what_it_had"
_ENGINE = JOB + "test_an_engine_that_dies_is_replaced_and_no_row_is_lost"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyJob:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    return FaultyJob(tmp_path)


def acknowledged(out: Path) -> set[int]:
    folder = Path(f"{out}.job")
    return recorded_rows(folder) if Journal.exists(folder) else set()


def check_nothing_left(job: FaultyJob, shared_memory: set[str]) -> None:
    """But the input, the output, the job and what the engine was asked for."""
    assert not os.listdir(job.base / "tmp")
    assert set(os.listdir(job.base)) <= {"in.jsonl", "out.jsonl", "out.jsonl.job", "log.txt", "tmp", "disk"}
    assert not [name for name in os.listdir(job.base / "out.jsonl.job") if "copy-" in name]
    assert not left_behind(shared_memory)


@pytest.mark.parametrize(("fault", "phase"), [(cell.fault, cell.phase) for cell in HOLDERS[_DRIVER]], ids=str)
def test_a_job_whose_driver_ends_goes_on_with_what_it_had(job: FaultyJob, fault: str, phase: str) -> None:
    """By whatever it ends: a signal, which it may answer, or memory that it does not get."""
    shared_memory, out = ownerless(), job.base / "out.jsonl"
    how: dict[str, dict[str, Any]] = {
        "SIGKILL": {"do": "kill -KILL $PPID", "delay_s": 0.005},
        "SIGTERM": {"do": "kill -TERM $PPID", "delay_s": 0.005},
        "no memory": {"fault": "memory"},
    }
    done = job.run("-i", job.source, "-o", out, batch=10, **MOMENTS[phase], **how[fault])
    assert "Traceback" not in done.stderr
    recorded = acknowledged(out)
    if fault == "SIGKILL":
        assert done.status == -signal.SIGKILL
    elif fault == "SIGTERM":
        assert done.status == 3, done.stderr
    else:
        assert done.status == 2
        assert done.stderr.startswith("batchllm: out of memory")
        assert ("what is done is safe in" in done.stderr) == bool(recorded)
    assert len(recorded) == {"idle": 0, "finalising": NUM_ROWS}.get(phase, len(recorded))
    assert phase != "decode" or AT - 256 <= len(recorded) < NUM_ROWS
    job.log.take()
    job.go_on(recorded, "-o", out, out=out)
    assert [line["text"] for line in read_lines(out)] == [f"after {i}" for i in range(NUM_ROWS)]
    check_nothing_left(job, shared_memory)


@pytest.mark.parametrize("phase", phases_of(_ENGINE))
def test_an_engine_that_dies_is_replaced_and_no_row_is_lost(job: FaultyJob, phase: str) -> None:
    """In the same run; rows that had an answer are not asked again."""
    shared_memory, out = ownerless(), job.base / "out.jsonl"
    job.run("-i", job.source, "-o", out, batch=10, fault="death", **MOMENTS[phase]).check(0)
    asked = job.log.take()
    assert asked.pop("start") == 2
    assert set(asked) == {str(i) for i in range(NUM_ROWS)}
    answered = AT if phase == "decode" else 0
    assert sum(times > 1 for times in asked.values()) <= NUM_ROWS - answered
    assert max(asked.values()) <= 2
    assert [line["id"] for line in read_lines(out)] == IDS
    assert [kind for _, kind, _ in status_of(Path(f"{out}.job")).events] == ["start", "engine_death", "end"]
    check_nothing_left(job, shared_memory)


def test_a_disk_that_is_full_before_anything_is_asked_stops_the_job(tmp_path: Path) -> None:
    run_with_mounts(fill_when_idle, tmp_path, size="2m")


def fill_when_idle(base: Path) -> None:
    """It says so, and keeps nothing that was not there."""
    job = FaultyJob(base)
    out = job.disk / "out.jsonl"
    said = job.fail("-o", out, do=job.fill, moment="start")
    assert "the disk is full" in said or "No space left on device" in said
    assert os.listdir(job.disk) == ["filler"]
    job.filler.unlink()
    job.go_on(set(), "-o", out, out=out)


def test_a_job_folder_that_goes_before_anything_is_asked_is_missed(job: FaultyJob) -> None:
    out = job.base / "out.jsonl"
    said = job.fail("-o", out, do=f"rm -r {out}.job", moment="start")
    assert "deleted, moved or replaced" in said
    job.go_on(set(), "-o", out, out=out)


@pytest.mark.parametrize("by_s", [-9 * HOUR_S, 9 * HOUR_S], ids=["back", "on"])
@pytest.mark.parametrize("phase", MOMENTS)
def test_a_clock_that_is_set_changes_nothing_of_a_job(job: FaultyJob, phase: str, by_s: int) -> None:
    """Every row is answered by one run, and speeds are those of the seconds that it took."""
    shared_memory, out, progress = ownerless(), job.base / "out.jsonl", job.base / "tmp" / "p.jsonl"
    flags = ("-i", job.source, "-o", out, "--progress-file", progress)
    job.run(*flags, batch=10, fault=f"clock{by_s}", **MOMENTS[phase]).check(0)
    assert [line["id"] for line in read_lines(out)] == IDS
    told = [line["elapsed_s"] for line in read_lines(progress)]
    assert told == sorted(told)
    status = status_of(Path(f"{out}.job"))
    assert status.num_finished == NUM_ROWS
    for elapsed_s in (told[-1], status.whole_speed.elapsed_s, status.recent_speed.elapsed_s):
        assert 0 <= elapsed_s < HOUR_S
    progress.unlink()
    check_nothing_left(job, shared_memory)
