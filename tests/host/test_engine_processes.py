"""Claims about the processes of an engine: forks of one that has imported SGLang, which the driver has not."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file, save_file

from batchllm import BatchEngine
from batchllm.errors import EngineDiedError, EngineError
from batchllm.host import template
from tests.environment import of_user

pytestmark = pytest.mark.engine

GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
PROMPTS = [[5, 6, 7], [5, 6, 8]]


@pytest.fixture(scope="module")
def expected(engine: BatchEngine) -> list[list[int]]:
    return _answers(engine)


def _answers(engine: BatchEngine) -> list[list[int]]:
    return [list(c.output_ids) for c in engine.batch_generate(input_ids=PROMPTS, sampling_params=GREEDY)]


def _processes(engine: BatchEngine) -> dict[str, psutil.Process]:
    """Processes of an engine, by what they call themselves."""
    host = psutil.Process(engine.runtime.host_pid)
    return {" ".join(process.cmdline()).rpartition("::")[2].strip(): process for process in [host, *host.children()]}


def _memory(process: psutil.Process, field: str) -> int:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    (found,) = re.findall(rf"^{field}:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found)


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_processes_of_an_engine_share_the_memory_of_what_was_imported(engine: BatchEngine) -> None:
    """Of what the engine's and the detokenizer's process have in memory, most is also that of others."""
    processes = _processes(engine)
    for name in ("engine", "detokenizer"):
        process = processes[name]
        assert _memory(process, "Pss") < 0.5 * _memory(process, "Rss"), name


def test_an_idle_engine_uses_no_processor(engine: BatchEngine) -> None:
    """Less than 2 % of a core, all processes together; and the next batch is answered."""
    _answers(engine)
    processes = list(_processes(engine).values())

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    time.sleep(0.5)  # what a batch leaves to do
    before, began = used(), time.monotonic()
    time.sleep(4)
    assert used() - before < 0.02 * (time.monotonic() - began)
    assert len(_answers(engine)) == 2


def test_an_engine_is_used_from_any_thread_also_when_its_own_has_ended(
    engines: None, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while it is ended ends it none the less."""
    made: list[BatchEngine] = []
    maker = threading.Thread(target=lambda: made.append(BatchEngine(max_total_tokens=2000)))
    maker.start()
    maker.join()
    with made[0] as engine:
        answers: list[Any] = []
        user = threading.Thread(target=lambda: answers.append(_answers(engine)))
        user.start()
        user.join()
        assert answers == [expected]
        assert _answers(engine) == expected
        own = _processes(engine).values()
        waits = [KeyboardInterrupt, None]

        def wait(*arguments: Any, **options: Any) -> Any:
            if interrupt := waits.pop(0):
                raise interrupt
            return wait_procs(*arguments, **options)

        wait_procs = psutil.wait_procs
        monkeypatch.setattr(psutil, "wait_procs", wait)
        with pytest.raises(KeyboardInterrupt):
            engine.shutdown()
        assert waits == []
        _wait_until(lambda: not any(map(psutil.Process.is_running, own)))


def test_an_engine_is_used_where_an_event_loop_runs(engine: BatchEngine, expected: list[list[int]]) -> None:
    """As in a notebook."""

    async def cell() -> list[list[int]]:
        return _answers(engine)

    assert asyncio.run(cell()) == expected


def test_what_an_engine_was_asked_cannot_be_cancelled(engine: BatchEngine, expected: list[list[int]]) -> None:
    """Who waits may be; the answer comes all the same, and finds a place."""
    asked = engine.runtime.call_soon("manager", "get_internal_state")

    async def cancel_the_wait() -> None:
        waiting = asyncio.ensure_future(asyncio.wrap_future(asked))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(cancel_the_wait())
    assert asked.result(60)
    assert _answers(engine) == expected


