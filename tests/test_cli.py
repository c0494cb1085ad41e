"""Claims about the ``batchllm`` command, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import forked
from tests.environment import WITHOUT_STREAMS, of_user
from tests.run_here import run_here

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
_NUM_ROWS = 500
CHAT = {"method": "POST", "url": "/v1/chat/completions"}


def _batchllm(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = of_user()
    return subprocess.run(
        [*WITHOUT_STREAMS, sys.executable, "-m", "batchllm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment | {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"},
    )


def _forked(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command without an engine of its own; what it imports is held by `test_import_weight`."""
    return forked.run("batchllm.cli:command", [str(argument) for argument in arguments], timeout=60)


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.engine
def test_every_row_gets_its_line_and_the_bad_ones_their_reason(tmp_path: Path) -> None:
    """Rows of all kinds in one file, good and bad: exit status 1, nothing lost, the report counts them."""
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    shared = "A long beginning that several rows have in common, word for word. " * 4
    rows: list[Any] = [
        {"id": "plain", "prompt": shared + "One", "sampling_params": GREEDY},
        "{broken",
        {
            "custom_id": "chat",
            **CHAT,
            "body": {"model": "m", "messages": [{"role": "user", "content": shared}], "max_tokens": 4},
        },
        {"id": "ids", "input_ids": [10, 11, 12], "sampling_params": {**GREEDY, "n": 2}},
        {"id": "plain", "prompt": "again", "sampling_params": GREEDY},
        {
            "custom_id": "text",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": shared, "logprobs": 1},
        },
        {"id": "long", "prompt": "word " * 20_000, "sampling_params": GREEDY},
        {"id": "huge", "prompt": shared, "sampling_params": {**GREEDY, "max_new_tokens": 4000}},
        {"id": "out", "input_ids": [10, 10**6], "sampling_params": GREEDY},
        {"id": "last", "prompt": shared + "Two", "sampling_params": GREEDY},
    ]
    source, out, err, report = (tmp_path / n for n in ("in.jsonl", "out.jsonl", "err.jsonl", "r.json"))
    done = _batchllm(
        *("run", "-i", _write(source, rows), "-o", out, "--errors", err, "--report", report),
        *("--max-total-tokens", "2048", "--random-seed", "3", "--trace", tmp_path / "t.json"),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    answers, errors = _read(out), _read(err)
    assert [row.get("id") if "custom_id" not in row else row["custom_id"] for row in answers] == [
        "plain", "chat", "ids", "text", "last"
    ]  # fmt: skip
    assert ChatCompletion.model_validate(answers[1]["response"]["body"]).choices[0].message.role == "assistant"
    assert Completion.model_validate(answers[3]["response"]["body"]).choices[0].logprobs is not None
    assert [len(choice["output_ids"]) for choice in answers[2]["choices"]] == [4, 4]
    assert answers[-1]["usage"]["cached_tokens"] > 0
    codes = [(row["error"] if "error" in row else row["response"]["body"]["error"])["code"] for row in errors]
    assert codes == [
        "invalid_json",
        "duplicate_id",
        "prompt_too_long",
        "never_fits_kv_pool",
        "token_id_out_of_range",
    ]
    numbers = json.loads(report.read_text())
    assert (numbers["num_requests"], numbers["num_succeeded"], numbers["num_failed"]) == (10, 5, 5)
    assert numbers["num_computed_prompt_tokens"] == numbers["num_optimal_prompt_tokens"]
    assert done.stdout == ""
    demo, *said = done.stderr.splitlines()
    assert demo.startswith("batchllm: no -m MODEL: the answers are a random model's")
    assert re.match(r"elapsed .* start .*, read .*, tokenize .*, plan .*, run .*, write ", said[5])
    assert all(line.startswith("batchllm: line ") for line in said[:5])  # one for each bad row, and then the report
    assert len(said) == 5 + 11
    assert "line 2" in done.stderr
    shown = _forked("report", tmp_path / "t.json", "--html", tmp_path / "t.html", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["num_prefill_tokens"] == numbers["num_computed_prompt_tokens"]
    assert (tmp_path / "t.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.engine
def test_a_job_survives_its_scheduler_and_a_stop_and_answers_each_row_once(engines: None, tmp_path: Path) -> None:
    """SIGKILL of the scheduler: another engine takes over. SIGTERM to all processes of the job, as `timeout` sends it:
    what runs is finished; the same command goes on.
    """
    ids = [[100 + i % 11, 7, 8, 9, 1000 + i] for i in range(_NUM_ROWS)]
    sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
    rows = [{"id": str(i), "input_ids": row, "sampling_params": sampling} for i, row in enumerate(ids)]
    source, out, progress = _write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tmp_path / "progress.jsonl"
    flags = ("run", "-i", source, "-o", out, "--progress-file", progress, "--max-total-tokens", "2048")
    with _start(*flags) as driver:
        _wait_for(progress, driver, lambda told: told["num_done"] > 50)
        scheduler = next(
            c for c in psutil.Process(driver.pid).children(recursive=True) if "scheduler" in " ".join(c.cmdline())
        )
        scheduler.kill()
        _wait_for(progress, driver, lambda told: told["num_engine_restarts"] == 1 and told["num_done"] > 150)
        os.killpg(driver.pid, signal.SIGTERM)
        stderr = driver.communicate(timeout=120)[1]
        assert driver.returncode == 3, stderr
        assert "Traceback" not in "".join(line for line in stderr.splitlines() if line.startswith("batchllm"))
    status = json.loads(_forked("status", f"{out}.job", "--json").stdout)
    assert 150 < status["num_finished"] < _NUM_ROWS
    assert [kind for _, kind, _ in status["events"]] == ["start", "engine_death", "stop"]
    assert not out.exists()
    assert run_here(*flags, "--report", tmp_path / "r.json") == 0
    assert [row["id"] for row in _read(out)] == [str(i) for i in range(_NUM_ROWS)]
    assert {len(row["output_ids"]) for row in _read(out)} == {32}
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["num_requests"], report["num_done_before"]) == (_NUM_ROWS, status["num_finished"])
    assert report["num_output_tokens"] == 32 * (_NUM_ROWS - status["num_finished"])


def _start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = of_user()
    command = [sys.executable, "-m", "batchllm", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def _wait_for(progress: Path, driver: subprocess.Popen[str], is_reached: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 120
    while not (progress.exists() and any(map(is_reached, _read(progress)))):
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[1]
        time.sleep(0.05)


def test_simulate_runs_the_same_rows_on_another_device(tmp_path: Path) -> None:
    """Ours reaches the optimum; a baseline on the same rows does not beat it; the trace is one that report reads."""
    shared = "The same words at the beginning of every prompt. " * 5
    rows = [
        {"id": f"{i}{end}", "prompt": f"{i} {shared}{end}", "sampling_params": GREEDY}
        for end in "abc"
        for i in range(9)
    ]
    source = _write(tmp_path / "in.jsonl", rows)
    done = _forked(
        *("simulate", "-i", source, "--device", "H100", "--shape", "Qwen2.5-7B", "--kv-capacity", "400", "--json"),
        *("--scheduler", "sglang-fcfs", "--scheduler", "batchllm", "--trace", tmp_path / "t.json"),
    )
    assert done.returncode == 0, done.stderr
    stock, ours = json.loads(done.stdout)
    assert ours["num_computed_prompt_tokens"] == ours["num_optimal_prompt_tokens"]
    assert stock["num_computed_prompt_tokens"] > ours["num_computed_prompt_tokens"]
    shown = _forked("report", tmp_path / "t.json")
    assert "batchllm" in shown.stdout


def test_a_cost_model_calibrated_on_a_trace_gives_the_times_of_that_trace(tmp_path: Path) -> None:
    """The steps of one simulated device, fitted from the defaults of another."""
    workload = "lognormal:prefix=500,private=100,sharing=8,requests=400,output=60"
    trace, cost = tmp_path / "t.json", tmp_path / "cost.json"
    device = "other:flops=2e15,bandwidth=6e12,memory=9e10"  # its efficiencies are to be found
    command = ("simulate", "--workload", workload, "--json")
    first = _forked(*command, "--device", "H100", "--trace", trace)
    assert first.returncode == 0, first.stderr
    fitted = _forked("calibrate", trace, "--device", device, "-o", cost)
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(cost.read_text())["median_relative_error"] < 0.02
    capacity = str(json.loads(first.stdout)[0]["trace_kv_capacity_tokens"])
    second = _forked(*command, "--calibration", cost, "--kv-capacity", capacity)
    assert second.returncode == 0, second.stderr
    times = [json.loads(done.stdout)[0]["elapsed_s"] for done in (first, second)]
    assert times[1] == pytest.approx(times[0], rel=0.03)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("simulate --workload shared:prefix=0", "prefix"),
        ("simulate --workload nothing", "nothing"),
        ("simulate --workload unshared --device B200", "B200"),
        ("simulate --workload unshared --device x:flops=1", "bandwidth"),
        ("simulate --workload unshared --shape GPT-2", "GPT-2"),
        ("simulate --workload unshared --scheduler best", "best"),
        ("simulate --workload unshared --kv-limit 100", "100"),
        ("simulate --workload unshared -i rows.jsonl", "not allowed"),
        ("simulate --workload unshared --calibration /no/such.json", "/no/such.json"),
        ("simulate --workload unshared --trace /no/such/dir/t.json", "--trace"),
        ("report /no/such.json", "/no/such.json"),
        ("calibrate /no/such.json -o x", "/no/such.json"),
    ],
)
def test_what_cannot_be_simulated_says_why_and_exits_with_2(command: str, word: str) -> None:
    done = _forked(*command.split())
    assert done.returncode == 2, done.stdout
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_of_bad_rows_fails_without_starting_an_engine(tmp_path: Path) -> None:
    """Exit status 1, every row explained."""
    source = _write(tmp_path / "in.jsonl", ["{", {"id": "a"}])
    done = _forked("run", "-i", source, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert len(_read(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["-i", "no/such/file.jsonl", "-o", "{tmp}/o"], "no/such/file.jsonl"),
        (["-i", "{empty}", "-o", "{tmp}/o"], "empty"),
        (["-i", "{good}", "-o", "/no/such/dir/o"], "/no/such/dir"),
        (["-i", "{good}", "-o", "{good}"], "input"),
        (["-i", "{good}", "-o", "{tmp}/o", "--report", "/no/such/dir/r"], "--report"),
        (["-i", "{good}", "-o", "{tmp}/o", "--trace", "/no/such/dir/t"], "--trace"),
    ],
)
def test_a_job_that_cannot_run_says_why_and_exits_with_2(tmp_path: Path, flags: list[str], word: str) -> None:
    """One line, no traceback, no output file."""
    good = _write(tmp_path / "good.jsonl", [{"id": "a", "prompt": "x", "sampling_params": GREEDY}])
    empty = _write(tmp_path / "empty.jsonl", [])
    done = _forked("run", *[f.format(tmp=tmp_path, good=good, empty=empty) for f in flags])
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.engine
@pytest.mark.parametrize("flag", ["--max-total-token 5", "-m /no/such/model"])
def test_a_job_whose_engine_s_process_refuses_it_says_why_and_exits_with_2(
    engines: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    """What else it refuses is in tests/srt/test_engine.py."""
    good = _write(tmp_path / "good.jsonl", [{"id": "a", "prompt": "x", "sampling_params": GREEDY}])
    assert run_here("run", "-i", good, "-o", tmp_path / "o", *flag.split()) == 2
    said = capfd.readouterr().err
    assert flag.split()[flag.startswith("-m ")] in said
    assert "Traceback" not in said
    assert not (tmp_path / "o").exists()


def test_plan_says_what_will_be_shared(tmp_path: Path) -> None:
    """In words, and as JSON whose numbers add up."""
    shared = "The same words at the beginning of every prompt. " * 5
    source = _write(tmp_path / "in.jsonl", [{"id": str(i), "prompt": shared + str(i)} for i in range(20)])
    words = _forked("plan", "-i", source)
    assert words.returncode == 0, words.stderr
    assert "20" in words.stdout
    numbers = json.loads(_forked("plan", "-i", source, "--json").stdout)
    assert numbers["num_requests"] == 20
    assert 0 < numbers["optimal_prefill_tokens"] < numbers["num_prompt_tokens"]
