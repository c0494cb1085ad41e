"""Importing the rooms that decide loads neither torch nor sglang: it takes no GPU and no seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = ("torch", "sglang", "transformers")


def _loaded_after(code: str) -> list[str]:
    """Heavy packages that a fresh interpreter has loaded after ``code``."""
    report = f"{code}\nimport sys\nprint(*(name for name in {_HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_pure_rooms_load_nothing_heavy() -> None:
    rooms = (
        "batchllm, batchllm.errors, batchllm.request, batchllm.tokens, batchllm.tokenizer, batchllm.planner, "
        "batchllm.prefix_cache, batchllm.scheduler, batchllm.dataset, batchllm.offline.job, "
        "batchllm.offline.runner, batchllm.offline.report, batchllm.offline.progress, batchllm.perf_model, "
        "batchllm.sim, batchllm.trace"
    )
    assert _loaded_after(f"import {rooms}") == []


def test_the_command_line_loads_nothing_heavy_before_it_runs() -> None:
    assert _loaded_after("import batchllm.cli") == []


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
