"""A job that is killed again and again: SIGKILL of the driver or a process of its engine, at random moments.

The bounds: in the end every row is answered exactly once; no row that was acknowledged is computed again; nothing is
left behind. Answers are those of an undisturbed run, but where two tokens are all but equally likely: what is left
after a kill of the driver is planned anew, and float32 sums of other cuts are rounded otherwise.

    python eval/check_kills.py --kills 100 --out eval/results/kills.md
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import compare
import psutil

_TARGETS = ("driver", "engine", "template", "scheduler", "detokenizer")
_LONGEST_DELAY_S = 10.0
_LONGEST_RUN_S = 3.0
"""Half of the kills come at any moment, which is mostly while an engine starts; the others while rows are answered."""


class Job:
    """A job, launched again whenever its driver has ended before its time."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder = folder
        self.out = folder / "out.jsonl"
        self.log = folder / "log.txt"
        self.input = folder / "in.jsonl"
        _write_rows(self.input, num_rows)
        self.process: subprocess.Popen[bytes] | None = None
        self.num_launches = 0
        self.acknowledged: dict[int, int] = {}
        """Of each row that has a result its number in the journal."""

    def launch(self) -> None:
        """Start the driver, by the same command every time."""
        command = [
            *(sys.executable, "-m", "batchllm", "run", "-i", str(self.input), "-o", str(self.out)),
            *("--max-total-tokens", "8192", "--random-seed", "3"),
        ]
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stderr=log,
                env=os.environ | {"TMPDIR": str(temporary)},
            )
        self.num_launches += 1

    def find(self, target: str) -> psutil.Process | None:
        """The process to kill, if it is there yet."""
        assert self.process is not None
        try:
            driver = psutil.Process(self.process.pid)
            if target == "driver":
                return driver
            return next(
                (child for child in driver.children(recursive=True) if target in " ".join(child.cmdline())), None
            )
        except psutil.NoSuchProcess:
            return None

    def num_recorded(self) -> int:
        """Rows in the journal now."""
        path = Path(f"{self.out}.job", "journal.db")
        if not path.exists():
            return 0
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return int(database.execute("SELECT num_rows FROM total").fetchone()[0])

    def wait(self, rng: random.Random) -> bool:
        """Until it is time to kill again; returns whether rows are being answered."""
        assert self.process is not None
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.0, _LONGEST_DELAY_S))
            return False
        before, deadline = self.num_recorded(), time.monotonic() + 120
        while self.num_recorded() == before and self.process.poll() is None:
            assert time.monotonic() < deadline, "nothing has been answered for two minutes"
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, _LONGEST_RUN_S))
        return True

    def check_journal(self) -> None:
        """Rows once in the journal stay there, in their place, and there is one of each."""
        path = Path(f"{self.out}.job", "journal.db")
        if not path.exists():
            return
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        found = database.execute("SELECT idx, seq FROM result").fetchall()
        database.close()
        rows = dict(found)
        assert len(rows) == len(found), "a row is in the journal twice"
        for index, place in self.acknowledged.items():
            assert rows.get(index) == place, f"row {index} was acknowledged and is gone, or was computed again"
        self.acknowledged = rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=18_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    shared_memory = set(os.listdir("/dev/shm"))
    processes = _engine_processes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = _torture(Job(folder / "killed", args.rows), args.kills, random.Random(args.seed))
        result |= _compare(folder, args.rows)
        result["left in /dev/shm"] = ", ".join(sorted(set(os.listdir("/dev/shm")) - shared_memory)) or 0
        result["processes left"] = len(_engine_processes() - processes)
    rows = [[key, value] for key, value in result.items()]
    compare.write(args.out, "Kills", compare.table(["", ""], rows), [result])


