"""Several real engines on a Ray: what one engine answers, token for token, and what they compute."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from batchllm.dataset import ColumnMap
from batchllm.default_model import default_model_path
from batchllm.planner import plan_batch
from batchllm.ray import BatchStage, plan
from batchllm.tokenizer import Tokenizer
from batchllm.tokens import TokenTable
from tests.cli.jobs import read_lines, write_rows
from tests.distributed.conftest import HeldCluster
from tests.environment import of_user
from tests.run_here import run_here

_FLAGS = ("--max-total-tokens", "4096", "--random-seed", "7", "--demo-model")


class _Run(NamedTuple):
    answers: list[tuple[str, list[int]]]
    report: dict[str, Any]
    words: str


def _rows() -> list[dict[str, Any]]:
    """Groups of very different sizes, one larger than an engine's share; a third of the rows is drawn."""
    rows: list[dict[str, Any]] = []
    for group, size in enumerate((90, 12, 6, 3, 1, 1, 1)):
        document = f"Document {group} tells of a river, a town and a bridge that was built twice. " * (4 + group)
        for i in range(size):
            sampling = {"max_new_tokens": 4 + i % 5, "temperature": 0.8 if i % 3 == 0 else 0.0, "ignore_eos": True}
            rows.append({"id": f"{group}-{i}", "prompt": f"{document}Question {i}:", "sampling_params": sampling})
    return rows


def _run(base: Path, *flags: str, program: tuple[str, ...] = ("-m", "batchllm")) -> _Run:
    """The command in a process and a temporary folder of its own."""
    temporary = base / "t"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, *program, *_arguments(base), *flags],
        env=of_user() | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert not os.listdir(temporary)
    return _result(base, done.stderr)


def _arguments(base: Path) -> list[str]:
    write_rows(base / "in.jsonl", _rows())
    files = ("-i", str(base / "in.jsonl"), "-o", str(base / "out.jsonl"), "--report", str(base / "report.json"))
    return ["run", *files, *_FLAGS]


def _result(base: Path, words: str) -> _Run:
    answers = [(line["id"], line["output_ids"]) for line in read_lines(base / "out.jsonl")]
    return _Run(answers, json.loads((base / "report.json").read_text()), words)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, engines: None) -> _Run:
    """What one engine makes of the rows."""
    base = tmp_path_factory.mktemp("one")
    assert run_here(*_arguments(base)) == 0
    return _result(base, "")


def _check(several: _Run, one: _Run) -> None:
    """Token for token, drawn rows too; of prompts the optimum of one engine, and what the plan says of its cuts."""
    assert several.answers == one.answers
    assert one.report["num_cut_tokens"] == 0 < several.report["num_cut_tokens"]
    limit = 1.01 * one.report["num_optimal_prompt_tokens"] + several.report["num_cut_tokens"]
    assert several.report["num_computed_prompt_tokens"] <= limit
    assert "for several engines" in several.words


@pytest.mark.engine
def test_two_engines_answer_what_one_does_and_compute_no_more_than_the_cuts_cost(one: _Run, tmp_path: Path) -> None:
    _check(_run(tmp_path, "--replicas", "2"), one)


_ON_SHARED_CORES = """
import sys
from batchllm.cli import command, replicas
from batchllm.distributed.cluster import Resources
replicas.Cluster.resources = lambda *_: Resources(num_cpus=0, num_gpus=0)
sys.exit(command(sys.argv[1:]))
"""


@pytest.mark.engine
@pytest.mark.thorough
def test_four_engines_do_too(one: _Run, tmp_path: Path) -> None:
    """Whatever the number of cores."""
    _check(_run(tmp_path, "--replicas", "4", program=("-c", _ON_SHARED_CORES)), one)


class _CountedStage(BatchStage):
    """Writes what each unit has computed into a file of its own."""

    def __init__(self, folder: str, **options: Any) -> None:
        self._folder = folder
        super().__init__(**options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers = super().__call__(batch)
        assert self.last_report is not None
        unit = batch["unit"][0].as_py()
        report = {"num_computed": self.last_report.num_computed_prompt_tokens}
        Path(self._folder, f"{unit}.json").write_text(json.dumps(report))
        return answers


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray's own code
def test_a_dataset_is_answered_by_two_engines_as_by_one(cluster: HeldCluster, one: _Run, tmp_path: Path) -> None:
    """Greedy rows token for token, a bad row alone with its code, carried columns; of prompts no more than the optimum
    of each unit.
    """
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [row | {"note": {"place": place}} for place, row in enumerate(_rows())]
    rows.append({"id": "bad", "prompt": "", "sampling_params": rows[0]["sampling_params"], "note": {"place": -1}})
    random.Random(0).shuffle(rows)
    dataset = ray.data.from_arrow(pa.Table.from_pylist(rows)).repartition(3)
    units = plan(dataset, num_engines=2).materialize()
    answers = units.map_batches(
        _CountedStage,
        fn_constructor_args=(str(tmp_path),),
        fn_constructor_kwargs={"columns": ColumnMap(carry=("note",)), "max_total_tokens": 4096},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
        num_cpus=0.25,
    ).take_all()

    found = {row["id"]: row for row in answers}
    assert len(answers) == len(rows) and found.keys() == {row["id"] for row in rows}
    assert [row["id"] for row in answers if row["error_code"]] == ["bad"]
    assert found["bad"]["error_code"] == "empty_prompt"
    assert all(found[row["id"]]["note"] == row["note"] for row in rows)
    greedy = {row["id"] for row in _rows() if row["sampling_params"]["temperature"] == 0}
    expected = {name: tokens for name, tokens in one.answers if name in greedy}
    assert {name: found[name]["output_ids"] for name in greedy} == expected

    reports = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    prompts = [[row["prompt"] for row in unit["rows"] if row["prompt"]] for unit in units.take_all()]
    best, of_units = _optimum([prompt for unit in prompts for prompt in unit]), sum(map(_optimum, prompts))
    num_computed = sum(report["num_computed"] for report in reports)
    assert len(reports) == len(prompts)
    assert best == one.report["num_optimal_prompt_tokens"]
    assert best <= num_computed <= of_units  # the fewest where one engine was quick enough to answer all
    assert of_units - best <= 2 * units.sum("num_cut_tokens")  # which knows characters, not tokens


def _optimum(prompts: list[str]) -> int:
    """The fewest tokens that an engine computes for these prompts."""
    if not prompts:
        return 0
    tokens = Tokenizer.from_model(default_model_path()).encode(prompts)
    return plan_batch(TokenTable.from_lists([np.asarray(ids).tolist() for ids in tokens])).optimal_prefill_tokens
