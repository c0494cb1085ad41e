"""Importing the rooms that decide, and the commands that run nothing, load neither torch nor sglang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_HEAVY = ("torch", "sglang", "transformers", "ray")


def _loaded_after(code: str) -> list[str]:
    """Heavy packages that a fresh interpreter has loaded after ``code``."""
    report = f"{code}\nimport sys\nprint('loaded', *(name for name in {_HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_pure_rooms_load_nothing_heavy() -> None:
    rooms = (
        "batchllm, batchllm.errors, batchllm.request, batchllm.tokens, batchllm.tokenizer, batchllm.planner, "
        "batchllm.prefix_cache, batchllm.scheduler, batchllm.dataset, batchllm.offline.job, "
        "batchllm.offline.runner, batchllm.offline.report, batchllm.offline.progress, batchllm.perf_model, "
        "batchllm.sim, batchllm.trace, batchllm.host.runtime, batchllm.host.template, batchllm.distributed.runtime, "
        "batchllm.ray"
    )
    assert _loaded_after(f"import {rooms}") == []


def test_the_command_line_loads_nothing_heavy_before_it_runs() -> None:
    assert _loaded_after("import batchllm.cli, batchllm.cli.parser") == []


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs, and the job folder and the trace of a run on an instant engine."""
    from tests.cli.jobs import batchllm

    folder = tmp_path_factory.mktemp("weight")
    rows = {
        "text": {"prompt": "some words"},
        "ids": {"input_ids": [5, 6, 7]},
        "chat": {"messages": [{"role": "user", "content": "hello"}]},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i in range(3)))
    batchllm("run", "-i", folder / "ids.jsonl", "-o", folder / "out.jsonl", "--trace", folder / "trace.json").check(0)
    return folder


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("status {job}/out.jsonl.job", []),
        ("report {job}/trace.json --html {job}/page.html", []),
        ("simulate --workload shared:prefix=100,private=10,sharing=4,requests=20", []),
        ("simulate -i {job}/ids.jsonl", []),
        ("plan -i {job}/ids.jsonl", []),
        ("plan -i {job}/text.jsonl", ["transformers"]),
        ("plan -i {job}/chat.jsonl", ["torch", "sglang", "transformers"]),
    ],
)
def test_commands_that_run_nothing_need_neither_torch_nor_sglang(job: Path, command: str, needed: list[str]) -> None:
    """Rows of text need transformers' tokenizers, and no more of it."""
    arguments = command.format(job=job).split()
    code = f"from batchllm.cli import command\nassert command({arguments!r}) == 0"
    assert _loaded_after(code) == needed


def test_every_public_name_but_those_of_the_engine_resolves_without_anything_heavy() -> None:
    code = (
        "import batchllm\n"
        "engine = {'BatchEngine', 'batch_generate'}\n"
        "assert engine < set(batchllm.__all__)\n"
        "for name in set(batchllm.__all__) - engine:\n"
        "    assert getattr(batchllm, name).__name__ == name"
    )
    assert _loaded_after(code) == []


def test_the_engine_s_names_resolve_without_anything_heavy_until_an_engine_is_made() -> None:
    assert _loaded_after("from batchllm import BatchEngine, batch_generate") == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    import batchllm

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = batchllm.nonsense
