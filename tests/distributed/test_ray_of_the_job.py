"""A Ray that starts and ends with a job, and one with two nodes: what is left, whoever is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchllm.distributed.actor import free_port
from tests.cli.jobs import read_lines, recorded_rows, rows_of, status_of, write_rows
from tests.distributed import ray_engines
from tests.distributed.ray_engines import asked_for

NUM_ROWS = 300
_ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 240


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    (tmp_path / "t").mkdir()
    (tmp_path / "home").mkdir()
    return write_rows(tmp_path / "in.jsonl", rows_of(NUM_ROWS))


def _start(base: Path, delay_s: float, *flags: str) -> subprocess.Popen[str]:
    """The command on engines that answer at once, in a process, a temporary folder and a home of its own."""
    command = ["run", "-i", str(base / "in.jsonl"), "-o", str(base / "out.jsonl"), *flags]
    return subprocess.Popen(
        [sys.executable, ray_engines.__file__, str(base / "engines"), str(delay_s), *command],
        env=os.environ | {"TMPDIR": str(base / "t"), "HOME": str(base / "home"), "PYTHONPATH": str(_ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _processes_of(base: Path) -> list[psutil.Process]:
    """Processes that were started with this temporary folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("TMPDIR") == str(base / "t"):
                found.append(process)
        except psutil.Error:
            continue  # gone, or somebody else's
    return found


