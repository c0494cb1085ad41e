"""``batchllm retry`` and ``status``: what failed runs again, from anywhere, and a job's folder says how far it is."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.cli.instant_engine import ABORTED
from tests.cli.jobs import SubmissionLog, arguments_of, batchllm, ids_of, lines_of, read_lines, rows_of, write_rows

NUM_ROWS = 100
STOP = "kill -TERM $PPID"


@pytest.fixture
def log(tmp_path: Path) -> SubmissionLog:
    return SubmissionLog(tmp_path / "log.txt")


def rows_with_failures() -> list[Any]:
    """Row 3 cannot be read, row 5 fails when it runs; the others are answered."""
    rows: list[Any] = list(rows_of(NUM_ROWS))
    rows[3] = "{broken"
    rows[5] = {"id": "r5", "input_ids": [ABORTED]}
    return rows


IDS = [None if i == 3 else f"r{i}" for i in range(NUM_ROWS)]


def status_json(command: Command, folder: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(command("status", folder, "--json").check(0).stdout)
    return shown


def test_retry_runs_only_what_failed_and_writes_the_output_again(
    command: Command, tmp_path: Path, log: SubmissionLog
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_with_failures()), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out).check(1)
    first = read_lines(out)
    out.unlink()
    command("retry", f"{out}.job", log=log.path).check(1)
    assert log.take() == {"start": 1, str(ABORTED): 1}
    assert read_lines(out) == first
    assert ids_of(out) == IDS


def test_retry_works_from_another_folder_with_the_flags_of_the_run(tmp_path: Path, log: SubmissionLog) -> None:
    """Relative paths are those of the run, and so are its template and its errors' file."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    write_rows(home / "in.jsonl", rows_with_failures())
    batchllm("run", "-i", "in.jsonl", "-o", "out.jsonl", "--errors", "err.jsonl", "--carry", "id", cwd=home).check(1)
    (home / "err.jsonl").unlink()
    batchllm("retry", "../home/out.jsonl.job", cwd=elsewhere, log=log.path).check(1)
    assert log.take() == {"start": 1, str(ABORTED): 1}
    assert not list(elsewhere.iterdir())
    assert [line["error"]["line"] for line in read_lines(home / "err.jsonl")] == [4, 6]
    assert read_lines(home / "out.jsonl")[0]["carried"] == {"id": "r0"}


def test_retry_of_standard_input_reads_the_job_s_copy(tmp_path: Path, log: SubmissionLog) -> None:
    out = tmp_path / "out.jsonl"
    batchllm("run", "-i", "-", "-o", out, stdin=lines_of(rows_with_failures())).check(1)
    batchllm("retry", f"{out}.job", log=log.path).check(1)
    assert log.take() == {"start": 1, str(ABORTED): 1}
    assert ids_of(out) == IDS


def test_retry_takes_its_own_flags_of_a_run(command: Command, tmp_path: Path, log: SubmissionLog) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_with_failures()), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out).check(1)
    done = command("retry", f"{out}.job", "--max-failures", "0").check(2)
    assert "--max-failures 0: 1 rows have failed" in done.stderr
    command("retry", f"{out}.job", "--retry", "3", log=log.path).check(1)
    assert log.take()[str(ABORTED)] == 4


def test_retry_of_a_stopped_job_runs_what_is_left_too(command: Command, tmp_path: Path, log: SubmissionLog) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_with_failures()), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out, batch=10, at=40, do=STOP).check(3)
    command("retry", f"{out}.job", log=log.path).check(1)
    assert 2 < log.take().total() < NUM_ROWS
    assert ids_of(out) == IDS


def test_retry_of_a_job_without_failures_starts_no_engine(command: Command, tmp_path: Path, log: SubmissionLog) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(5)), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out).check(0)
    command("retry", f"{out}.job", log=log.path).check(0)
    assert not log.take()


