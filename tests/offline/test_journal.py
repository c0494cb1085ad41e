"""What a journal has counted as safe is there, once, with its bytes; whoever asks does not disturb the writer."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import ConfigError, JournalError
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.journal import MAX_COMMIT_AGE_S, NUM_EXAMPLES, NUM_ROWS_PER_COMMIT, Journal, read_status

FINGERPRINT = Fingerprint({"model": "m", "input": "i"})


def create(folder: Path) -> Journal:
    return Journal.create(folder, fingerprint=FINGERPRINT, command={"model": "m", "n": 1})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ROWS = st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=60)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, order=st.randoms(use_true_random=False), commit_every=st.integers(1, 9))
def test_results_come_back_by_row_and_as_they_finished(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[bytes, bool]],
    order: object,
    commit_every: int,
) -> None:
    """Both orders, all three selections, in the journal that wrote them and in one that opens it later."""
    finishing = list(range(len(rows)))
    order.shuffle(finishing)  # hypothesis' Random
    folder = tmp_path_factory.mktemp("job")
    with create(folder) as journal:
        for number, index in enumerate(finishing):
            journal.append(index, rows[index][0], is_failed=rows[index][1])
            if number % commit_every == 0:
                journal.commit()
    with Journal.open(folder) as journal:
        assert journal.num_rows == len(rows)
        assert journal.finished().tolist() == finishing
        assert sorted(journal.failed().tolist()) == [index for index, row in enumerate(rows) if row[1]]
        for failed in (None, True, False):
            wanted = [index for index in finishing if failed in (None, rows[index][1])]
            assert list(journal.results("finished", failed=failed)) == [rows[index][0] for index in wanted]
            assert list(journal.results("input", failed=failed)) == [rows[index][0] for index in sorted(wanted)]


def test_a_journal_remembers_its_job(tmp_path: Path) -> None:
    with create(tmp_path / "new" / "job") as journal:
        journal.note("num_rows", 3)
        journal.note("num_rows", 4)
        journal.note("created", "today")
    with Journal.open(tmp_path / "new" / "job") as journal:
        assert journal.fingerprint == FINGERPRINT
        assert journal.command == {"model": "m", "n": 1}
        assert journal.notes == {"num_rows": 4, "created": "today"}
        assert journal.recovery is None


def test_commits_are_due_by_number_and_by_age(tmp_path: Path) -> None:
    with create(tmp_path) as journal:
        assert not journal.is_due(time.monotonic() + 1e9)
        journal.append(0, b"")
        appended_at = time.monotonic()
        assert not journal.is_due(appended_at - MAX_COMMIT_AGE_S)
        assert journal.is_due(appended_at + MAX_COMMIT_AGE_S)
        for index in range(1, NUM_ROWS_PER_COMMIT):
            assert not journal.is_due(0.0)
            journal.append(index, b"")
        assert journal.is_due(0.0)
        assert journal.commit() == NUM_ROWS_PER_COMMIT
        assert not journal.is_due(time.monotonic() + 1e9)


def test_a_commit_of_nothing_leaves_the_disk_alone(tmp_path: Path) -> None:
    with create(tmp_path) as journal:
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert journal.commit() == 0
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_failures_set_aside_have_no_result_and_come_back_unless_they_are_forgotten(tmp_path: Path) -> None:
    with create(tmp_path) as journal:
        for index in range(6):
            journal.append(index, b"%d" % index, is_failed=index % 2 == 1, code="c", num_output_tokens=1)
        journal.set_failed_aside()
        assert journal.finished().tolist() == [0, 2, 4]
        assert journal.num_rows == 3
        journal.append(1, b"again")  # it has a new result
    with Journal.open(tmp_path) as journal:
        assert journal.num_rows == 6
        assert list(journal.results("input")) == [b"0", b"again", b"2", b"3", b"4", b"5"]
        assert sorted(journal.failed().tolist()) == [3, 5]
        journal.set_failed_aside()
        journal.forget_aside()
        journal.append(3, b"new")
    status = read_status(tmp_path)
    assert (status.num_finished, status.num_failed, status.num_output_tokens) == (5, 0, 3)
    assert status.failures == []
    with Journal.open(tmp_path) as journal:
        assert sorted(journal.finished().tolist()) == [0, 1, 2, 3, 4]


def test_failures_set_aside_by_a_process_that_was_killed_are_there_at_the_next_look(tmp_path: Path) -> None:
    with create(tmp_path) as journal:
        journal.append(0, b"x", is_failed=True, code="c")
    script = (
        "import os, signal, sys; from pathlib import Path; from batchllm.offline.journal import Journal\n"
        "Journal.open(Path(sys.argv[1])).set_failed_aside(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == -signal.SIGKILL
    with Journal.open(tmp_path) as journal:
        assert journal.failed().tolist() == [0]


def test_sorting_needs_the_jobs_folder_only(tmp_path: Path) -> None:
    """Rows larger than memory is given to sort are sorted in files without names in the job's folder."""
    folder = tmp_path / "it's"
    with create(folder) as journal:
        for index in range(9_000, 0, -1):
            journal.append(index, bytes(8_000))
            if journal.is_due(0.0):
                journal.commit()
        journal.commit()
        results = journal.results("input")
        next(results)
        opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        assert any(path.startswith(str(folder)) and path.endswith("(deleted)") for path in opened)
        results.close()


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_folder_holds_one_job(tmp_path: Path) -> None:
    create(tmp_path).close()
    with pytest.raises(ConfigError, match="--restart"):
        create(tmp_path)
    Journal.open(tmp_path).close()


