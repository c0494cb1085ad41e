"""Every exception batchllm raises on purpose.

    BatchLLMError
    ├── ConfigError         a flag, setting or path is wrong; nothing has run yet
    ├── WorkloadError       the input as a whole cannot be a job (empty file, not UTF-8, ...)
    │   └── RowError        one row is wrong; the others run
    ├── PlanError           a plan contradicts itself or its prompts
    ├── JournalError        a job's results cannot be kept or read back: disk full, file gone, file damaged
    └── EngineError         the runtime
        ├── EngineDiedError     a runtime process ended before all answers were there
        ├── LayoutError         a step's attention layout does not match the KV tables
        └── SeamError           SGLang is not what we extend: another version, or a hook that did not take

Messages name what was wrong, where (file, line, row id, flag), and what to do.
"""

from __future__ import annotations

import functools
from typing import Any


class BatchLLMError(Exception):
    """Base of everything below; catch this to catch all of batchllm."""


class ConfigError(BatchLLMError):
    """A flag, a setting or a path is wrong. Raised before anything runs."""


class WorkloadError(BatchLLMError):
    """The input as a whole cannot be run."""


class RowError(WorkloadError):
    """One input row cannot be run; it becomes an error record and the others go on.

    Attributes:
        message: What is wrong and what would be right, one sentence.
        code: Stable machine-readable name, e.g. ``invalid_json``, ``prompt_too_long``.
        param: The field of the row at fault, if one is.
    """

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param

    def __reduce__(self) -> Any:  # it travels between processes, and pickle knows no keyword arguments
        return functools.partial(RowError, code=self.code, param=self.param), (self.message,)


class PlanError(BatchLLMError):
    """A plan contradicts itself or the prompts it was made for."""


class JournalError(BatchLLMError):
    """A job's results cannot be kept, or cannot be read back. What was acknowledged before stays as safe as it says."""


class EngineError(BatchLLMError):
    """The runtime failed."""


class EngineDiedError(EngineError):
    """A runtime process ended before every request was answered."""


class LayoutError(EngineError):
    """A step's attention layout does not match the KV tables."""


class SeamError(EngineError):
    """SGLang is not what this version of batchllm extends."""