def _wait_until(condition: Any, driver: subprocess.Popen[str] | None = None) -> None:
    """Wait for a state; not for one that a driver was to bring about which has ended."""
    limit = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert driver is None or driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_driver_that_is_killed_leaves_no_process_and_its_job_goes_on(source: Path, tmp_path: Path) -> None:
    """Twice: no row that was acknowledged runs again, each is answered once, and nothing is left on disk."""
    out, engines = tmp_path / "out.jsonl", tmp_path / "engines"
    for _ in range(2):
        before = sum(asked_for(engines), Counter())
        recorded = recorded_rows(Path(f"{out}.job")) if Path(f"{out}.job").exists() else set()
        driver = _start(tmp_path, 0.02, "--replicas", "2")
        num_recorded = len(recorded)
        _wait_until(lambda n=num_recorded: _has_begun(out) and len(recorded_rows(Path(f"{out}.job"))) > n, driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        _wait_until(lambda: not _processes_of(tmp_path))
        again = sum(asked_for(engines), Counter()) - before
        assert not {int(row) for row in again if row != "start"} & recorded
    recorded = recorded_rows(Path(f"{out}.job"))
    before = sum(asked_for(engines), Counter())
    driver = _start(tmp_path, 0.0, "--replicas", "2")
    _, words = driver.communicate(timeout=_TIMEOUT_S)
    assert driver.returncode == 0, words
    again = sum(asked_for(engines), Counter()) - before
    assert {int(row) for row in again if row != "start"} == set(range(NUM_ROWS)) - recorded
    assert [line["text"] for line in read_lines(out)] == [f"after {i}" for i in range(NUM_ROWS)]
    assert not _processes_of(tmp_path)
    assert not os.listdir(tmp_path / "t") and os.listdir(tmp_path / "home") == [".cache"]  # of models
    assert not Path("/tmp/ray").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_asked_to_stop_ends_in_good_order(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """By a signal to all of its processes, as a terminal sends it: what runs is answered, and the status says so."""
    out = tmp_path / "out.jsonl"
    driver = _start(tmp_path, 0.1, "--replicas", "2")
    _wait_until(lambda: _has_begun(out) and len(recorded_rows(Path(f"{out}.job"))) > 20, driver)
    os.killpg(driver.pid, number)
    _, words = driver.communicate(timeout=_TIMEOUT_S)
    assert driver.returncode == 3 and f"stopped by {number.name}" in words, words
    assert "is gone" not in words
    _wait_until(lambda: not _processes_of(tmp_path))
    assert not os.listdir(tmp_path / "t")
    recorded = recorded_rows(Path(f"{out}.job"))
    assert {int(row) for rows in asked_for(tmp_path / "engines") for row in rows if row != "start"} >= recorded
    assert 20 < len(recorded) < NUM_ROWS


def _has_begun(out: Path) -> bool:
    return (Path(f"{out}.job") / "journal.db").exists()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, a core each."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # names of sockets are short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("PYTHONPATH", str(_ROOT))  # actors are of the tests' own classes
        (Path(folder) / "ray").mkdir()
        cluster = Cluster(initialize_head=False)
        nodes = [cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=10**8) for _ in range(2)]
        processes = [info.process for node in nodes for infos in node.all_processes.values() for info in infos]
        yield cluster, nodes
        cluster.shutdown()
        for process in processes:  # as in `HeldCluster.end`
            process.wait()


def test_a_node_that_is_lost_takes_no_row_along(two_nodes: Any, source: Path, tmp_path: Path) -> None:
    """The engine on it is gone, there is no place for another one, and the other answers what is left."""
    cluster, nodes = two_nodes
    driver = _start(tmp_path, 0.02, "--replicas", "2", "--ray-address", cluster.address)
    engines = tmp_path / "engines"
    _wait_until(lambda: len(asked_for(engines)) == 2 and all(rows.total() > 1 for rows in asked_for(engines)), driver)
    cluster.remove_node(nodes[1])
    _, words = driver.communicate(timeout=_TIMEOUT_S)
    assert driver.returncode == 0, words
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == [f"after {i}" for i in range(NUM_ROWS)]
    assert "is gone" in words


@pytest.mark.parametrize("is_outside", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_node_that_is_drained_ends_its_engine_in_good_order(
    two_nodes: Any, source: Path, tmp_path: Path, is_outside: bool
) -> None:
    """A spot warning: what the engine has begun is answered, the rest runs elsewhere, and no row is suspected."""
    cluster, nodes = two_nodes
    with _door(cluster.address) if is_outside else nullcontext(cluster.address) as address:
        delay_s = 0.2 if is_outside else 0.1  # from outside it takes longer until both have begun
        driver = _start(tmp_path, delay_s, "--replicas", "2", "--ray-address", address)
        _drain(cluster.address, nodes[1], tmp_path, driver)
        _, words = driver.communicate(timeout=_TIMEOUT_S)
    assert driver.returncode == 0, words
    assert [line["text"] for line in read_lines(tmp_path / "out.jsonl")] == [f"after {i}" for i in range(NUM_ROWS)]
    assert "has ended in good order" in words and "is gone" not in words
    kinds = [kind for _, kind, _ in status_of(tmp_path / "out.jsonl.job").events]
    assert "engine_death" not in kinds


@pytest.mark.thorough
def test_a_connection_that_breaks_ends_the_job_with_words_and_it_goes_on_later(
    two_nodes: Any, source: Path, tmp_path: Path
) -> None:
    """Ray tries to connect again for half a minute; what was answered is safe, and the same command runs the rest."""
    cluster, _ = two_nodes
    out = tmp_path / "out.jsonl"
    with _door(cluster.address) as address:
        driver = _start(tmp_path, 0.1, "--replicas", "2", "--ray-address", address)
        _wait_until(lambda: _has_begun(out) and len(recorded_rows(Path(f"{out}.job"))) > 20, driver)
    _, words = driver.communicate(timeout=_TIMEOUT_S)
    assert driver.returncode == 2 and "Traceback" not in words, words
    assert "the connection to Ray is gone" in words and "what is done is safe in" in words.splitlines()[-1]
    recorded = recorded_rows(Path(f"{out}.job"))
    before = sum(asked_for(tmp_path / "engines"), Counter())
    driver = _start(tmp_path, 0.0, "--replicas", "2", "--ray-address", cluster.address)
    _, words = driver.communicate(timeout=_TIMEOUT_S)
    assert driver.returncode == 0, words
    again = sum(asked_for(tmp_path / "engines"), Counter()) - before
    assert {int(row) for row in again if row != "start"} == set(range(NUM_ROWS)) - recorded


@contextmanager
def _door(address: str) -> Iterator[str]:
    """The address of a cluster for who is not in it."""
    port = free_port()
    command = [sys.executable, "-m", "ray.util.client.server", "--address", address, "--mode", "proxy"]
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL) as server:
        _wait_until(lambda: _is_listened_to(port))
        yield f"ray://127.0.0.1:{port}"
        for process in (server, *psutil.Process(server.pid).children(recursive=True)):
            process.kill()


def _is_listened_to(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _drain(address: str, node: Any, base: Path, driver: subprocess.Popen[str]) -> None:
    """Warn of the end of a node whose engine has begun something."""
    from ray._raylet import GcsClient

    engines = base / "engines"
    _wait_until(lambda: len(asked_for(engines)) == 2 and all(rows.total() > 1 for rows in asked_for(engines)), driver)
    is_accepted, why = GcsClient(address=address).drain_node(node.node_id, 2, "spot", 0)
    assert is_accepted, why