def test_a_retry_that_cannot_run_leaves_the_failures_as_they_are(command: Command, tmp_path: Path) -> None:
    """An output that cannot be written, an input that has changed, an engine that does not start."""
    source, out = write_rows(tmp_path / "in.jsonl", rows_with_failures()), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out).check(1)
    before = status_json(command, Path(f"{out}.job"))
    assert before["num_failed"] > 0
    out.unlink()
    out.mkdir()
    command("retry", f"{out}.job").check(2)
    out.rmdir()
    text = source.read_text()
    source.write_text(text + "\n")
    command("retry", f"{out}.job").check(2)
    source.write_text(text)
    command("retry", f"{out}.job", fails=1).check(2)
    after = status_json(command, Path(f"{out}.job"))
    assert (after["num_failed"], after["failures"]) == (before["num_failed"], before["failures"])


def test_retry_and_status_where_there_is_no_job_say_so(command: Command, tmp_path: Path) -> None:
    for name in ("retry", "status"):
        assert "no job has been run in this folder" in command(name, tmp_path).check(2).stderr
    assert not list(tmp_path.iterdir())


# Status


def test_status_while_a_job_runs_names_its_process_and_counts_what_is_safe(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_with_failures()), tmp_path / "out.jsonl"
    words, numbers, pid = (tmp_path / name for name in ("words.txt", "numbers.json", "pid.txt"))
    show = shlex.join(arguments_of(["status", f"{out}.job"]))
    do = f"unset INSTANT_DO; echo $PPID > {pid}; {show} > {words}; {show} --json > {numbers}"
    batchllm("run", "-i", source, "-o", out, batch=10, delay_s=0.1, at=50, do=do).check(1)
    running = pid.read_text().strip()
    assert f"state    running, process {running}" in words.read_text()
    assert re.search(rf"rows     \d+ of {NUM_ROWS} rows have their result", words.read_text())
    told = json.loads(numbers.read_text())
    assert told["writer_pid"] == int(running)
    assert told["notes"]["num_rows"] == NUM_ROWS
    assert 0 < told["num_finished"] < NUM_ROWS


def test_status_of_a_stopped_job_says_how_it_goes_on_and_of_a_finished_one_that_it_is_done(
    command: Command, tmp_path: Path
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_with_failures()), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out, batch=10, at=40, do=STOP).check(3)
    told = status_json(command, Path(f"{out}.job"))
    assert told["writer_pid"] is None
    assert 40 <= told["num_finished"] < NUM_ROWS
    words = command("status", f"{out}.job").check(0).stdout
    assert "not running; the command that began it goes on with it" in words
    assert "stop SIGTERM" in words
    command("run", "-i", source, "-o", out).check(1)
    told = status_json(command, Path(f"{out}.job"))
    assert (told["num_finished"], told["num_failed"]) == (NUM_ROWS, 2)
    assert {kind["code"]: kind["num_rows"] for kind in told["failures"]} == {"aborted": 1, "invalid_json": 1}
    words = command("status", f"{out}.job").check(0).stdout
    assert "state    done" in words
    assert "row 6: out of luck" in words


@pytest.mark.parametrize(
    ("command_line", "damage"),
    [
        ("status", "UPDATE total SET num_failed = NULL"),
        ("status", "UPDATE event SET at = 1e300"),
        ("status", "UPDATE note SET value = '\"x\"' WHERE key = 'num_rows'"),
        ("retry", "UPDATE job SET command = '{}'"),
        ("retry", "UPDATE job SET command = '[]'"),
        ("retry", 'UPDATE job SET command = \'{"flags": {}, "server_flags": []}\''),
        ("retry", 'UPDATE job SET command = \'{"flags": 1, "server_flags": 2}\''),
    ],
)
def test_a_journal_that_says_something_else_than_was_written_is_called_damaged(
    command: Command, tmp_path: Path, command_line: str, damage: str
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows_of(5)), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out).check(0)
    with contextlib.closing(sqlite3.connect(tmp_path / "out.jsonl.job" / "journal.db")) as database:
        assert database.execute(damage).rowcount > 0
        database.commit()
    done = command(command_line, f"{out}.job").check(2)
    assert "the file is damaged" in done.stderr