@pytest.mark.parametrize("victim", ["engine", pytest.param("scheduler", marks=pytest.mark.thorough), "detokenizer"])
def test_a_process_that_is_killed_fails_what_runs_and_what_comes(engines: None, victim: str) -> None:
    """At once, whichever it is, while the engine is idle; the driver goes on, and no process and no folder stays.

    That of a scheduler which runs a batch is in tests/srt/test_engine_life.py.
    """
    with BatchEngine(max_total_tokens=2000) as engine:
        own = _processes(engine)
        assert set(own) == {"engine", "scheduler", "detokenizer"}
        (folder,) = Path(tempfile.gettempdir()).glob(f"batchllm-{own['engine'].pid}-*")
        own[victim].kill()
        with pytest.raises(EngineDiedError):
            for _ in range(100):
                _answers(engine)
                time.sleep(0.1)
    _wait_until(lambda: not any(map(psutil.Process.is_running, own.values())))
    assert not folder.exists()


def test_a_template_serves_engines_of_the_same_environment(engines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang reads variables when it is imported: another environment has its own import. Ours are read later."""
    first = template.acquire(is_verbose=False)
    try:
        monkeypatch.setenv("BATCHLLM_SOMETHING", "1")
        same = template.acquire(is_verbose=False)
        assert same is first
        template.release(same)
        monkeypatch.setenv("SGLANG_SOMETHING", "1")
        other = template.acquire(is_verbose=False)
        assert other is not first
        template.release(other)
        assert not psutil.pid_exists(other.pid)
        assert first.is_alive
    finally:
        template.release(first)


def test_a_scheduler_that_cannot_start_says_why_in_one_error(engines: None, tmp_path: Path) -> None:
    """Its own exception is in the message; everything else it said is shown behind its name."""
    from batchllm.default_model import default_model_path

    model = tmp_path / "model"
    model.mkdir()
    for file in Path(default_model_path()).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    name = min(weights)
    save_file({other: tensor for other, tensor in weights.items() if other != name}, model / "model.safetensors")
    with pytest.raises(EngineError, match=r"no tensor of its checkpoint fills \S+"):
        BatchEngine(str(model), max_total_tokens=2000)


_DRIVER = """
import sys
from batchllm import BatchEngine

engine = BatchEngine(max_total_tokens=2000, log_level="info")
print([list(c.output_ids) for c in engine.batch_generate(input_ids={prompts}, sampling_params={greedy})])
print([name for name in ("torch", "sglang", "transformers") if name in sys.modules])
engine.shutdown()
"""


def test_a_driver_imports_neither_sglang_nor_torch_and_needs_no_guard(
    expected: list[list[int]], tmp_path: Path
) -> None:
    """A plain script, without ``if __name__ == "__main__"``; with a log level the processes say what they do."""
    script = tmp_path / "script.py"
    script.write_text(_DRIVER.format(prompts=PROMPTS, greedy=GREEDY))
    done = _run(script)
    assert done.stdout.splitlines() == [str(expected), "[]"]
    assert "server_args" in done.stderr


_THREAD = """
import threading, time
threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start()
"""


@pytest.mark.thorough
def test_processes_are_spawned_where_a_fork_would_be_broken(expected: list[list[int]], tmp_path: Path) -> None:
    """Every process here has a second thread from its first line on; nothing is forked, and the answers are right."""
    (tmp_path / "sitecustomize.py").write_text(_THREAD)
    script = tmp_path / "script.py"
    script.write_text(
        "import psutil\n"
        + _DRIVER.format(prompts=PROMPTS, greedy=GREEDY).replace('log_level="info"', "random_seed=7")
        + "print(len([p for p in psutil.Process().children(recursive=True)]))\n"
    )
    done = _run(script, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines() == [str(expected), "[]", "0"]


def test_a_driver_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    """While SGLang is being imported, too, when nothing listens to it yet."""
    script = "from batchllm import BatchEngine; BatchEngine(max_total_tokens=2000)"
    with subprocess.Popen([sys.executable, "-c", script], env=of_user()) as driver:
        _wait_until(lambda: bool(psutil.Process(driver.pid).children()))
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    _wait_until(lambda: not any(map(psutil.Process.is_running, children)))


def _run(script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=of_user() | variables
    )
    assert done.returncode == 0, done.stderr
    return done