def test_a_second_driver_is_told_who_is_first(tmp_path: Path) -> None:
    with create(tmp_path):
        for second in (lambda: Journal.open(tmp_path), lambda: create(tmp_path), lambda: Journal.remove(tmp_path)):
            with pytest.raises(ConfigError, match=rf"{tmp_path}.*process {os.getpid()} "):
                second()
    Journal.open(tmp_path).close()


def test_restart_deletes_the_journals_files_only(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with create(tmp_path) as journal:
        journal.append(0, b"")
    Journal.remove(tmp_path)
    assert names(tmp_path) == {"mine"}
    Journal.remove(tmp_path)
    Journal.remove(tmp_path / "none")
    with create(tmp_path) as journal:
        assert journal.finished().tolist() == []


def test_a_closed_journal_is_one_file_and_takes_nothing_more(tmp_path: Path) -> None:
    journal = create(tmp_path)
    journal.append(0, b"x")
    journal.close()
    journal.close()
    assert names(tmp_path) == {"journal.db", "journal.lock"}
    with pytest.raises(JournalError, match="closed"):
        journal.commit()


def test_no_journal_is_made_by_asking(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert not Journal.exists(folder)
        for ask in (read_status, Journal.open):
            with pytest.raises(ConfigError, match=str(folder)):
                ask(folder)
    assert names(tmp_path) == set()


def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    create(tmp_path).close()
    database = sqlite3.connect(tmp_path / "journal.db")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="another version"):
        Journal.open(tmp_path)
    with pytest.raises(ConfigError, match="another version"):
        read_status(tmp_path)


@pytest.mark.parametrize("version", [0, 1, 99])
def test_another_programs_database_is_named_and_left_alone(tmp_path: Path, version: int) -> None:
    """Its name is the journal's, and the user has given its folder; --restart deletes journals only."""
    path = tmp_path / "journal.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE diary (day TEXT)")
        database.execute("INSERT INTO diary VALUES ('monday')")
        database.execute(f"PRAGMA user_version = {version}")
        database.commit()
    with pytest.raises(ConfigError, match="a database of something else"):
        Journal.remove(tmp_path)
    if version != 1:
        for ask in (read_status, Journal.open):
            with pytest.raises(ConfigError, match="a database of something else"):
                ask(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT day FROM diary").fetchall() == [("monday",)]


@pytest.mark.parametrize("name", [b"a\xff", b"it's", b"a\nb", "\u00e4 %?#".encode()])
def test_a_folder_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    """File systems take bytes that are no text."""
    folder = tmp_path / os.fsdecode(name)
    with create(folder) as journal:
        journal.append(1, b'{"a": 1}')
        journal.append(0, b'{"a": 0}')
        journal.commit()
        assert list(journal.results("input")) == [b'{"a": 0}', b'{"a": 1}']
        assert read_status(folder).num_finished == 2
    assert read_status(folder).num_finished == 2
    Journal.remove(folder)
    assert not list(folder.iterdir())


def failed_line(message: str, *, openai: bool) -> bytes:
    error = {"error": {"message": message}}
    return orjson.dumps({"response": {"body": error}, "error": None} if openai else error)


def test_status_tells_what_is_safe_while_a_driver_writes(tmp_path: Path) -> None:
    with create(tmp_path) as journal:
        journal.note("num_rows", 100)
        journal.event("start", "here")
        for index in range(10):
            journal.append(index, b"{}", num_prompt_tokens=7, num_output_tokens=3)
        for index in range(10, 15):
            line = failed_line(f"row {index}", openai=index % 2 == 0)
            journal.append(index, line, is_failed=True, code="aborted")
        journal.append(15, b"no \xff json", is_failed=True, code="odd")
        assert read_status(tmp_path).num_finished == 0
        journal.commit()
        journal.append(16, b"{}")
        status = read_status(tmp_path)
        assert status.writer_pid == os.getpid()
        assert (status.num_finished, status.num_failed, status.notes) == (16, 6, {"num_rows": 100})
        assert (status.num_prompt_tokens, status.num_output_tokens) == (70, 30)
        assert [(kind.code, kind.num_rows) for kind in status.failures] == [("aborted", 5), ("odd", 1)]
        assert status.failures[0].examples == [(10 + k, f"row {10 + k}") for k in range(NUM_EXAMPLES)]
        assert status.failures[1].examples == [(15, "no \ufffd json")]
        assert [(kind, detail) for _, kind, detail in status.events] == [("start", "here")]
        for speed in (status.recent_speed, status.whole_speed):
            assert round(speed.rows_per_s * speed.elapsed_s) == 16
            assert round(speed.tokens_per_s * speed.elapsed_s) == 100
    before = names(tmp_path)
    status = read_status(tmp_path)
    assert (status.writer_pid, status.num_finished) == (None, 17)
    assert names(tmp_path) == before


def test_speed_leaves_out_the_time_between_runs_and_looks_back_some_minutes(tmp_path: Path) -> None:
    create(tmp_path).close()
    database = sqlite3.connect(tmp_path / "journal.db")
    database.executemany(
        "INSERT INTO progress VALUES (?, ?, ?, ?)",
        [(1, 0, 0, 0), (1, 100, 1000, 0), (2, 9000, 0, 0), (2, 9100, 300, 0), (2, 9600, 600, 1200)],
    )
    database.commit()
    database.close()
    status = read_status(tmp_path)
    assert (status.recent_speed.rows_per_s, status.recent_speed.tokens_per_s) == (2.0, 4.0)
    assert (status.whole_speed.elapsed_s, status.whole_speed.rows_per_s) == (700.0, 1900 / 700)


def test_events_wait_for_rows_or_are_written_at_once(tmp_path: Path) -> None:
    with create(tmp_path) as journal:
        journal.event("a", "at \udcff once")
        assert [event[1:] for event in read_status(tmp_path).events] == [("a", "at \\udcff once")]
        journal.append(0, b"")
        journal.event("b", "with the row")
        assert [event[1] for event in read_status(tmp_path).events] == ["a"]
        journal.commit()
        assert [event[1] for event in read_status(tmp_path).events] == ["a", "b"]
