"""The request that SGLang asks its own server first, to find out whether it is up. Runs in the server's process.

(Upstream: ``_execute_server_warmup`` of ``srt/entrypoints/http_server.py``.)
"""

from __future__ import annotations

import threading

import sglang.srt.entrypoints.http_server as upstream
from sglang.srt.server_args import ServerArgs


class FirstRequest:
    """SGLang's, which a server that ends does not wait for: SGLang would ask it for two minutes, and then kill the
    process.
    """

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def ask(self, server_args: ServerArgs) -> bool:
        """Ask, and return whether it was answered before the server was to end."""
        answered: list[bool] = []

        def ask() -> None:
            try:
                answered.append(upstream._execute_server_warmup(server_args))
            finally:
                self._is_over.set()

        threading.Thread(target=ask, name="first request", daemon=True).start()
        self._is_over.wait()
        return answered == [True]

    def cut_off(self) -> None:
        """The server is to end."""
        self._is_over.set()
