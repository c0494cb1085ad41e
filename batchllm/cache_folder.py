"""Where files are kept that could be made again: models, tile sizes, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/batchllm/<name>``, below ``~/.cache`` if that is unset. It may not exist."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rule: a relative path there is to be ignored.
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "batchllm" / name
