"""Whatever bytes an input has, ``batchllm run`` ends with a status and words (``eval/check_fuzz.py``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.jobs import read_lines, rows_of, write_rows
from tests.sizes import sized

CHECK = Path(__file__).parents[2] / "eval" / "check_fuzz.py"


@pytest.mark.slow
def test_no_odd_or_damaged_file_escapes_hangs_or_loses_a_row() -> None:
    # The first hundred have every change, format and flag among them.
    sizes = ["--files", str(sized(100, 300)), "--workers", str(sized(1, 2))]
    done = subprocess.run([sys.executable, str(CHECK), *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 files went wrong" in done.stdout


def test_a_number_of_thousands_of_digits_as_text_fails_its_row_only(command: Command, tmp_path: Path) -> None:
    """Python itself refuses to read one."""
    body = {"model": "m", "prompt": [5], "metadata": {"expected_new_tokens": "9" * 5000}}
    long = {"custom_id": "long", "method": "POST", "url": "/v1/completions", "body": body}
    source, out = write_rows(tmp_path / "in.jsonl", [*rows_of(2), long]), tmp_path / "out.jsonl"
    command("run", "-i", source, "-o", out).check(1)
    assert len(read_lines(out)) == 3
