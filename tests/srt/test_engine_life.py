"""Claims about the end of an engine, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchllm.host import own_folder
from tests.environment import of_user
from tests.shared_memory import left_behind, ownerless

pytestmark = pytest.mark.engine

_SCRIPT = """
import psutil
from batchllm import BatchEngine
from batchllm.errors import EngineDiedError
from batchllm.host import template

if __name__ == "__main__":
    imported = template.acquire(is_verbose=False)
    engine = BatchEngine(max_total_tokens=2000)
    prompts = [[10 + i % 7, 20 + i, 30] for i in range(400)]
    stream = engine.batch_generate_iter(input_ids=prompts, sampling_params={"max_new_tokens": 64, "ignore_eos": True})
    next(stream)
    (scheduler,) = [c for c in psutil.Process().children(recursive=True) if "scheduler" in " ".join(c.cmdline())]
    scheduler.kill()
    for attempt in ("the batch that ran", "the next one"):
        try:
            list(stream)
        except EngineDiedError:
            print("died:", attempt)
        stream = engine.batch_generate_iter(["another"])
    engine.shutdown()
    engine.shutdown()
    engine = BatchEngine(max_total_tokens=2000)  # another one in the same process, whose end nobody is told of
    template.release(imported)
    list(engine.batch_generate_iter(input_ids=[[5, 6]], sampling_params={"max_new_tokens": 2}))
    (scheduler,) = [c for c in psutil.Process().children(recursive=True) if "scheduler" in " ".join(c.cmdline())]
    scheduler.kill()
    engine.shutdown()
    print("left:", [child.cmdline() for child in psutil.Process().children(recursive=True)])
"""


def test_a_dead_scheduler_raises_and_shutdown_leaves_nothing(tmp_path: Path) -> None:
    """SIGKILL in mid-batch: the batch and every later one raise, and no process, socket or semaphore stays behind,
    its own or those of an engine whose process was killed."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    dead, alive = temporary / "batchllm-4194305-abcdefgh", temporary / f"batchllm-{os.getpid()}-abcdefgh"
    for folder in (dead, alive):  # the first is above the largest pid there can be
        folder.mkdir()
        own_folder.mark(folder)
    shared_memory = ownerless()
    environment = of_user()
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment | {"TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["died: the batch that ran", "died: the next one", "left: []"]
    assert list(temporary.iterdir()) == [alive]
    assert not left_behind(shared_memory)
