"""What ``batchllm run`` was asked for: made once from its flags, kept in the job's journal, read again by ``retry``.

Knows the flags by name; not what is done with them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from batchllm.cli.inputs import InputFlags
from batchllm.errors import ConfigError
from batchllm.offline.outputs import ResultOrder
from batchllm.planner.group_order import DEFAULT_GROUP_ORDER, GroupOrder

_PATHS = ("input", "output", "errors", "report", "trace", "progress_file", "model", "job_dir")
_OF_RETRY = (
    *("retry", "max_failures", "grace", "progress", "progress_file", "metrics_port", "verbose"),
    *("replicas", "min_replicas", "ray_address"),
)


@dataclass(frozen=True, kw_only=True)
class RunCommand(InputFlags):
    """The flags of a run, by their names; `batchllm.cli.parser` says what each means.

    Attributes:
        server_flags: Flags of the engine, as they were given.
    """

    output: str
    errors: str | None = None
    order: ResultOrder = "input"
    job_dir: str | None = None
    restart: bool = False
    dedupe: bool = False
    token_memory: float | None = None
    report: str | None = None
    trace: str | None = None
    group_order: GroupOrder = DEFAULT_GROUP_ORDER
    retry: int = 0
    max_failures: int | None = None
    grace: float = 30.0
    progress: bool | None = None
    verbose: bool = False
    progress_file: str | None = None
    metrics_port: int | None = None
    replicas: int = 1
    min_replicas: int | None = None
    ray_address: str | None = None
    server_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.job_dir == "":  # it would be the folder that one is in
            raise ConfigError("--job-dir: is empty; give a folder, or leave it out")

    @property
    def is_on_ray(self) -> bool:
        """Several engines run it, or one that Ray starts."""
        return self.replicas != 1 or self.ray_address is not None

    @classmethod
    def of_run(cls, args: argparse.Namespace, server_flags: list[str]) -> Self:
        """What the flags of ``run`` ask for."""
        return cls(**_known(cls, vars(args)), server_flags=tuple(server_flags))

    @classmethod
    def of_retry(cls, args: argparse.Namespace, server_flags: list[str], journaled: Mapping[str, Any]) -> Self:
        """What a run asked for, but for what ``retry`` says otherwise.

        Args:
            args: The flags of ``retry``.
            server_flags: Flags of the engine beside those of the run.
            journaled: What `to_journal` gave, of whatever version: it may lack a flag, or have one that is gone.
        """
        given = {name: value for name, value in vars(args).items() if name in _OF_RETRY and value is not None}
        flags = _known(cls, journaled["flags"]) | given | {"job_dir": args.job_dir}
        return cls(**flags, server_flags=(*journaled["server_flags"], *server_flags))

    def to_journal(self, spool_path: Path | None) -> dict[str, Any]:
        """What `of_retry` needs to run the job again, from wherever it is called.

        Args:
            spool_path: The job's own copy of the input, where it has one.
        """
        flags = asdict(self)
        server_flags = list(flags.pop("server_flags"))
        del flags["restart"]
        for name in _PATHS:
            value = flags[name]
            if value is not None and value != "-" and "://" not in value and (name != "model" or os.path.exists(value)):
                flags[name] = os.path.abspath(value)
        if spool_path is not None:
            flags["input"] = str(spool_path.absolute())
        return {"flags": flags, "server_flags": server_flags}


def _known(cls: type[RunCommand], flags: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)} - {"server_flags"}
    return {name: value for name, value in flags.items() if name in names}
