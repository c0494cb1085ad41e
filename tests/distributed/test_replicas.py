"""A job on several engines in Ray actors: each row once, whoever dies. The engines answer at once."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from batchllm.distributed.cluster import Resources, num_cores
from batchllm.distributed.runtime import ReplicatedRuntime
from batchllm.errors import EngineError
from tests.cli.jobs import read_lines, recorded_rows, rows_of, status_of, write_rows
from tests.distributed.conftest import Command, HeldCluster
from tests.distributed.ray_engines import Deeds, asked_for, num_of, start

NUM_ROWS = 400
_ANSWERS = [f"after {i}" for i in range(NUM_ROWS)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", rows_of(NUM_ROWS))


def _texts(out: Path) -> list[str]:
    return [line["text"] for line in read_lines(out)]


def test_rows_are_answered_once_by_all_engines(command: Command, source: Path, tmp_path: Path) -> None:
    """Each engine gets some, groups of ten stay whole but for the last few, and answers are in the input's order."""
    out = tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out, "--replicas", 3, delay_s=0.01).check(0)
    assert _texts(out) == _ANSWERS
    asked = asked_for(tmp_path / "engines")
    assert len(asked) == 3 and all(len(rows) > 1 for rows in asked)
    assert sum(asked, Counter()) == Counter({"start": 3} | {str(i): 1 for i in range(NUM_ROWS)})
    engines_of = Counter(group for rows in asked for group in {int(row) // 10 for row in rows if row != "start"})
    assert list(engines_of.values()).count(1) >= 36


def test_engines_that_are_killed_are_replaced_and_no_row_is_lost(
    command: Command, source: Path, tmp_path: Path
) -> None:
    """Five of them: what was in flight runs again, each row is answered once, and the journal has the deaths."""
    out, engines = tmp_path / "out.jsonl", tmp_path / "engines"
    done = command("run", "-i", source, "-o", out, "--replicas", 2, dies_after=20, num_deaths=5, delay_s=0.005)
    assert "Traceback" not in done.stderr and done.status == 0, done.stderr
    assert _texts(out) == _ANSWERS
    assert num_of(engines, "killed") == 5 and len(asked_for(engines)) >= 6
    assert "is gone" in done.stderr
    assert [kind for _, kind, _ in status_of(Path(f"{out}.job")).events].count("engine_death") == 5


def test_a_poison_row_is_found_and_does_not_walk_through_the_cluster(
    command: Command, source: Path, tmp_path: Path
) -> None:
    """It takes an engine along with the others, one with few, and two alone, and fails by name; the others go on."""
    out, engines = tmp_path / "out.jsonl", tmp_path / "engines"
    done = command("run", "-i", source, "-o", out, "--replicas", 2, poison=123, delay_s=0.002)
    assert done.status == 1, done.stderr
    lines = read_lines(out)
    assert [line["id"] for line in lines if "error" in line] == ["r123"]
    assert lines[123]["error"]["code"] == "engine_died"
    assert [line["text"] for line in lines if "error" not in line] == _ANSWERS[:123] + _ANSWERS[124:]
    assert num_of(engines, "poison") == 4


def test_engines_that_die_at_once_again_and_again_end_the_job(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them answers anything. Each takes 69 rows along, of many: the job does not wait for all to be taken."""
    rows = [
        {"id": f"r{i}", "input_ids": [1000 + i] * 1900, "sampling_params": {"max_new_tokens": 1}} for i in range(400)
    ]
    source, engines = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "engines"
    monkeypatch.setattr("batchllm.distributed.runtime.MAX_FRUITLESS_DEATHS", 1)
    done = command("run", "-i", source, "-o", tmp_path / "out.jsonl", "--replicas", 2, num_deaths=99)
    assert done.status == 2 and "Traceback" not in done.stderr, done.stderr
    assert "no engine is left: the engine died 2 times in a row before any row was answered" in done.stderr
    assert num_of(engines, "killed") == 4


def test_what_was_acknowledged_is_not_asked_for_again(command: Command, source: Path, tmp_path: Path) -> None:
    """A job that is stopped by failures, by the same command: only what has no result goes to engines."""
    rows = rows_of(NUM_ROWS)
    for row in rows[:20]:
        row["input_ids"] = [7, 999]
    write_rows(source, rows)
    out, engines = tmp_path / "out.jsonl", tmp_path / "engines"
    arguments = ("run", "-i", source, "-o", out, "--replicas", 2, "--max-failures")
    assert command(*arguments, 5, delay_s=0.01).status == 2
    recorded = recorded_rows(Path(f"{out}.job"))
    before = sum(asked_for(engines), Counter())
    assert command(*arguments, 30).status == 1
    again = sum(asked_for(engines), Counter()) - before
    assert {int(row) for row in again if row not in ("start", "999")} == set(range(20, NUM_ROWS)) - recorded
    assert len(read_lines(out)) == NUM_ROWS


def test_the_job_begins_with_the_least_and_others_that_do_not_come_are_told(
    command: Command, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = command(
        "run", "-i", source, "-o", out, "--replicas", 2, "--min-replicas", 1, fails="late", delay_s=0.05
    ).check(0)
    assert _texts(out) == _ANSWERS
    assert len(asked_for(tmp_path / "engines")) == 1
    assert "there is no such device" in done.stderr


def test_engines_that_do_not_start_end_the_job_with_their_reason(
    command: Command, source: Path, tmp_path: Path
) -> None:
    done = command("run", "-i", source, "-o", tmp_path / "out.jsonl", "--replicas", 2, fails="all").check(2)
    assert "there is no such device" in done.stderr and "node " in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_replica_that_never_gets_its_resources_is_not_waited_for(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wants all cores: one begins, the other waits to the end, and the job does not."""
    monkeypatch.setattr(HeldCluster, "resources", lambda *_: Resources(num_cpus=num_cores(), num_gpus=0))
    out = tmp_path / "out.jsonl"
    done = command("run", "-i", source, "-o", out, "--replicas", 2, "--min-replicas", 1).check(0)
    assert _texts(out) == _ANSWERS
    assert len(asked_for(tmp_path / "engines")) == 1
    assert "the job begins with 1 of 2 replicas" in done.stderr


def test_replicas_that_get_no_resources_or_do_not_come_up_are_told_apart(cluster: HeldCluster, tmp_path: Path) -> None:
    """The second one needs the time in which Ray finds it a node."""
    for num_cpus, fails, timeout_s, words in (
        (64, "", 1, "1 wait for 64 CPU cores each, which"),
        (0, "never", 12, "is still starting"),
    ):
        with pytest.raises(EngineError, match=f"0 of 1 replicas came up within {timeout_s} s; .*{words}"):
            ReplicatedRuntime(
                partial(start, Deeds(folder=str(tmp_path), fails=fails), None),
                cluster=cluster,
                resources=Resources(num_cpus=num_cpus, num_gpus=0),
                num_engines=1,
                start_timeout_s=timeout_s,
            )


def test_retry_runs_on_replicas_what_failed_and_starts_no_other_engine(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's folder says that it ran on replicas: nothing imports SGLang here meanwhile."""
    rows = rows_of(20)
    rows[3]["input_ids"] = [7, 999]
    write_rows(source, rows)
    out = tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out, "--replicas", 2).check(1)
    monkeypatch.setattr("batchllm.host.template.Template", None)
    command("retry", f"{out}.job").check(1)
    asked = sum(asked_for(tmp_path / "engines"), Counter())
    assert asked["999"] == 2 and asked["1"] == 1
