"""Triton's interpreter, made quicker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as triton_interpreter


def patched_once() -> Callable[[Any], Any]:
    """Triton's `_patch_lang`, which exchanges its operators, done once a launch: it does so for every call within."""
    patch, done = triton_interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        key = tuple(module in fn.__globals__.values() for module in (tl, tl.core))
        if key in done:
            return triton_interpreter._LangPatchScope()
        done.add(key)
        scope = patch(fn)
        restore = scope.restore

        def restore_and_forget() -> None:  # called at the end of a launch only
            done.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    return patch_once
