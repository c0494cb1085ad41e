"""One Ray for all tests here, and the command on engines in its actors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchllm.cli import main
from batchllm.distributed.cluster import Cluster, Resources
from tests.cli.jobs import Argument, Done
from tests.distributed.ray_engines import Deeds, start

Command = Callable[..., Done]


class HeldCluster(Cluster):
    """A Ray that outlives the jobs on it, and lets engines take no cores."""

    def close(self) -> None:
        pass

    def end(self) -> None:
        node = self.ray._private.worker._global_node
        processes = [info.process for infos in node.all_processes.values() for info in infos]
        super().close()
        for process in processes:  # Ray forgets them without asking for their end, which is a warning
            process.wait()

    def resources(self, num_engines: int, gpus_per_engine: int) -> Resources:
        return Resources(num_cpus=0, num_gpus=0)


@pytest.fixture(scope="session")
def cluster() -> Iterator[HeldCluster]:
    importlib.import_module("ray")  # a program may have done so, and mean another one
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        held = HeldCluster(None)
    yield held
    held.end()


@pytest.fixture
def command(
    cluster: HeldCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Runs ``batchllm`` with these arguments; keywords are `Deeds` of its engines, which note them in ``engines``."""
    folder = tmp_path / "engines"
    folder.mkdir()

    def run(*arguments: Argument, **deeds: Any) -> Done:
        monkeypatch.setattr("batchllm.cli.replicas.Cluster", lambda *_, **__: cluster)
        monkeypatch.setattr("batchllm.cli.replicas.start_engine", partial(start, Deeds(folder=str(folder), **deeds)))
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Done(status, *capfd.readouterr())

    return run
