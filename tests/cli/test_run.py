"""``batchllm run``, stopped, killed and called again: every row once, nothing done twice, and words that help."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.instant_engine import ABORTED
from tests.cli.jobs import (
    SubmissionLog,
    arguments_of,
    batchllm,
    ids_of,
    lines_of,
    read_lines,
    recorded_rows,
    rows_of,
    status_of,
    write_rows,
)

STOP = "kill -TERM $PPID"
NUM_ROWS = 200
IDS = [f"r{i}" for i in range(NUM_ROWS)]


@pytest.fixture
def log(tmp_path: Path) -> SubmissionLog:
    return SubmissionLog(tmp_path / "log.txt")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", rows_of(NUM_ROWS))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def job_of(out: Path) -> Path:
    return Path(f"{out}.job")


def stop_job(command: Command, source: Path, out: Path, *flags: str | Path) -> set[int]:
    """Runs a job that is stopped after 60 answers; returns the rows that are recorded."""
    done = command("run", "-i", source, "-o", out, *flags, batch=10, at=60, do=STOP).check(3)
    recorded = recorded_rows(job_of(out))
    assert 60 <= len(recorded) < NUM_ROWS
    assert f"{len(recorded)} of {NUM_ROWS} rows have their result" in done.stderr
    return recorded


# Stopped, and gone on with


def test_a_stopped_job_says_how_far_it_is_and_how_to_go_on(command: Command, source: Path, out: Path) -> None:
    done = command("run", "-i", source, "-o", out, batch=10, at=60, do=STOP).check(3)
    recorded = recorded_rows(job_of(out))
    assert 60 <= len(recorded) < NUM_ROWS
    assert f"stopped by SIGTERM: {len(recorded)} of {NUM_ROWS} rows have their result" in done.stderr
    assert "run the same command again to go on" in done.stderr
    assert not out.exists()


def test_a_second_signal_ends_a_job_whose_answers_do_not_come(source: Path, out: Path) -> None:
    """With all the grace there is: the rows of the first answers are kept."""
    done = batchllm(
        *("run", "-i", source, "-o", out, "--grace", "1000"),
        batch=10, stuck_after=60, at=60, do=f"{STOP}; sleep 0.1; {STOP}",
    )  # fmt: skip
    assert "stopped by SIGTERM: 60 of 200" in done.check(3).stderr
    assert len(recorded_rows(job_of(out))) == 60


def test_the_journal_says_how_each_run_has_ended(command: Command, source: Path, out: Path) -> None:
    """Also one that ends while its engine starts, when nobody looks out for a signal."""
    stop_job(command, source, out)
    batchllm("run", "-i", source, "-o", out, moment="start", do=STOP).check(3)
    command("run", "-i", source, "-o", out, fails=1).check(2)
    command("run", "-i", source, "-o", out).check(0)
    events = [(kind, detail) for _, kind, detail in status_of(job_of(out)).events]
    assert [kind for kind, _ in events] == ["start", "stop", "start", "stop", "start", "error", "start", "end"]
    assert [events[i][1] for i in (1, 3, 5)] == ["SIGTERM", "SIGTERM", "the engine did not start"]


def test_without_grace_what_runs_is_given_up(command: Command, source: Path, out: Path) -> None:
    command("run", "-i", source, "-o", out, "--grace", "0", batch=10, stuck_after=60, at=60, do=STOP).check(3)
    assert len(recorded_rows(job_of(out))) == 60
    command("run", "-i", source, "-o", out).check(0)
    assert ids_of(out) == IDS


def test_rows_in_finishing_order_are_each_in_the_output_once_over_a_stop(
    command: Command, source: Path, out: Path
) -> None:
    """What the first run has written stays in front, and what a run wrote halfway is mended."""
    stop_job(command, source, out, "--order", "finished")
    first = ids_of(out)
    assert len(first) >= 60
    out.write_bytes(out.read_bytes()[:-7])
    command("run", "-i", source, "-o", out, "--order", "finished").check(0)
    assert ids_of(out)[: len(first)] == first
    assert sorted(ids_of(out)) == sorted(IDS)


def test_a_finished_job_run_again_starts_no_engine_and_writes_its_output_again(
    command: Command, source: Path, out: Path, log: SubmissionLog
) -> None:
    command("run", "-i", source, "-o", out).check(0)
    first = out.read_bytes()
    out.unlink()
    command("run", "-i", source, "-o", out, log=log.path).check(0)
    assert out.read_bytes() == first
    assert not log.take()


def test_restart_runs_every_row_again(command: Command, source: Path, out: Path, log: SubmissionLog) -> None:
    stop_job(command, source, out)
    command("run", "-i", source, "-o", out, "--restart", log=log.path).check(0)
    assert log.take() == {"start": 1, **{str(i): 1 for i in range(NUM_ROWS)}}


def test_restart_with_a_wrong_input_forgets_nothing(command: Command, source: Path, out: Path) -> None:
    recorded = stop_job(command, source, out)
    done = command("run", "-i", source.with_name("missing"), "-o", out, "--restart").check(2)
    assert "missing: cannot be read" in done.stderr
    assert recorded_rows(job_of(out)) == recorded


def test_two_runs_of_a_job_at_once_are_refused_by_the_first_ones_process(
    source: Path, out: Path, tmp_path: Path
) -> None:
    second = shlex.join(arguments_of(["run", "-i", source, "-o", out]))
    said = tmp_path / "second.txt"
    do = f"echo $PPID > {said}; unset INSTANT_DO; {second} 2>> {said}; echo $? >> {said}"
    batchllm("run", "-i", source, "-o", out, batch=10, at=60, do=do).check(0)
    pid, message, status = said.read_text().splitlines()
    assert f"process {pid} is running the job in this folder already" in message
    assert status == "2"
    assert ids_of(out) == IDS


# The same job, or another one


def test_another_input_in_the_folder_of_a_job_is_refused_by_both_fingerprints(
    command: Command, source: Path, out: Path
) -> None:
    recorded = stop_job(command, source, out)
    write_rows(source, rows_of(NUM_ROWS, first=1))
    done = command("run", "-i", source, "-o", out).check(2)
    assert "results of another job" in done.stderr
    assert done.stderr.count("input was '") == 1
    assert "is now '" in done.stderr
    assert recorded_rows(job_of(out)) == recorded


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--sampling", '{"max_new_tokens": 3}'], "sampling"),
        (["--template", "{id}"], "columns"),
        (["--id-column", "x"], "columns"),
        (["--model", "another"], "model"),
        (["--dtype", "bfloat16"], "engine"),
        (["--dtype=bfloat16"], "engine"),
    ],
)
def test_what_would_change_answers_is_refused_by_name(
    command: Command, source: Path, out: Path, flags: list[str], part: str
) -> None:
    stop_job(command, source, out)
    done = command("run", "-i", source, "-o", out, *flags).check(2)
    assert f"{part} was " in done.stderr
    assert "Give another folder, or --restart" in done.stderr
    command("run", "-i", source, "-o", out).check(0)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("model-path: another", "model"),
        ("dtype: bfloat16", "engine"),
        ("hf-chat-template-name: tools", "engine"),
        ("constrained-json-disable-any-whitespace: true", "engine"),
    ],
)
def test_what_a_file_of_flags_changes_of_the_answers_is_refused_by_name(
    command: Command, source: Path, out: Path, tmp_path: Path, line: str, part: str
) -> None:
    stop_job(command, source, out)
    config = tmp_path / "flags.yaml"
    config.write_text(line)
    assert f"{part} was " in command("run", "-i", source, "-o", out, "--config", config).check(2).stderr
    config.write_text("max-total-tokens: 4096")
    command("run", "-i", source, "-o", out, "--config", config).check(0)


def test_another_adapter_of_the_same_name_is_another_job(
    command: Command, source: Path, out: Path, tmp_path: Path
) -> None:
    """By what is in its folder, however the flag is written."""
    adapters = [tmp_path / "one", tmp_path / "two"]
    for rank, adapter in enumerate(adapters, start=1):
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"r": rank}))
    template = tmp_path / "template.jinja"
    template.write_text("one")
    flags = ("--chat-template", template, "--lora-paths")
    stop_job(command, source, out, *flags, f"a={adapters[0]}")
    refused = command("run", "-i", source, "-o", out, *flags, f"a={adapters[1]}").check(2)
    assert "adapters was " in refused.stderr
    assert "adapters was " in command("run", "-i", source, "-o", out, *flags, f"b={adapters[0]}").check(2).stderr
    template.write_text("two")  # of the same length
    named = json.dumps({"lora_name": "a", "lora_path": str(adapters[0])})
    assert "engine was " in command("run", "-i", source, "-o", out, *flags, named).check(2).stderr
    template.write_text("one")
    command("run", "-i", source, "-o", out, *flags, named).check(0)


def test_what_only_changes_speed_may_change_between_runs(command: Command, source: Path, out: Path) -> None:
    stop_job(command, source, out)
    command("run", "-i", source, "-o", out, "--max-total-tokens", "4096", "--token-memory", "1", "--retry", "1").check(
        0
    )
    assert ids_of(out) == IDS


# Jobs without a folder of their own


def test_a_stopped_job_of_pipes_keeps_its_folder_and_says_how_to_go_on_with_it(
    source: Path, log: SubmissionLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is a temporary one that the same command would not find."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = batchllm("run", "-i", "-", "-o", "-", stdin=source.read_bytes(), batch=10, at=60, do=STOP).check(3)
    assert done.stdout == ""
    folder = Path(done.stderr.partition("--job-dir ")[2].split()[0])
    recorded = recorded_rows(folder)
    assert f"{len(recorded)} of {NUM_ROWS} rows" in done.stderr
    again = batchllm("run", "-i", "-", "-o", "-", "--job-dir", folder, stdin=source.read_bytes(), log=log.path).check(0)
    assert [json.loads(line)["id"] for line in again.stdout.splitlines()] == IDS
    assert set(log.take()) == {"start", *(str(i) for i in range(NUM_ROWS) if i not in recorded)}


def test_standard_output_has_the_answers_and_nothing_else_and_no_folder_is_left(source: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = ["env", f"TMPDIR={temporary}", *arguments_of(["run", "-i", "-", "-o", "-", "--progress"])]
    shell = f"cat {source} | {shlex.join(command)} | cat"
    done = subprocess.run(shell, shell=True, capture_output=True, check=True)
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == IDS
    assert not list(temporary.iterdir())


def test_a_job_that_cannot_begin_leaves_no_temporary_folder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        command("run", "-i", "missing", "-o", "-").check(2)
        command("run", "-i", empty, "-o", "-").check(2)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_a_place_that_cannot_be_had_is_refused_in_words(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No temporary folder, a name that is too long for a folder, a standard output that is closed."""
    assert "File name too long" in command("run", "-i", source, "-o", tmp_path / ("x" * 253)).check(2).stderr
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "none"))
        assert "--job-dir" in command("run", "-i", source, "-o", "-").check(2).stderr
    closed = f"{shlex.join(arguments_of(['run', '-i', source, '-o', '-']))} >&-"
    done = subprocess.run(closed, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "batchllm: -o -: standard output is closed; give a path\n")


