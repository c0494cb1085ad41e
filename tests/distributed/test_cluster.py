"""What is said before anything runs where replicas cannot: no Ray, nobody there, too few cores, another node."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from batchllm.cli import main
from batchllm.default_model import default_model_path
from batchllm.distributed.actor import Software
from batchllm.distributed.cluster import Cluster, check_reachable, num_cores
from batchllm.errors import ConfigError
from tests.cli.jobs import rows_of, write_rows
from tests.distributed.conftest import HeldCluster

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a job of three rows with these flags; it must end with status 2 and leave nothing. Returns what it says."""

    def run(*flags: str) -> str:
        source, out = write_rows(tmp_path / "in.jsonl", rows_of(3)), tmp_path / "out.jsonl"
        assert main(["run", "-i", str(source), "-o", str(out), *flags]) == 2
        assert set(os.listdir(tmp_path)) == {"in.jsonl"}
        return capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--replicas", "0"), "--replicas 0: must be at least 1"),
        (("--replicas", "2", "--min-replicas", "3"), "--min-replicas 3: must be from 1 to the 2 of --replicas"),
        (("--replicas", "2", "--trace", "T.json"), "--trace: the steps of several engines are not on one clock"),
        (("--ray-address", "nowhere"), "--ray-address nowhere: must be auto, HOST:PORT or ray://HOST:PORT"),
        (("--ray-address", "local"), "--ray-address local: must be auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_named(refused: Refused, flags: tuple[str, ...], words: str) -> None:
    assert words in refused(*flags)


def test_without_ray_the_extra_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'sglang-batchllm[ray]'" in refused("--replicas", "2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--replicas", "0"), "--replicas 0: must be at least 1"),
        (("--replicas", "2", "--min-replicas", "3"), "--min-replicas 3: must be from 1 to the 2 of --replicas"),
        (("--replicas", "2", "--grace", "-1"), "--grace -1.0: must be a number of seconds from 0"),
        (("--replicas", "2", "--batch-max-rows", "0"), "--batch-max-rows 0: must be at least 1"),
        (("--replicas", "2", "--host", "no.such.host.example"), "--host no.such.host.example"),
        (("--replicas", "2", "--port", "99999"), "--port 99999"),
        (("--replicas", "2", "--admin-api-key", "k"), "--admin-api-key: a server of several replicas does not keep it"),
        (("--ray-address", "nowhere"), "--ray-address nowhere: must be auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_flags_of_a_server_that_do_not_fit_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    """Before any engine is started."""
    assert main(["serve", "--demo-model", "--batch-storage", str(tmp_path), "--port", "0", *flags]) == 2
    told = capfd.readouterr().err
    assert words in told and "Traceback" not in told


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_is_is_named_at_once(refused: Refused, scheme: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"{scheme}127.0.0.1:{unused.getsockname()[1]}"
        assert f"--ray-address {address}: nothing is reached there" in refused("--ray-address", address)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_where_something_else_listens_is_named_at_once(refused: Refused, says: bytes) -> None:
    """Something that never answers, and a web server: Ray itself would wait for them for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            there, _ = server.accept()
            with there, contextlib.suppress(ConnectionError):
                there.sendall(says)
                there.recv(1 << 16)
                there.recv(1)  # until the other side leaves

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"--ray-address {address}: what listens there is no Ray" in refused("--ray-address", address)
        thread.join()


def test_the_ray_of_a_job_is_known_as_one(cluster: HeldCluster) -> None:
    address = cluster.ray.get_runtime_context().gcs_address
    check_reachable(address)


def test_the_ray_of_a_job_is_its_own_whatever_the_program_has_done_with_ray(cluster: HeldCluster) -> None:
    """The program has imported Ray, which then knows no token of ours, and its environment names another."""
    assert str(cluster._folder) in cluster.ray._private.worker._global_node.get_session_dir_path()
    raylet = cluster.ray._raylet
    assert raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN


def test_the_ray_of_a_job_does_not_obey_what_ends_the_driver(cluster: HeldCluster) -> None:
    """SIGTERM to all processes of a job leaves those alone of which the driver still wants answers."""
    node = cluster.ray._private.worker._global_node
    pids = [info.process.pid for name in ("gcs_server", "raylet") for info in node.all_processes[name]]
    assert len(pids) == 2
    for pid in pids:
        blocked = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert int(blocked[0], 16) >> (signal.SIGTERM - 1) & 1
    actor = cluster.ray.remote(_Actor).remote()
    pid = cluster.ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGTERM)
    assert cluster.ray.get(actor.pid.remote()) == pid
    cluster.ray.kill(actor)


class _Actor:
    def pid(self) -> int:
        return os.getpid()


def test_another_version_on_a_node_is_named_with_the_node() -> None:
    here = Software.here(default_model_path())
    other = Software(versions=here.versions | {"sglang": "0.0.1"}, model_path=here.model_path, model=here.model)
    with pytest.raises(ConfigError, match=r"node far: sglang is .*, and 0\.0\.1 where the job was started"):
        other.check_here("far")
    here.check_here("far")


def test_a_model_that_a_node_lacks_is_named_with_the_node(tmp_path: Path) -> None:
    here = Software.here(default_model_path())
    there = Software(versions=here.versions, model_path=str(tmp_path / "model"), model=here.model)
    with pytest.raises(ConfigError, match=r"node far: .*/model is not there"):
        there.check_here("far")


def test_another_model_at_the_same_path_is_named_with_the_node() -> None:
    here = Software.here(default_model_path())
    other = Software(versions=here.versions, model_path=here.model_path, model="another")
    with pytest.raises(ConfigError, match=r"node far: the model at .* is not the one"):
        other.check_here("far")


def test_more_replicas_than_cores_are_refused(cluster: HeldCluster) -> None:
    num = num_cores()
    with pytest.raises(ConfigError, match=f"--replicas {num + 1}: this machine has {num} CPU cores; ask for {num}"):
        Cluster.resources(cluster, num + 1, 1)
    assert Cluster.resources(cluster, num, 1).num_cpus == 1
    assert Cluster.resources(cluster, 1, 1).num_cpus == num


_FAILS_ONCE = """
from batchllm.distributed import cluster
imported = cluster._imported
def fails_once():
    ray = imported()
    init = ray.init
    def fail(*args, **options):
        ray.init = init
        init(*args, **options)
        raise RuntimeError("The current node timed out during startup.")
    ray.init = fail
    return ray
cluster._imported = fails_once
held = cluster.Cluster(None)
print(held.ray.get(held.ray.remote(lambda: 7).remote()))
class Engine:
    def start(self):
        from batchllm.host import own_folder
        own_folder.make()
engine = held.ray.remote(Engine).remote()
held.ray.get(engine.start.remote())
held.close()
"""


@pytest.mark.thorough
def test_a_ray_that_does_not_start_is_started_once_more(tmp_path: Path) -> None:
    """Nothing is left of either, nor of an engine that is killed with it."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _FAILS_ONCE], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "7\n", done.stderr
    assert not os.listdir(tmp_path)
