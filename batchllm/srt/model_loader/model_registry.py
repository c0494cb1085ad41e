"""SGLang's registry of models without importing them all. Runs in the template's or the server's process. (Upstream:
``srt/models/registry.py``.)

Upstream imports some 200 modules to know which architectures there are; a job needs one of them. Here the names come
from the text of the modules, and a module is imported when its model is asked for.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from pathlib import Path
from typing import Any

from batchllm.host.environment import environment

_DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"
_EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"
_PACKAGE = "sglang.srt.models"
_ENTRY = re.compile(r"^EntryClass\s*(?::[^=]+)?=\s*(\[[^\]]*\]|\w+)", re.MULTILINE)


class LazyModels(dict[str, Any]):
    """Classes by architecture, as in upstream's registry. It is made with the module of each; a class is imported when
    it is read.
    """

    def __getitem__(self, architecture: str) -> Any:
        found = super().__getitem__(architecture)
        if not isinstance(found, str):
            return found
        entry = importlib.import_module(found).EntryClass
        for model in entry if isinstance(entry, list) else [entry]:
            self[model.__name__] = model
        return super().__getitem__(architecture)


def make_lazy() -> None:
    """Replace upstream's registry by `LazyModels`, unless the user has registered models of their own."""
    if os.environ.get(_EXTERNAL):
        return
    modules = find_architectures(os.environ.get(_DISABLED, ""))
    with environment({_DISABLED: ",".join(sorted({name.rpartition(".")[2] for name in _module_names()}))}):
        registry = importlib.import_module(f"{_PACKAGE}.registry")
    registry.ModelRegistry.models = LazyModels(modules)


@functools.cache
def find_architectures(disabled: str = "") -> dict[str, str]:
    """The module that defines each architecture, by the text of SGLang's modules.

    Args:
        disabled: Names of modules to leave out, between commas.
    """
    found: dict[str, str] = {}
    left_out = {name.strip() for name in disabled.split(",")}
    for name, path in _module_names().items():
        if name.rpartition(".")[2] in left_out:
            continue
        for entry in _ENTRY.findall(path.read_text(encoding="utf-8")):
            found |= dict.fromkeys(re.findall(r"\w+", re.sub(r"#.*", "", entry)), name)
    return found


def _module_names() -> dict[str, Path]:
    """Modules of upstream's package of models, and their files."""
    (folder,) = importlib.import_module(_PACKAGE).__path__
    return {f"{_PACKAGE}.{path.stem}": path for path in sorted(Path(folder).glob("*.py")) if path.stem != "__init__"}