def _torture(job: Job, num_kills: int, rng: random.Random) -> dict[str, Any]:
    kills: Counter[str] = Counter()
    num_while_answering = 0
    started = time.monotonic()
    job.launch()
    while sum(kills.values()) < num_kills:
        target = rng.choice(_TARGETS)
        is_answering = job.wait(rng)
        assert job.process is not None
        if job.process.poll() is not None:
            assert job.process.returncode != 0, f"done after {kills.total()} kills: give it more --rows"
            job.check_journal()
            job.launch()
            continue
        process = job.find(target)
        if process is None:
            continue
        process.send_signal(signal.SIGKILL)
        kills[target] += 1
        if target == "driver":
            job.process.wait()
            job.check_journal()
            job.launch()
        num_while_answering += is_answering
        print(f"kill {kills.total()}: {target}, {job.num_recorded()} rows in the journal", flush=True)
    assert job.process is not None
    while (status := job.process.wait()) != 0:
        print(f"the driver ended with {status}", flush=True)
        assert status == 2, "only a job that could not go on may be launched again"
        job.launch()
    job.check_journal()
    log = job.log.read_text()
    assert "Traceback (most recent call last):\n  File" not in _own_part(log), log[-3000:]
    return {
        **{f"kills of the {target}": kills[target] for target in _TARGETS},
        "launches": job.num_launches,
        "rows": len(job.acknowledged),
        "kills while rows were being answered": num_while_answering,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "left in the temporary folder": ", ".join(sorted(os.listdir(job.folder / "tmp"))) or 0,
    }


def _engine_processes() -> set[int]:
    """Drivers and processes of engines of this machine."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if any(name in command for name in ("sglang::", "batchllm::", "batchllm run", "multiprocessing")):
            found.add(process.info["pid"])
    return found


def _own_part(log: str) -> str:
    """What the driver said; a process that loses its peers may complain as it likes."""
    return "\n".join(line for line in log.splitlines() if line.startswith("batchllm"))


def _compare(folder: Path, num_rows: int) -> dict[str, Any]:
    """The output of the killed job beside that of one that was left alone."""
    alone = Job(folder / "alone", num_rows)
    alone.launch()
    assert alone.process is not None and alone.process.wait() == 0
    killed_lines, lines = (_answers(path / "out.jsonl") for path in (folder / "killed", folder / "alone"))
    assert [line["id"] for line in killed_lines] == [line["id"] for line in lines]
    parting = [
        (input_line["input_ids"], one["output_ids"], other["output_ids"])
        for input_line, one, other in zip(_lines(folder / "alone" / "in.jsonl"), killed_lines, lines, strict=True)
        if (one["text"], one["output_ids"]) != (other["text"], other["output_ids"])
    ]
    found: dict[str, Any] = {
        "rows answered once": len(killed_lines),
        "answers that differ from an undisturbed run": len(parting),
    }
    if parting:
        found["the largest gap between two tokens where such answers part"] = f"{_largest_gap(folder, parting):.1e}"
    return found


def _largest_gap(folder: Path, parting: list[tuple[list[int], list[int], list[int]]]) -> float:
    """Between the log probabilities of the two tokens at which answers part, each scored behind what both share.

    Answers that rounding has parted had two tokens that were all but equally likely there.

    Args:
        folder: For the files.
        parting: Of each such row its prompt and its two answers.
    """
    scored = folder / "gaps.jsonl"
    with scored.open("w") as file:
        for prompt, one, other in parting:
            assert len(one) == len(other), "rows of a fixed length have answers of one length"
            at = next(i for i, (left, right) in enumerate(zip(one, other, strict=True)) if left != right)
            for token in (one[at], other[at]):
                row = {"input_ids": prompt + one[:at] + [token], "score": {"from": len(prompt) + at}}
                file.write(json.dumps(row) + "\n")
    out = folder / "gaps_out.jsonl"
    subprocess.run([sys.executable, "-m", "batchllm", "run", "-i", str(scored), "-o", str(out)], check=True)
    scores = [line["score"]["logprob"] for line in _lines(out)]
    return max(abs(left - right) for left, right in zip(scores[::2], scores[1::2], strict=True))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _answers(path: Path) -> list[dict[str, Any]]:
    lines = _lines(path)
    assert len({line["id"] for line in lines}) == len(lines)
    return lines


def _write_rows(path: Path, num_rows: int) -> None:
    path.parent.mkdir(parents=True)
    rng = random.Random(1)
    groups = [[rng.randrange(10, 4000) for _ in range(96)] for _ in range(max(1, num_rows // 20))]
    with path.open("w") as file:
        for i in range(num_rows):
            ids = groups[i % len(groups)] + [rng.randrange(10, 4000) for _ in range(16)]
            sampling = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
            file.write(json.dumps({"id": str(i), "input_ids": ids, "sampling_params": sampling}) + "\n")


if __name__ == "__main__":
    main()
