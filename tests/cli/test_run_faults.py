"""``batchllm run`` on disks that are full, read-only or gone: it ends with one message that helps, and goes on later.

What was in the journal when it ended is not run again, unless the journal itself was taken away.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.jobs import ids_of, lines_of, recorded_rows, rows_of, write_rows
from tests.faulty_job import AT, IDS, NUM_ROWS, FaultyJob
from tests.mounted_disk import mount, run_with_mounts


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyJob:
    return FaultyJob(tmp_path)


# Folders that go


def test_an_output_folder_that_goes_at_the_end_is_named_and_made_again_it_gets_the_answers(faulty: FaultyJob) -> None:
    out, job = faulty.disk / "out.jsonl", faulty.base / "job"
    said = faulty.fail("-o", out, "--job-dir", job, do=f"rmdir {faulty.disk}")
    assert f"-o {out}: cannot be written: No such file or directory" in said
    assert f"what is done is safe in {job}; run the same command again to go on" in said
    assert recorded_rows(job) == set(range(NUM_ROWS))
    assert "there is no directory" in faulty.run("-i", faulty.source, "-o", out, "--job-dir", job).check(2).stderr
    faulty.disk.mkdir()
    faulty.go_on(set(range(NUM_ROWS)), "-o", out, "--job-dir", job, out=out)


@pytest.mark.parametrize("removed", ["disk", "disk/out.jsonl.job"])
def test_a_job_folder_that_is_removed_is_missed_and_the_job_begins_anew(faulty: FaultyJob, removed: str) -> None:
    out = faulty.disk / "out.jsonl"
    said = faulty.fail("-o", out, do=f"rm -r {faulty.base / removed}")
    assert "deleted, moved or replaced while the job was running" in said
    assert "begins anew" in said
    assert "what is done is safe" not in said
    faulty.disk.mkdir(exist_ok=True)
    faulty.go_on(set(), "-o", out, out=out)


def test_a_job_folder_that_is_removed_before_any_result_is_missed_too(faulty: FaultyJob) -> None:
    """The copy of standard input is in it."""
    out = faulty.disk / "out.jsonl"
    done = faulty.run("-i", "-", "-o", out, stdin=lines_of(rows_of(20)), at=0, do=f"rm -r {out}.job")
    assert "deleted, moved or replaced" in done.check(2).stderr


def test_a_job_folder_that_was_moved_goes_on_when_it_is_put_back(faulty: FaultyJob) -> None:
    out, job = faulty.disk / "out.jsonl", faulty.disk / "out.jsonl.job"
    said = faulty.fail("-o", out, do=f"mv {job} {faulty.base / 'away'}")
    assert "Put the whole folder back and run the same command to go on" in said
    (faulty.base / "away").rename(job)
    recorded = recorded_rows(job)
    assert len(recorded) >= 256
    faulty.go_on(recorded, "-o", out, out=out)


def test_an_input_that_goes_in_flight_has_been_read(faulty: FaultyJob) -> None:
    """The run ends well; the next one needs the input, for the order of its lines."""
    out = faulty.disk / "out.jsonl"
    faulty.run("-i", faulty.source, "-o", out, batch=10, at=AT, do=f"rm {faulty.source}").check(0)
    assert ids_of(out) == IDS
    assert f"-i {faulty.source}: cannot be read" in faulty.run("-i", faulty.source, "-o", out).check(2).stderr
    assert ids_of(out) == IDS


def test_an_input_that_is_replaced_in_flight_is_answered_as_it_was_and_not_mixed_with_the_new_one(
    faulty: FaultyJob,
) -> None:
    out, other = faulty.disk / "out.jsonl", write_rows(faulty.base / "other.jsonl", rows_of(5))
    do = f"mv {other} {faulty.source}; kill -TERM $PPID"
    faulty.run("-i", faulty.source, "-o", out, batch=10, at=AT, do=do).check(3)
    said = faulty.run("-i", faulty.source, "-o", out).check(2).stderr
    assert "results of another job" in said
    assert "input was " in said
    recorded = recorded_rows(Path(f"{out}.job"))
    faulty.log.take()
    write_rows(faulty.source, rows_of(NUM_ROWS))
    faulty.go_on(recorded, "-o", out, out=out)


# Disks that refuse


def test_a_disk_that_runs_full_under_output_and_job_stops_it_and_room_lets_it_go_on(tmp_path: Path) -> None:
    run_with_mounts(fill_under_all, tmp_path, size="2m")


def fill_under_all(base: Path) -> None:
    faulty = FaultyJob(base)
    out, job = faulty.disk / "out.jsonl", faulty.disk / "out.jsonl.job"
    said = faulty.fail("-o", out, do=faulty.fill)
    recorded = recorded_rows(job)
    assert len(recorded) >= 256
    for expected in ("the disk is full", f"{len(recorded)} rows are safe", "run the same command to go on"):
        assert expected in said
    assert "cannot write in" in faulty.run("-i", faulty.source, "-o", out).check(2).stderr  # it is full still
    faulty.filler.unlink()
    faulty.go_on(recorded, "-o", out, out=out)


def test_a_disk_that_runs_full_under_the_job_alone_is_told_by_the_job_s_folder(tmp_path: Path) -> None:
    run_with_mounts(fill_under_job, tmp_path, size="2m")


def fill_under_job(base: Path) -> None:
    faulty = FaultyJob(base)
    out, job = faulty.base / "out.jsonl", faulty.disk / "job"
    said = faulty.fail("-o", out, "--job-dir", job, do=faulty.fill)
    assert str(job) in said
    assert "the disk is full" in said
    recorded = recorded_rows(job)
    faulty.filler.unlink()
    faulty.go_on(recorded, "-o", out, "--job-dir", job, out=out)


def test_a_disk_full_before_the_first_result_leaves_nothing_half_begun(tmp_path: Path) -> None:
    run_with_mounts(fill_at_first, tmp_path, size="2m")


def fill_at_first(base: Path) -> None:
    faulty = FaultyJob(base)
    out, job = faulty.base / "out.jsonl", faulty.disk / "job"
    said = faulty.fail("-o", out, "--job-dir", job, do=faulty.fill, at=0)
    assert "the disk is full" in said
    assert not job.exists()
    subprocess.run(f"cat /dev/zero >> {faulty.filler} 2> /dev/null", shell=True, check=False)  # where it has been
    said = faulty.run("-i", faulty.source, "-o", out, "--job-dir", job).check(2).stderr
    assert "nothing has been recorded" in said
    rows = lines_of(rows_of(NUM_ROWS))
    assert "-i -: cannot be copied" in faulty.run("-i", "-", "-o", out, "--job-dir", job, stdin=rows).check(2).stderr
    assert list(faulty.disk.rglob("stdin*")) == []
    faulty.filler.unlink()
    faulty.log.take()
    faulty.go_on(set(), "-o", out, "--job-dir", job, out=out)


@pytest.mark.parametrize("order", ["input", "finished"])
def test_a_disk_full_under_the_output_alone_keeps_all_results(tmp_path: Path, order: str) -> None:
    run_with_mounts({"input": fill_under_output, "finished": fill_under_growing_output}[order], tmp_path, size="2m")


def fill_under_output(base: Path) -> None:
    """Written at the end: nothing of it is left, and no engine is needed for it again."""
    faulty = FaultyJob(base)
    out, job = faulty.disk / "out.jsonl", faulty.base / "job"
    said = faulty.fail("-o", out, "--job-dir", job, do=faulty.fill)
    assert f"-o {out}: cannot be written: No space left on device" in said
    assert f"safe in {job}; run the same command again to go on" in said
    assert [path.name for path in faulty.disk.iterdir()] == ["filler"]
    faulty.filler.unlink()
    faulty.go_on(set(range(NUM_ROWS)), "-o", out, "--job-dir", job, out=out)


def fill_under_growing_output(base: Path) -> None:
    """Written as rows finish: the run stops, and the next one writes the lines that are missing."""
    faulty = FaultyJob(base)
    out, job = faulty.disk / "out.jsonl", faulty.base / "job"
    flags = ("-o", out, "--job-dir", job, "--order", "finished")
    said = faulty.fail(*flags, do=faulty.fill)
    assert f"-o {out}: cannot be written: No space left on device" in said
    recorded = recorded_rows(job)
    assert 256 <= len(recorded) < NUM_ROWS
    faulty.filler.unlink()
    faulty.go_on(recorded, *flags, out=out)


def test_a_disk_that_becomes_read_only_in_flight_keeps_all_results(tmp_path: Path) -> None:
    run_with_mounts(make_output_read_only, tmp_path, size="2m")


def make_output_read_only(base: Path) -> None:
    faulty = FaultyJob(base)
    out, job = faulty.disk / "out.jsonl", faulty.base / "job"
    said = faulty.fail("-o", out, "--job-dir", job, do=f"mount -o remount,ro {faulty.disk}")
    assert f"-o {out}: cannot be written: Read-only file system" in said
    again = faulty.run("-i", faulty.source, "-o", out, "--job-dir", job).check(2)
    assert "cannot write in" in again.stderr
    other = faulty.base / "other.jsonl"
    assert "Read-only" in faulty.run("-i", faulty.source, "-o", other, "--job-dir", faulty.disk / "new").check(2).stderr
    assert not other.exists()
    mount(faulty.disk, "-o", "remount,rw")
    faulty.go_on(set(range(NUM_ROWS)), "-o", out, "--job-dir", job, out=out)


def test_a_job_whose_folder_becomes_read_only_goes_on_when_it_can_be_written_again(tmp_path: Path) -> None:
    run_with_mounts(make_job_read_only, tmp_path, size="2m")


def make_job_read_only(base: Path) -> None:
    """The kernel lets what is open be written until it is remounted by force; the run is killed before that."""
    faulty = FaultyJob(base)
    out, job = faulty.base / "out.jsonl", faulty.disk / "job"
    faulty.run("-i", faulty.source, "-o", out, "--job-dir", job, batch=10, at=AT, do="kill -KILL $PPID")
    recorded = recorded_rows(job)
    assert len(recorded) >= 256
    mount(faulty.disk, "-o", "remount,ro")
    said = faulty.run("-i", faulty.source, "-o", out, "--job-dir", job).check(2).stderr
    assert "Read-only file system; the job's folder must be writable" in said
    rows = faulty.source.read_bytes()
    assert "-i -: cannot be copied" in faulty.run("-i", "-", "-o", out, "--job-dir", job, stdin=rows).check(2).stderr
    mount(faulty.disk, "-o", "remount,rw")
    faulty.log.take()
    faulty.go_on(recorded, "-o", out, "--job-dir", job, out=out)


def test_what_does_not_fit_beside_the_journal_is_told_and_begins_nothing(tmp_path: Path) -> None:
    run_with_mounts(carry_too_much, tmp_path, size="1m")


def carry_too_much(base: Path) -> None:
    """Carried columns wait on disk for their answers."""
    faulty = FaultyJob(base)
    out, job = faulty.base / "out.jsonl", faulty.disk / "job"
    write_rows(faulty.source, [row | {"pad": "x" * 2000} for row in rows_of(NUM_ROWS)])
    said = faulty.fail("-o", out, "--job-dir", job, "--carry", "pad", do="true")
    assert f"{job}: No space left on device; make room there" in said
    assert not job.exists()
    mount(faulty.disk, "-o", "remount,size=32m")
    faulty.go_on(set(), "-o", out, "--job-dir", job, "--carry", "pad", out=out)


def test_progress_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    run_with_mounts(fill_under_progress, tmp_path, size="2m")


def fill_under_progress(base: Path) -> None:
    faulty = FaultyJob(base)
    out, progress = faulty.base / "out.jsonl", faulty.disk / "p.jsonl"
    flags = ("-i", faulty.source, "-o", out, "--progress-file", progress)
    # Lines of progress until the last page is full too.
    done = faulty.run(*flags, batch=10, at=AT, do=f"{faulty.fill}; cat /dev/zero >> {progress} 2> /dev/null").check(0)
    assert f"--progress-file {progress}: No space left on device; going on without it" in done.stderr
    assert ids_of(out) == IDS
