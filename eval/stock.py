"""Stock SGLang's engine, without the files that it leaves in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang.srt.managers.scheduler as upstream
from sglang.srt.entrypoints.engine import Engine

from batchllm.srt.entrypoints import child_process

_SHARED_MEMORY = Path("/dev/shm")


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process: SGLang's own, which ends with its parent and takes no semaphore."""
    child_process.begin("scheduler")
    upstream.run_scheduler_process(*args, **kwargs)


class StockEngine(Engine):
    """As it is, but for the beginning of its scheduler process."""

    run_scheduler_process_func = staticmethod(run_scheduler_process)


def start(engine_class: type[Engine] = StockEngine, **server_args: Any) -> tuple[Any, Callable[[], None]]:
    """The engine, and what ends it and removes its files.

    Args:
        engine_class: A subclass.
        server_args: Of ``Engine``.
    """
    before = _load_files()
    engine = engine_class(**server_args)
    own = _load_files() - before

    def stop() -> None:
        engine.shutdown()
        for path in own:
            path.unlink(missing_ok=True)

    return engine, stop


def _load_files() -> set[Path]:
    return set(_SHARED_MEMORY.glob("sglang_loads_*"))
