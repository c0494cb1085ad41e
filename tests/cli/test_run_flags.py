"""The flags of ``batchllm run``, each as a user gives it: formats, columns, progress, memory."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from batchllm.cli import inputs, run
from batchllm.dataset import Row, open_input
from tests.cli.conftest import Command
from tests.cli.instant_engine import ABORTED
from tests.cli.jobs import (
    SubmissionLog,
    arguments_of,
    batchllm,
    ids_of,
    lines_of,
    read_lines,
    rows_of,
    status_of,
    write_rows,
)

NUM_ROWS = 50
IDS = [f"r{i}" for i in range(NUM_ROWS)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", rows_of(NUM_ROWS))


@pytest.fixture
def log(tmp_path: Path) -> SubmissionLog:
    return SubmissionLog(tmp_path / "log.txt")


def write_input(path: Path) -> Path:
    """The same rows in the format of the name."""
    rows = rows_of(NUM_ROWS)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines_of(rows)))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(lines_of(rows)))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(str(path))
    return path


def read_output(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return [json.loads(record) for record in pq.read_table(path).column("record").to_pylist()]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst", "in.parquet"])
@pytest.mark.parametrize("order", ["input", "finished"])
def test_files_of_every_format_go_in_and_out_over_a_stop(
    command: Command, tmp_path: Path, name: str, order: str
) -> None:
    source, out = write_input(tmp_path / name), tmp_path / name.replace("in", "out")
    flags = ("run", "-i", source, "-o", out, "--order", order)
    command(*flags, batch=5, at=20, do="kill -TERM $PPID").check(3)
    assert not out.exists()
    command(*flags).check(0)
    lines = read_output(out)
    assert sorted(line["id"] for line in lines) == sorted(IDS)
    assert {line["id"]: line["text"] for line in lines} == {f"r{i}": f"after {i}" for i in range(NUM_ROWS)}
    if order == "input":
        assert [line["id"] for line in lines] == IDS


def test_a_saved_hugging_face_dataset_is_an_input(tmp_path: Path) -> None:
    saved = write_input(tmp_path / "saved")
    batchllm("run", "-i", saved, "-o", tmp_path / "out.jsonl").check(0)
    assert ids_of(tmp_path / "out.jsonl") == IDS


def test_a_url_is_read_and_written_and_a_directory_behind_one_too(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    write_input(folder / "a.parquet")
    out = tmp_path / "out.jsonl"
    command("run", "-i", f"file://{folder}", "-o", f"file://{out}", "--job-dir", tmp_path / "job").check(0)
    assert ids_of(out) == IDS
    done = command("run", "-i", f"file://{folder}", "-o", out, "--job-dir", tmp_path / "new", "--template", "{no}")
    assert "no column 'no'" in done.check(2).stderr.replace('"', "'")


def test_an_error_before_the_first_result_takes_the_copy_of_a_directory_along(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    write_input(folder / "a.parquet")
    flags = ("run", "-i", f"file://{folder}", "-o", tmp_path / "out.jsonl", "--metrics-port", "-1")
    assert "--metrics-port" in command(*flags).check(2).stderr
    assert not (tmp_path / "out.jsonl.job").exists()


@pytest.mark.slow
def test_columns_become_prompts_and_go_along(tmp_path: Path) -> None:
    rows = [{"key": i, "word": "red", "n": i, "text": f"{i}?"} for i in range(5)]
    source = write_rows(tmp_path / "in.jsonl", [*rows, {"key": 9, "word": "red"}])
    flags = ("run", "-i", source, "--id-column", "key", "--carry", "word,n")
    batchllm(*flags, "-o", tmp_path / "a.jsonl", "--template", "Say {word}: {text}").check(1)
    batchllm(*flags, "-o", tmp_path / "b.jsonl", "--prompt-column", "text").check(1)
    for name in ("a.jsonl", "b.jsonl"):
        lines = read_lines(tmp_path / name)
        assert [line["id"] for line in lines] == [0, 1, 2, 3, 4, 9]
        assert [line["carried"] for line in lines] == [{"word": "red", "n": i} for i in [*range(5), None]]
        assert "error" in lines[5] and "text" in lines[5]["error"]["message"]
    prompt_lens = [
        [line["usage"]["prompt_tokens"] for line in read_lines(tmp_path / name)[:5]] for name in ("a.jsonl", "b.jsonl")
    ]
    assert min(prompt_lens[0]) > max(prompt_lens[1])


@pytest.mark.parametrize(("given", "is_chosen"), [("null", False), ("0.5", True)])
def test_a_chat_is_sampled_as_the_model_recommends_unless_the_user_says_more_than_null(
    tmp_path: Path, given: str, is_chosen: bool
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source = str(write_rows(tmp_path / "in.jsonl", [row]))
    flags = inputs.InputFlags(input=source, sampling=f'{{"temperature": {given}}}')
    (read,) = inputs.rows_of(flags, open_input(source, spool_folder=None))
    assert isinstance(read, Row) and read.request.chat is not None
    assert ("temperature" not in read.request.chat.unset) == is_chosen


def test_doubles_are_run_once_with_dedupe_and_each_has_its_line(
    command: Command, tmp_path: Path, log: SubmissionLog
) -> None:
    greedy = {"temperature": 0}
    rows = [{"id": f"r{i}", "input_ids": [7, i % 3], "sampling_params": greedy} for i in range(12)]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out, "--dedupe", log=log.path).check(0)
    assert log.take() == {"start": 1, "0": 1, "1": 1, "2": 1}
    assert [line["text"] for line in read_lines(out)] == [f"after {i % 3}" for i in range(12)]


def test_progress_for_machines_adds_up_to_the_job(command: Command, tmp_path: Path) -> None:
    """Over a stop: lines that never count less than the one before, and whose last one is the end."""
    rows = [*rows_of(NUM_ROWS), "{broken", {"id": "x", "input_ids": [ABORTED]}]
    source, progress = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "p.jsonl"
    flags = ("run", "-i", source, "-o", tmp_path / "out.jsonl", "--progress-file", progress)
    command(*flags, batch=5, at=20, do="kill -TERM $PPID").check(3)
    stopped = read_lines(progress)
    assert stopped[-1]["state"] == "stopping"
    assert stopped[-1]["num_done"] == status_of(tmp_path / "out.jsonl.job").num_finished
    command(*flags).check(1)
    told = read_lines(progress)
    assert told[: len(stopped)] == stopped
    for before, after in itertools.pairwise(told):
        assert before["num_done"] <= after["num_done"]
    last = told[-1]
    assert last["num_done"] == last["num_rows"] == NUM_ROWS + 2
    assert last["num_done_before"] == stopped[-1]["num_done"]
    assert stopped[-1]["num_failed"] + last["num_failed"] == 2
    assert last["time_left_s"] == 0
    assert last["num_output_tokens"] + stopped[-1]["num_output_tokens"] == NUM_ROWS + 1  # that of the row that failed


def test_metrics_are_served_while_the_job_runs(source: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    got = tmp_path / "metrics.txt"
    fetch = f"import urllib.request as r; print(r.urlopen('http://localhost:{port}/metrics').read().decode())"
    do = f"{shlex.quote(sys.executable)} -c {shlex.quote(fetch)} > {got}"
    flags = ("run", "-i", source, "-o", tmp_path / "out.jsonl", "--metrics-port", str(port))
    batchllm(*flags, batch=5, delay_s=0.05, at=40, do=do).check(0)
    answered = re.search(r'batchllm_rows_total\{outcome="answered"\} ([\d.]+)', got.read_text())
    assert answered is not None and 0 < float(answered[1]) < NUM_ROWS
    assert f"batchllm_job_rows {NUM_ROWS}.0" in got.read_text()


def test_a_port_that_is_taken_or_none_is_refused_by_flag(command: Command, source: Path, tmp_path: Path) -> None:
    for port in ("70000", "-1"):
        done = command("run", "-i", source, "-o", tmp_path / "out.jsonl", "--metrics-port", port).check(2)
        assert f"--metrics-port {port}" in done.stderr
    assert not (tmp_path / "out.jsonl.job").exists()


def test_any_free_port_will_do(command: Command, source: Path, tmp_path: Path) -> None:
    command("run", "-i", source, "-o", tmp_path / "out.jsonl", "--metrics-port", "0").check(0)


def test_a_job_larger_than_its_memory_is_planned_in_shards_and_says_what_that_costs(
    command: Command, tmp_path: Path, log: SubmissionLog
) -> None:
    """Shared beginnings are longer than a shard: some are computed more than once."""
    rows = [{"id": f"r{i}", "input_ids": [*[3000 + i // 25] * 20, i]} for i in range(NUM_ROWS)]
    source, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    done = command("run", "-i", source, "-o", out, "--token-memory", str(300 * 4 / 2**30), log=log.path).check(0)
    lost = re.search(r"planned in shards, for want of memory: (\d+) prompt tokens", done.stderr)
    assert lost is not None and int(lost[1]) > 0
    assert ids_of(out) == IDS
    assert log.take() == {"start": 1, **{str(i): 1 for i in range(NUM_ROWS)}}


def test_a_report_that_cannot_be_written_takes_no_answers_along(command: Command, source: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    out = tmp_path / "out.jsonl"
    flags = ("run", "-i", source, "-o", out, "--report", reports / "r.json")
    done = command(*flags, at=0, do=f"rmdir {reports}").check(2)
    assert str(reports) in done.stderr
    assert ids_of(out) == IDS
    reports.mkdir()
    command(*flags).check(0)
    assert json.loads((reports / "r.json").read_text())["num_done_before"] == NUM_ROWS


def test_flags_that_are_not_text_are_refused_like_any_other(source: Path, tmp_path: Path) -> None:
    """A shell hands over whatever bytes there are."""
    for flag in ("--sampling", "--template", "--model"):
        batchllm("run", "-i", source, "-o", tmp_path / "out.jsonl", flag, "\udcff", "--max-failures", "0").check(
            0 if flag == "--model" else 2
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-m", ""], "-m: the name of the model is empty"),
        (["--model-path", ""], "-m: the name of the model is empty"),
        (["--job-dir", ""], "--job-dir: is empty"),
        (["--grace", "nan"], "--grace nan"),
        (["--grace", "-1"], "--grace -1"),
        (["--token-memory", "nan"], "--token-memory nan"),
        (["--retry", "-1"], "--retry -1"),
        (["--carry", ""], "--carry: is empty"),
        (["--carry", "id,"], "--carry: is empty"),
    ],
)
def test_a_flag_that_says_nothing_or_nonsense_is_named_and_leaves_nothing(
    command: Command, source: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    """An empty one is what a shell makes of a variable that is not set: the embedded model would answer."""
    done = command("run", "-i", source, "-o", tmp_path / "out.jsonl", *flags).check(2)
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workload", ""], "kind '' is not known"),
        (["--workload", "shared:prefix=10,prefix=20"], "prefix is there twice"),
        (["--workload", "unshared:requests=2", "--kv-capacity", "1" + "0" * 30], "must be at most"),
        (["--workload", "unshared:requests=2", "--chunk", "1" + "0" * 30], "must be at most"),
        (["--workload", "unshared:requests=2", "--template", "{x}"], "--template: says nothing beside --workload"),
        (["--workload", "unshared:requests=2", "-m", "some"], "--model: says nothing beside --workload"),
        (["--workload", "shared", "--calibration", "c", "--device", "H100"], "--device: says nothing beside --cal"),
        (["--workload", "shared", "--device", ""], "device '' is not known"),
    ],
)
def test_a_simulation_of_nonsense_is_refused_in_words(command: Command, flags: list[str], words: str) -> None:
    done = command("simulate", *flags)
    assert words in done.check(2).stderr


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"x": ' + "1" * 5_000 + "}", "\udcff", "", "7", "null"])
@pytest.mark.parametrize("flag", ["--calibration", "--shape"])
def test_a_file_that_a_simulation_cannot_read_is_named(
    command: Command, tmp_path: Path, flag: str, content: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    done = command("simulate", "--workload", "unshared:requests=2", flag, path).check(2)
    assert str(path) in done.stderr


def test_a_calibration_does_not_take_the_place_of_its_trace(command: Command, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("mine")
    assert "is the input itself" in command("calibrate", trace, "-o", trace).check(2).stderr
    assert trace.read_text() == "mine"


def test_a_folder_that_was_removed_under_the_shell_is_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "a text"}])
    gone = tmp_path / "gone"
    gone.mkdir()
    command = shlex.join(arguments_of(["run", "-i", source, "-o", tmp_path / "out.jsonl"]))
    done = subprocess.run(
        ["bash", "-c", f"rmdir {gone} && exec {command}"], cwd=gone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("has been removed; call it in another one")


def test_a_full_standard_output_is_named(source: Path) -> None:
    command = shlex.join(arguments_of(["plan", "-i", source, "--json"]))
    done = subprocess.run(["bash", "-c", f"{command} > /dev/full"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "batchllm: standard output: No space left on device; give it another place",
    )


def test_a_plan_for_no_model_is_refused_in_one_line(command: Command, source: Path, tmp_path: Path) -> None:
    assert "the name of the model is empty" in command("plan", "-i", source, "-m", "").check(2).stderr
    source.write_bytes(lines_of([{"prompt": "text"}]))
    done = command("plan", "-i", source, "-m", "/no/such").check(2)
    assert (
        done.stderr == "batchllm: -m /no/such: there is no such folder; give a model's folder, or its name on the Hub\n"
    )
    done = command("plan", "-i", source, "-m", tmp_path).check(2)
    assert done.stderr.startswith(f"batchllm: -m {tmp_path}: its tokenizer cannot be loaded: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_a_page_of_no_size_is_refused_by_flag(command: Command, source: Path, size: int) -> None:
    assert (
        f"--page-size {size}: must be from 1 to" in command("plan", "-i", source, "--page-size", size).check(2).stderr
    )


@pytest.mark.parametrize("field", ["namespace", "lora_path"])
def test_a_simulation_shares_what_the_plan_shares(command: Command, tmp_path: Path, field: str) -> None:
    """Nothing over the border of a namespace or an adapter."""
    rows = [{"input_ids": [5, 6, 7, 8], field: name} for name in ("x", "x", "y", None)]
    source = write_rows(tmp_path / "in.jsonl", [*rows, {"input_ids": [5, 6, 9, 8]}])
    planned = json.loads(command("plan", "-i", source, "--json").check(0).stdout)
    (simulated,) = json.loads(command("simulate", "-i", source, "--json").check(0).stdout)
    assert planned["optimal_prefill_tokens"] == 4 + 1 + 4 + 4 + 2
    assert simulated["num_computed_prompt_tokens"] == planned["optimal_prefill_tokens"]


@pytest.mark.parametrize("name", ["plan", "simulate"])
def test_a_row_that_cannot_run_is_told_by_the_exit_status_of_what_runs_nothing(
    command: Command, tmp_path: Path, name: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"input_ids": [5]}, {"prompt": ""}])
    assert "line 2: prompt is empty" in command(name, "-i", source).check(1).stderr


def test_an_input_that_is_changed_while_it_is_read_ends_the_job(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path
) -> None:
    """The journal is for the contents that were hashed; no answer of others gets into it."""
    real = run.rows_of

    def rows_of_a_file_that_grows(*arguments: Any) -> Iterator[Any]:
        for i, row in enumerate(real(*arguments)):
            if i == 0:
                with source.open("ab") as file:
                    file.write(b'{"id": "late", "input_ids": [5]}\n')
            yield row

    monkeypatch.setattr(run, "rows_of", rows_of_a_file_that_grows)
    said = command("run", "-i", source, "-o", tmp_path / "out.jsonl").check(2).stderr
    assert f"-i {source}: was changed while it was being read" in said
    assert not (tmp_path / "out.jsonl").exists()
