"""Messages between the process that uses an engine and the process that hosts it. They travel by pickle."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo


def packed(value: Any) -> bytes:
    """A value of the user's, to be read where a fault has someone to go to: it may be of a class that only he has.

    Raises:
        Exception: It cannot travel.
    """
    return bytes(ForkingPickler.dumps(value))


def unpacked(data: bytes) -> Any:
    """What was `packed`.

    Raises:
        TypeError: It is of a class that this process does not know.
    """
    try:
        return pickle.loads(data)
    except Exception as error:  # whatever a class raises
        raise TypeError(f"the engine's process cannot read this, give values of Python's own types: {error}") from error


# To the engine's process


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first message: start the engine.

    Attributes:
        model_path: A Hugging Face model: a directory or a hub name; None where ``flags`` name one, or the default.
        default_model_path: The model where nothing names one.
        flags: SGLang's command line flags.
        server_args: SGLang's server arguments by name; they win over ``flags``.
        scheduler_process: Target of the scheduler's process, as ``module:function``.
        is_verbose: Say what goes on.
        variables: Environment variables of the driver that are read when an engine starts.
        live_grace_s: Answer live requests by HTTP too, and let them have so many seconds to finish at the end; None:
            answer none.
    """

    model_path: str | None
    default_model_path: str
    flags: list[str]
    server_args: dict[str, Any]
    scheduler_process: str
    is_verbose: bool
    variables: dict[str, str]
    live_grace_s: float | None


@dataclass(frozen=True, slots=True)
class OpenJob:
    """Begin a job."""

    job_id: int


@dataclass(frozen=True, slots=True)
class Submit:
    """The next run of a job, in plan order."""

    job_id: int
    requests: RunRequests


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take back the requests of a job that have not started."""

    job_id: int


@dataclass(frozen=True, slots=True)
class CloseJob:
    """End a job; one that is not complete is aborted."""

    job_id: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class GivePlanned:
    """Let planned requests have this part of what they and live ones compete for, at least."""

    share: float


@dataclass(frozen=True, slots=True)
class Call:
    """Call a method; its result comes back as a `Reply` with the same number.

    Attributes:
        number: Number of the call.
        target: ``tokenizer``, ``engine`` (SGLang's) or ``manager`` (its tokenizer manager).
        method: Name of the method.
        arguments: `packed` positional and keyword arguments.
    """

    number: int
    target: str
    method: str
    arguments: bytes


@dataclass(frozen=True, slots=True)
class Generate:
    """A request outside any plan; its outputs come as `Piece`.

    Attributes:
        number: Number of the request.
        fields: `packed` fields of SGLang's ``GenerateReqInput``.
    """

    number: int
    fields: bytes


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this `Generate` any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine."""


# From the engine's process


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine has started.

    Attributes:
        info: Fixed numbers of the engine.
        has_tokenizer: False where it runs on token ids only.
        pid: The process that hosts it.
        model_path: The model that it has loaded.
    """

    info: RuntimeInfo
    has_tokenizer: bool
    pid: int
    model_path: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine has not started."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Finished:
    """Requests of a job that have finished."""

    job_id: int
    requests: FinishedRequests


@dataclass(frozen=True, slots=True)
class Reply:
    """Result of a `Call`, or the exception that it raised."""

    number: int
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Output of a `Generate`; at its end None, or the exception that it raised."""

    number: int
    output: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Died:
    """A process of the engine has ended; nothing more will come."""

    reason: str