def test_nobody_to_be_told_changes_nothing_of_the_answers(source: Path, tmp_path: Path) -> None:
    for redirection in ("2>&-", "2> /dev/full"):
        shell = (
            f"{shlex.join(arguments_of(['run', '-i', source, '-o', '-', '--job-dir', tmp_path / 'job']))} {redirection}"
        )
        done = subprocess.run(shell, shell=True, stdout=subprocess.PIPE, check=True)
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == IDS


def test_a_reader_of_standard_output_that_goes_loses_nothing(source: Path, tmp_path: Path) -> None:
    """The answers are kept, and it is said where."""
    folder = tmp_path / "job"
    command = arguments_of(["run", "-i", source, "-o", "-", "--order", "finished", "--job-dir", folder])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stderr is not None
        driver.stdout.close()
        said = driver.stderr.read()
    assert driver.returncode == 2
    assert "Traceback" not in said
    assert str(folder) in said
    assert recorded_rows(folder)


def test_another_standard_input_in_the_folder_of_a_job_is_refused_and_spoils_nothing(
    source: Path, tmp_path: Path
) -> None:
    """The job's own input stays, for `retry`."""
    out, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.job"
    rows = [*rows_of(20), {"id": "bad", "input_ids": [ABORTED]}]
    batchllm("run", "-i", "-", "-o", out, stdin=lines_of(rows)).check(1)
    done = batchllm("run", "-i", "-", "-o", out, stdin=source.read_bytes()).check(2)
    assert "input was " in done.stderr
    batchllm("retry", folder).check(1)
    assert len(read_lines(out)) == 21


