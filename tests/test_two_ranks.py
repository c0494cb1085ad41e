"""Claims about ``--tp-size 2`` on a CPU, of the command and of a server. (`tests/srt/test_tensor_parallel.py` has the
engine's.)
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from tests.live_server import Server, answers, create, rows, text_of, wait, wait_for_answers
from tests.run_here import run_here

pytestmark = pytest.mark.engine


def _run(folder: Path, name: str, *flags: str) -> list[str]:
    """The command's output lines."""
    out, report = folder / f"{name}.jsonl", folder / f"{name}.json"
    arguments = ("run", "-i", folder / "in.jsonl", "-o", out, "--report", report)
    assert run_here(*arguments, "--max-total-tokens", "4096", "--random-seed", "3", *flags) == 0
    numbers = json.loads(report.read_text())
    assert numbers["num_computed_prompt_tokens"] == numbers["num_optimal_prompt_tokens"] < numbers["num_prompt_tokens"]
    return out.read_text().splitlines()


def test_the_command_writes_the_same_lines_with_two_ranks(tmp_path: Path, engines: None) -> None:
    """60 rows over 6 documents, drawn by their seeds; at the optimum."""
    sampling = {"temperature": 0.8, "max_new_tokens": 8}
    made = [
        {"id": str(i), "input_ids": [100 + i % 6] * 200 + [500 + i], "sampling_params": sampling} for i in range(60)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    one, two = _run(tmp_path, "one"), _run(tmp_path, "two", "--tp-size", "2")
    assert len(two) == 60
    assert two == one


@pytest.mark.thorough
def test_a_server_of_two_ranks_goes_on_when_one_is_killed(tmp_path: Path) -> None:
    """A live request is answered beside a batch; both ranks are started again, and every row is answered once."""
    server = Server(tmp_path, flags=["--tp-size", "2"])
    server.start(is_forked=False)
    try:
        lines = rows(4, 100, max_tokens=48, ignore_eos=True)
        batch = create(server, lines)
        wait_for_answers(server, batch.id, 1)
        body = {name: value for name, value in lines[7]["body"].items() if name != "ignore_eos"}
        answer = server.client.completions.create(**body, extra_body={"ignore_eos": True})
        assert server.process is not None
        children = psutil.Process(server.process.pid).children(recursive=True)
        ranks = [child for child in children if "scheduler" in " ".join(child.cmdline())]
        assert len(ranks) == 2, [child.cmdline() for child in children]
        ranks[1].kill()
        assert server.client.batches.retrieve(batch.id).status == "in_progress"
        done = wait(server, batch.id)
        assert done.request_counts is not None
        assert (done.status, done.request_counts.completed) == ("completed", len(lines))
        found = answers(server, done.output_file_id)
        assert set(found) == {line["custom_id"] for line in lines}
        assert text_of(found[lines[7]["custom_id"]]) == answer.choices[0].text
        assert not any(rank.is_running() for rank in ranks)
    finally:
        server.client.close()
        if server.process is not None:
            server.end()
