"""Two real engines on a Ray of the job's own: what one engine answers, token for token, and what they compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.jobs import read_lines, write_rows

_FLAGS = ("--max-total-tokens", "4096", "--random-seed", "7", "--demo-model")


def _rows() -> list[dict[str, Any]]:
    """Groups of very different sizes, one larger than an engine's share; a third of the rows is drawn."""
    rows: list[dict[str, Any]] = []
    for group, size in enumerate((90, 12, 6, 3, 1, 1, 1)):
        document = f"Document {group} tells of a river, a town and a bridge that was built twice. " * (4 + group)
        for i in range(size):
            sampling = {"max_new_tokens": 4 + i % 5, "temperature": 0.8 if i % 3 == 0 else 0, "ignore_eos": True}
            rows.append({"id": f"{group}-{i}", "prompt": f"{document}Question {i}:", "sampling_params": sampling})
    return rows


def _run(base: Path, name: str, *flags: str) -> tuple[list[Any], dict[str, Any], str]:
    """Answers, report and words of the command in a process and a temporary folder of its own."""
    out, report, temporary = base / f"{name}.jsonl", base / f"{name}.json", base / f"t{name}"
    temporary.mkdir()
    files = ("-i", str(base / "in.jsonl"), "-o", str(out), "--report", str(report))
    done = subprocess.run(
        [sys.executable, "-m", "batchllm", "run", *files, *_FLAGS, *flags],
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert not os.listdir(temporary)
    return [(line["id"], line["output_ids"]) for line in read_lines(out)], json.loads(report.read_text()), done.stderr


@pytest.mark.engine
def test_two_engines_answer_what_one_does_and_compute_no_more_than_the_cuts_cost(tmp_path: Path) -> None:
    """Token for token, drawn rows too; of prompts the optimum of one engine, and what the plan says of its cuts."""
    write_rows(tmp_path / "in.jsonl", _rows())
    one, alone, _ = _run(tmp_path, "one")
    two, together, words = _run(tmp_path, "two", "--replicas", "2")
    assert two == one
    assert alone["num_cut_tokens"] == 0 < together["num_cut_tokens"]
    limit = 1.01 * alone["num_optimal_prompt_tokens"] + together["num_cut_tokens"]
    assert together["num_computed_prompt_tokens"] <= limit
    assert "for several engines" in words
