"""What was compiled at set-up is all that planning a job needs: the first plan waits for no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import batchllm
from tests.environment import of_user

_PLAN = """
import numpy as np
from batchllm.planner import explain, plan_batch
from batchllm.planner.planner import RunCutter
from batchllm.tokens import TokenTable

rng = np.random.Generator(np.random.PCG64(3))
shared = rng.integers(0, 900, (9, 70)).tolist()
table = TokenTable.from_lists([shared[i % 9] + rng.integers(0, 900, i % 31 + 1).tolist() for i in range(400)])
lens = np.full(400, 9, np.int64)
plan = plan_batch(table, decode_lens=lens, group_order="balanced", namespaces=np.arange(400) % 2)
RunCutter(plan, table, lens.astype(np.int32)).cut(0, 400)
explain(plan, table)
"""


def _compiled() -> dict[Path, float]:
    folder = Path(batchllm.__file__).parent
    return {path: path.stat().st_mtime for path in folder.rglob("__pycache__/*.nb[ci]")}


def test_planning_compiles_nothing_after_set_up() -> None:
    """`scripts/setup` has run `compile_ahead`; a job of another size and shape finds every function compiled."""
    before = _compiled()
    assert before, "run scripts/setup"
    environment = of_user()
    subprocess.run([sys.executable, "-c", _PLAN], check=True, env=environment)
    assert _compiled() == before
