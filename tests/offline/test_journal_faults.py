"""A journal on disks and in processes that fail: what was counted as safe is there, and the user is told what to do."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import BatchLLMError, JournalError
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.journal import Journal, read_status
from tests import forked
from tests.mounted_disk import mount, run_with_mounts
from tests.sizes import sized

LINE = b"x" * 3_000


def create(folder: Path) -> Journal:
    return Journal.create(folder, fingerprint=Fingerprint({"model": "m"}), command={})


def line_of(index: int) -> bytes:
    return b"%d " % index + LINE[: index * 37 % 3_000]


def contents(folder: Path) -> list[int]:
    """The rows that are safe in a folder, whose lines have been compared."""
    with Journal.open(folder) as journal:
        indices: list[int] = journal.finished().tolist()
        assert list(journal.results("finished")) == [line_of(index) for index in indices]
        assert len(set(indices)) == len(indices)
    return indices


def read_files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "journal.db").read_bytes(), (folder / "journal.db-wal").read_bytes()


def write_files(folder: Path, database: bytes, wal: bytes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "journal.db").write_bytes(database)
    (folder / "journal.db-wal").write_bytes(wal)


@settings(max_examples=sized(25, 60), deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_a_crash_in_a_commit_leaves_all_of_it_or_nothing_and_every_earlier_one(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], checkpoint_pages: int, data: st.DataObject
) -> None:
    """The log is cut off at any byte, with garbage behind; or the main file has some of the pages it was to get."""
    folder, crashed = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("crashed")
    acknowledged: list[int] = []
    with create(folder) as journal:
        journal._db.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")  # so that there are some, in few commits
        for size in sizes:
            before = read_files(folder)
            batch = list(range(len(acknowledged), len(acknowledged) + size))
            for index in batch:
                journal.append(index, line_of(index))
            assert journal.commit() == size
            after = read_files(folder)
            cut = data.draw(st.integers(0, len(after[1])), label="bytes of the log that were written")
            tail = data.draw(st.sampled_from([before[1][cut:], b"", bytes(100), data.draw(st.binary(max_size=5_000))]))
            if _is_acknowledged_whole(before[1], after[1], cut, tail):
                write_files(crashed, before[0], after[1][:cut] + tail)
                assert contents(crashed) in (acknowledged, acknowledged + batch)
            acknowledged += batch
            write_files(crashed, _mixed_pages(before[0], after[0], data), after[1])
            assert contents(crashed) == acknowledged
    assert contents(folder) == acknowledged


def _is_acknowledged_whole(before: bytes, after: bytes, cut: int, tail: bytes) -> bool:
    """Bytes that were on disk before the commit are so still, unless they have been written over."""
    first_written = next(
        (at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before)
    )
    return cut >= first_written or tail == before[cut:]


def _mixed_pages(before: bytes, after: bytes, data: st.DataObject) -> bytes:
    page_len = 4096
    chosen = random.Random(data.draw(st.integers(0, 1 << 32), label="pages of the main file that were written"))
    before = before.ljust(len(after), b"\0")
    return b"".join((chosen.choice((before, after)))[at : at + page_len] for at in range(0, len(after), page_len))


def test_a_torn_tail_is_told_and_holds_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    with create(tmp_path / "job") as journal:
        for index in range(4):
            journal.append(index, line_of(index))
        journal.commit()
        num_safe_bytes = len(read_files(tmp_path / "job")[1])
        for index in range(4, 50):
            journal.append(index, line_of(index))
        journal.commit()
        database, wal = read_files(tmp_path / "job")
    write_files(tmp_path / "torn", database, wal[:-1])
    with Journal.open(tmp_path / "torn") as journal:
        assert journal.recovery is not None
        assert "journal.db-wal" in journal.recovery
        assert "4 rows are safe" in journal.recovery
    assert contents(tmp_path / "torn") == [0, 1, 2, 3]
    for whole in (wal, wal[:num_safe_bytes]):
        write_files(tmp_path / "whole", database, whole)
        with Journal.open(tmp_path / "whole") as journal:
            assert journal.recovery is None


def test_a_killed_process_has_lost_nothing_it_had_counted(tmp_path: Path) -> None:
    """Killed after some acknowledgements and at no chosen moment of the next commit, again and again."""
    chance = random.Random(0)
    create(tmp_path / "job").close()
    for _ in range(sized(3, 6)):
        reader, writer = (os.fdopen(fd, mode) for fd, mode in zip(os.pipe(), "rw", strict=True))
        with reader:
            with writer:
                child = forked.Process(f"{__name__}:append_and_tell", [str(tmp_path / "job")], stdout=writer)
            told = [int(reader.readline()) for _ in range(chance.randint(1, 60))]
            child.kill()
            told += [int(line) for line in reader if line.endswith("\n")]
        assert child.wait() == -signal.SIGKILL
        indices = contents(tmp_path / "job")
        assert indices == list(range(len(indices)))
        assert len(indices) >= told[-1]


def append_and_tell(arguments: list[str]) -> None:
    """Runs as a process of its own: appends for ever, and prints how many rows are safe after each commit."""
    with Journal.open(Path(*arguments)) as journal:
        while True:
            for index in range(journal.num_rows, journal.num_rows + 7):
                journal.append(index, line_of(index))
            journal.commit()
            print(journal.num_rows, flush=True)


def append_until_fault(journal: Journal, max_rows: int = 10_000) -> JournalError:
    """Checks what every fault has in common, and returns it."""
    for index in range(journal.num_rows, max_rows):
        journal.append(index, line_of(index))
        try:
            journal.commit()
        except JournalError as error:
            for again in (journal.commit, lambda: journal.event("more"), lambda: journal.note("more", 1)):
                with pytest.raises(JournalError):
                    again()
            return error
    raise AssertionError(f"no fault in {max_rows} rows")


def test_a_full_disk_stops_the_job_and_room_lets_it_go_on(tmp_path: Path) -> None:
    run_with_mounts(fill_disk, tmp_path)


def fill_disk(mounted: Path) -> None:
    """A tmpfs of 1 MiB runs full, and then gets larger."""
    mount(mounted, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    folder = mounted / "job"
    with create(folder) as journal:
        message = str(append_until_fault(journal))
        num_safe = journal.num_rows
    assert num_safe > 0
    for said in (
        f"{folder}/journal.db: the disk is full",
        f"{num_safe} rows are safe",
        "run the same command to go on",
    ):
        assert said in message
    assert read_status(folder).num_finished == num_safe
    (mounted / "filler").write_bytes(b"")
    mount(mounted, "-o", "remount,size=8m")
    assert contents(folder) == list(range(num_safe))
    with Journal.open(folder) as journal:
        journal.append(num_safe, line_of(num_safe))
    assert contents(folder) == list(range(num_safe + 1))


def test_a_disk_full_from_the_start_begins_no_job(tmp_path: Path) -> None:
    run_with_mounts(begin_on_full_disk, tmp_path)


def begin_on_full_disk(mounted: Path) -> None:
    mount(mounted, "-t", "tmpfs", "-o", "size=16k", "tmpfs")
    with pytest.raises(JournalError, match="nothing has been recorded"):
        create(mounted / "job")
    assert not Journal.exists(mounted / "job")
    mount(mounted, "-o", "remount,size=8m")
    with create(mounted / "job") as journal:
        journal.append(0, line_of(0))
    assert contents(mounted / "job") == [0]


def test_a_read_only_disk_is_refused_and_can_still_be_asked(tmp_path: Path) -> None:
    run_with_mounts(make_read_only, tmp_path)


def make_read_only(mounted: Path) -> None:
    """The journal of a run that ended, and that of one that was killed: status of both, but no run."""
    mount(mounted, "-t", "tmpfs", "-o", "size=8m", "tmpfs")
    with create(mounted / "ended") as journal:
        journal.append(0, line_of(0))
        journal.commit()
        shutil.copytree(mounted / "ended", mounted / "killed")
        shutil.copytree(mounted / "ended", mounted / "no_index")
    (mounted / "no_index" / "journal.db-shm").unlink()
    mount(mounted, "-o", "remount,ro")
    for name in ("ended", "killed"):
        status = read_status(mounted / name)
        assert (status.num_finished, status.writer_pid) == (1, None)
        with pytest.raises(BatchLLMError, match="Read-only file system"):
            Journal.open(mounted / name)
    with pytest.raises(JournalError, match="copy it to where it can be"):
        read_status(mounted / "no_index")
    mount(mounted, "-o", "remount,rw")
    for name in ("ended", "killed", "no_index"):
        assert contents(mounted / name) == [0]


def test_a_write_refused_in_flight_loses_only_what_was_not_counted(tmp_path: Path) -> None:
    """The kernel refuses to let files grow, as a disk does that fails; nothing has been closed or opened between."""
    done = forked.run(f"{__name__}:refuse_writes", [str(tmp_path / "job")], timeout=60)
    assert done.returncode == 0, done.stderr


def refuse_writes(arguments: list[str]) -> None:
    (folder,) = map(Path, arguments)
    with create(folder) as journal:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        message = str(append_until_fault(journal))
        num_safe = journal.num_rows
    assert num_safe > 0
    for said in ("the disk", "SQLITE_", f"{num_safe} rows are safe", "run the same command to go on"):
        assert said in message
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert contents(folder) == list(range(num_safe))


def test_a_journal_deleted_in_flight_is_missed_at_the_next_commit(tmp_path: Path) -> None:
    """SQLite itself would go on writing to files that nobody can find any more."""
    for deleted in ("", "journal.db", "journal.db-wal"):
        folder = tmp_path / f"job{deleted}"
        with create(folder) as journal:
            journal.append(0, line_of(0))
            assert journal.commit() == 1
            shutil.rmtree(folder) if deleted == "" else (folder / deleted).unlink()
            message = str(append_until_fault(journal))
        assert str(folder / "journal.db") in message
        assert "deleted, moved or replaced" in message
    with create(tmp_path / "job") as journal:
        assert journal.num_rows == 0


def test_a_journal_replaced_in_flight_is_missed_and_the_new_one_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    with create(folder) as journal:
        journal.append(0, line_of(0))
        journal.commit()
        folder.rename(tmp_path / "moved")
        with create(folder) as other:
            other.append(5, line_of(5))
            other.commit()
            append_until_fault(journal)
            journal.close()
            other.append(6, line_of(6))
    assert contents(folder) == [5, 6]
    assert contents(tmp_path / "moved")[:1] == [0]


def test_an_interrupted_commit_is_dropped_whole_and_the_journal_takes_nothing_more(tmp_path: Path) -> None:
    with create(tmp_path / "job") as journal:
        journal.append(0, line_of(0))
        journal.commit()
        journal.append(1, line_of(1))
        journal.append(1 << 63, b"larger than SQLite's integers")
        with pytest.raises(OverflowError):
            journal.commit()
        journal.append(2, line_of(2))
        with pytest.raises(JournalError, match="interrupted"):
            journal.commit()
    assert contents(tmp_path / "job") == [0]


def filled(folder: Path) -> Path:
    with create(folder) as journal:
        journal.note("num_rows", 30)
        journal.event("start", "here")
        for index in range(30):
            journal.append(index, line_of(index), is_failed=index % 3 == 0, code=f"code{index % 2}")
    return folder


def test_lines_that_are_not_what_was_recorded_are_removed_and_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "job")
    database = sqlite3.connect(folder / "journal.db")
    database.execute("UPDATE result SET line = zeroblob(3) WHERE idx = 7")
    database.execute("UPDATE result SET idx = 99 WHERE idx = 9")
    database.commit()
    database.close()
    with Journal.open(folder) as journal:
        with pytest.raises(JournalError, match=r"2 rows .*7, 99.*28 rows are safe; run the same command"):
            list(journal.results("input"))
        assert journal.finished().tolist() == [index for index in range(30) if index not in (7, 9)]
        journal.append(7, line_of(7))
        journal.append(9, line_of(9))
    assert sorted(contents(folder)) == list(range(30))
    assert read_status(folder).num_finished == 30


@settings(max_examples=sized(50, 150), deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_right_lines_or_an_error_that_says_what_to_do(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = filled(tmp_path_factory.mktemp("damaged") / "job")
    content = bytearray((folder / "journal.db").read_bytes())
    if data.draw(st.booleans(), label="cut off"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        start = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 4096))
        patch = data.draw(st.binary(min_size=1, max_size=64))
        content[start : start + len(patch)] = patch
    (folder / "journal.db").write_bytes(content)

    def read() -> None:
        read_status(folder)

    def run() -> None:
        with Journal.open(folder) as journal:
            journal.finished()
            journal.failed()
            _ = journal.notes
            for order in ("input", "finished"):
                assert set(journal.results(order)) <= {line_of(index) for index in range(30)}
            journal.set_failed_aside()

    for act in (read, run):
        try:
            act()
        except BatchLLMError as error:
            message = str(error)
            assert str(folder) in message
            assert "--restart" in message or "run the same command" in message or "copy it" in message
