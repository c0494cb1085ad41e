"""Servers of tests are asked without TLS."""

from __future__ import annotations

import functools

from httpx._transports import default


def read_certificates_once() -> None:
    """Have `httpx` read the certificates for TLS once, and not for each client, which takes 50 ms. Doing it twice does
    nothing.
    """
    if not hasattr(default.create_ssl_context, "cache_info"):
        default.create_ssl_context = functools.cache(default.create_ssl_context)