# Rows that fail


def test_exit_statuses_tell_answered_failed_and_impossible_jobs_apart(
    command: Command, source: Path, out: Path, tmp_path: Path
) -> None:
    command("run", "-i", source, "-o", out).check(0)
    bad = write_rows(tmp_path / "bad.jsonl", [*rows_of(3), "{broken", {"id": "x", "input_ids": [ABORTED]}])
    done = command("run", "-i", bad, "-o", tmp_path / "bad_out.jsonl").check(1)
    assert "batchllm: line 4: invalid JSON" in done.stderr
    assert "batchllm: line 5: out of luck" in done.stderr
    for arguments in (["-i", tmp_path / "none"], ["-i", tmp_path], ["-i", bad, "--token-memory", "0"]):
        command("run", "-o", tmp_path / "no.jsonl", *arguments).check(2)
    assert not (tmp_path / "no.jsonl.job").exists()


@pytest.mark.parametrize("flag", ["--report", "--trace", "--progress-file"])
def test_a_file_about_the_run_does_not_take_the_place_of_the_answers(
    command: Command, source: Path, out: Path, flag: str
) -> None:
    assert f"{flag} {out}: is what -o writes" in command("run", "-i", source, "-o", out, flag, out).check(2).stderr
    other = out.with_name("other")
    command("run", "-i", source, "-o", out, "--errors", other, flag, other).check(2)
    assert not out.exists() and not other.exists()
    bad = write_rows(out.with_name("bad.jsonl"), [*rows_of(3), {"id": "x", "input_ids": [ABORTED]}])
    command("run", "-i", bad, "-o", out).check(1)
    if flag == "--progress-file":
        assert "is what -o writes" in command("retry", job_of(out), flag, out).check(2).stderr
        assert len(read_lines(out)) == 4


