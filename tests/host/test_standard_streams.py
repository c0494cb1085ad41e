"""Claims about processes whose standard streams somebody has closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_STARTS_A_PROCESS = """
import socket, subprocess, sys
from batchllm.host import standard_streams

standard_streams.reserve()
ours, theirs = socket.socketpair()
number = theirs.fileno()
program = f"import socket; socket.socket(fileno={number}).send(b'heard'); print('printed')"
subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=2, stderr=2, pass_fds=[number])
theirs.close()
with open(sys.argv[1], "wb") as file:
    file.write(ours.recv(100))
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&-", ""])
def test_a_process_that_is_started_gets_its_socket_whatever_is_closed(closed: str, tmp_path: Path) -> None:
    """And what it prints is not taken for something else."""
    heard = tmp_path / "heard"
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", _STARTS_A_PROCESS, str(heard)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert heard.read_bytes() == b"heard"
