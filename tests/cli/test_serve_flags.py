"""Claims about the address of a server, which is taken before engines start."""

from __future__ import annotations

import socket

import pytest

from batchllm.cli.serve_flags import bound
from batchllm.errors import ConfigError


def test_an_address_that_another_has_is_refused_by_its_flags() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: .*; give another address"):
            bound("127.0.0.1", port).__enter__()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 99_999), ("127.0.0.1", -1), ("a..b", 0)])
def test_an_address_that_is_none_is_refused_by_its_flags(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} --port {port}: "):
        bound(host, port).__enter__()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_an_address_is_free_again_when_it_was_not_listened_at(host: str) -> None:
    """Names that have addresses of both kinds are taken as IPv4's."""
    with bound(host, 0) as listener:
        assert listener.family == socket.AF_INET
        port = listener.getsockname()[1]
    with bound(host, port) as listener:
        assert listener.getsockname()[1] == port
