"""The ground that this package stands on, verified when a process starts.

SGLang logs and swallows errors of plugins, so nothing here relies on them silently: the version must match
exactly, and every upstream function that we override or replace must still be the one we read. After an
upgrade, run ``python -m batchllm.srt.compat`` and walk through what has changed.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
from importlib.metadata import version

from batchllm.errors import SeamError

SGLANG_VERSION = "0.5.17"

# First 12 digits of the SHA-256 of the source of each upstream function that we override, replace or lean on.
PINNED = {}


def digest(qualified_name: str) -> str:
    """Short hash of the source of an upstream function, e.g.
    ``sglang.srt.managers.scheduler:Scheduler.run_batch``.
    """
    source = inspect.getsource(pkgutil.resolve_name(qualified_name))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def check() -> None:
    """Verify version and sources.

    Raises:
        SeamError: Naming what differs.
    """
    installed = version("sglang")
    if installed != SGLANG_VERSION:
        raise SeamError(
            f"sglang {installed} is installed, this version of batchllm extends {SGLANG_VERSION}: "
            f"pip install sglang=={SGLANG_VERSION}"
        )
    changed = [name for name, expected in PINNED.items() if digest(name) != expected]
    if changed:
        raise SeamError(
            f"the installed sglang {installed} has been modified in {', '.join(changed)}: reinstall it with "
            f"pip install --force-reinstall --no-deps sglang=={SGLANG_VERSION}"
        )


if __name__ == "__main__":
    for name in PINNED:
        print(f'    "{name}": "{digest(name)}",')
