"""What starting costs: a small job, a server, an idle engine, the first plan. This checkout beside another.

    git clone . /tmp/before && (cd /tmp/before && git checkout COMMIT && scripts/setup)
    python eval/bench_start.py --before /tmp/before --out eval/results/start.md

The two sides run in turn, each in an empty environment; what is compared is the median of the ratios of pairs. The
bounds: the job at most 0.55 of its time before and the same answers, ``/health`` at most 0.6, memory at most 0.6, an
idle engine and an idle server less than 2 % of a core, the first plan after set-up less than 2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import compare
import psutil

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 300
_IDLE_S = 10
_PARTS = ("job", "server", "engine", "plan")
_ENGINE = """
import sys
from batchllm import BatchEngine
if __name__ == "__main__":
    with BatchEngine() as engine:
        engine.batch_generate(input_ids=[[5, 6]], sampling_params={"max_new_tokens": 2})
        print("idle", flush=True)
        sys.stdin.read()
"""
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="another checkout, set up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default=",".join(_PARTS))
    parser.add_argument("--out")
    args = parser.parse_args()
    sides = {"before": args.before.resolve(), "now": _ROOT}
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as home:
        for part in args.parts.split(","):
            for number in range(-1, args.rounds):  # the first of each is warm-up
                for side, checkout in sides.items():
                    result = {"part": part, "side": side, "round": number, **_MEASURES[part](checkout, Path(home))}
                    print(json.dumps(result), flush=True)
                    if number >= 0:
                        results.append(result)
    commits = {side: _git(checkout, "rev-parse", "--short=12", "HEAD") for side, checkout in sides.items()}
    text = (
        f"Commits: {commits['before']} before, {commits['now']} now. {time.strftime('%Y-%m-%d')}.\n\n{_tables(results)}"
    )
    compare.write(args.out, "Starting", text, results)


def _run_job(checkout: Path, home: Path) -> Result:
    """The command of ``scripts/demo``."""
    out = home / f"{checkout.name}.jsonl"
    command = _command(checkout, "run", "-i", str(_ROOT / "examples/questions.jsonl"), "-o", str(out), "--restart")
    began = time.monotonic()
    done = subprocess.run(command, env=_environment(home), capture_output=True, text=True, timeout=_TIMEOUT_S)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    # The time of day is in OpenAI's records.
    answers = re.sub(rb'"created": ?\d+', b"", out.read_bytes())
    return {"seconds": seconds, "answers": hash(answers)}


def _run_server(checkout: Path, home: Path) -> Result:
    """A server until it answers ``/health``, and then idle."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--port", str(port), "--batch-storage", str(home / f"storage-{checkout.name}"))
    began = time.monotonic()
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(_command(checkout, "serve", *flags), env=_environment(home), stdout=log, stderr=log)
    try:
        _wait_for_health(f"http://127.0.0.1:{port}/health", server)
        return {"seconds": time.monotonic() - began, **_idle(server.pid)}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(_TIMEOUT_S)


def _run_engine(checkout: Path, home: Path) -> Result:
    """A `BatchEngine` that has answered a batch, idle."""
    script = home / "engine.py"
    script.write_text(_ENGINE)
    driver = subprocess.Popen(
        [str(checkout / ".venv/bin/python"), str(script)],
        env=_environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert driver.stdout is not None and driver.stdin is not None
    try:
        if not any(line == b"idle\n" for line in driver.stdout):
            raise RuntimeError("the engine did not start")
        return _idle(driver.pid)
    finally:
        driver.stdin.close()
        driver.wait(_TIMEOUT_S)


def _run_plan(checkout: Path, home: Path) -> Result:
    """The first job of a new user: planning it, as its report says, with what set-up has left and nothing else."""
    report = home / "report.json"
    with tempfile.TemporaryDirectory() as new_home:
        command = _command(checkout, "run", "-i", str(_ROOT / "examples/questions.jsonl"), "-o", str(home / "p.jsonl"))
        subprocess.run(
            [*command, "--restart", "--report", str(report)],
            env=_environment(Path(new_home)),
            capture_output=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    return {"plan_s": json.loads(report.read_text())["plan_s"]}


_MEASURES = {"job": _run_job, "server": _run_server, "engine": _run_engine, "plan": _run_plan}


def _command(checkout: Path, *arguments: str) -> list[str]:
    return [str(checkout / ".venv/bin/batchllm"), *arguments]


def _environment(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}


def _wait_for_health(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError("the server did not come up")


def _idle(pid: int) -> Result:
    """Memory of a process and all below it, as proportional set size, and the processor that they use doing nothing."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    time.sleep(2)
    before, began = [sum(process.cpu_times()[:2]) for process in processes], time.monotonic()
    time.sleep(_IDLE_S)
    used = sum(sum(process.cpu_times()[:2]) for process in processes) - sum(before)
    return {
        "pss_mib": sum(process.memory_full_info().pss for process in processes) / 2**20,
        "idle_share": used / (time.monotonic() - began),
    }


def _tables(results: list[Result]) -> str:
    rows = []
    for part, field, name, bound in (
        ("job", "seconds", "`scripts/demo`'s command, s", "0.55"),
        ("server", "seconds", "server until `/health` answers, s", "0.6"),
        ("server", "pss_mib", "idle server, MiB (proportional set size, all processes)", "0.6"),
        ("engine", "pss_mib", "idle `BatchEngine`, MiB", "0.6"),
        ("server", "idle_share", "idle server, part of a core", "0.02 of a core"),
        ("engine", "idle_share", "idle `BatchEngine`, part of a core", "0.02 of a core"),
        ("plan", "plan_s", "plan of the first job after set-up, s", "2 s"),
    ):
        before, now = (
            [result[field] for result in results if result["part"] == part and result["side"] == side]
            for side in ("before", "now")
        )
        if not now:
            continue
        ratio = statistics.median(a / b for a, b in zip(now, before, strict=True))
        each = ", ".join(f"{value:.3g}" for value in now)
        rows.append(
            [name, f"{statistics.median(before):.4g}", f"{statistics.median(now):.4g}", f"{ratio:.3f}", bound, each]
        )
    answers = {result["answers"] for result in results if "answers" in result}
    note = f"\n\nAnswers of the job, both sides, all rounds: {len(answers)} version(s)." if answers else ""
    return compare.table(["what", "before", "now", "now / before, median", "at most", "each now"], rows) + note


def _git(checkout: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