@pytest.mark.parametrize("flag", ["--errors", "--report", "--trace", "--progress-file"])
def test_the_jobs_folder_does_not_take_the_place_of_a_file(
    command: Command, source: Path, out: Path, flag: str
) -> None:
    """Told before anything runs, not when the answers are to be written."""
    done = command("run", "-i", source, "-o", out, flag, job_of(out)).check(2)
    assert f"{flag} {job_of(out)}: is the job's folder" in done.stderr
    done = command("run", "-i", source, "-o", out, "--job-dir", out).check(2)
    assert f"-o {out}: is the job's folder" in done.stderr
    assert not out.exists() and not job_of(out).exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e-30"])
def test_memory_that_is_no_amount_is_refused_by_flag(command: Command, source: Path, out: Path, value: str) -> None:
    assert "--token-memory" in command("run", "-i", source, "-o", out, "--token-memory", value).check(2).stderr
    assert not job_of(out).exists()


def test_one_failure_too_many_ends_the_job_and_a_higher_limit_goes_on(
    command: Command, out: Path, tmp_path: Path, log: SubmissionLog
) -> None:
    rows = rows_of(NUM_ROWS)
    for row in rows[::5]:
        row["input_ids"][-1] = ABORTED
    source = write_rows(tmp_path / "in.jsonl", rows)
    done = command("run", "-i", source, "-o", out, "--max-failures", "3", batch=10).check(2)
    assert "--max-failures 3: 4 rows have failed" in done.stderr
    num_recorded = len(recorded_rows(job_of(out)))
    assert num_recorded < NUM_ROWS
    command("run", "-i", source, "-o", out, "--max-failures", "100", log=log.path).check(1)
    assert log.take().total() - 1 == NUM_ROWS - num_recorded
    assert ids_of(out) == IDS


def test_a_row_that_fails_is_run_again_as_often_as_asked(
    command: Command, out: Path, tmp_path: Path, log: SubmissionLog
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [*rows_of(3), {"id": "x", "input_ids": [ABORTED]}])
    command("run", "-i", source, "-o", out, "--retry", "2", log=log.path).check(1)
    assert log.take() == {"start": 1, "0": 1, "1": 1, "2": 1, str(ABORTED): 3}


def test_failed_rows_go_to_a_file_of_their_own(command: Command, out: Path, tmp_path: Path) -> None:
    errors = tmp_path / "err.jsonl"
    source = write_rows(tmp_path / "in.jsonl", [*rows_of(3), "{", {"id": "x", "input_ids": [ABORTED]}])
    command("run", "-i", source, "-o", out, "--errors", errors).check(1)
    assert ids_of(out) == ["r0", "r1", "r2"]
    assert [line["error"]["line"] for line in read_lines(errors)] == [4, 5]
