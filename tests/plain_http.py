"""Servers of tests are asked without TLS. Where this is imported, `httpx` reads the certificates for it once, and not
for each client, which takes 50 ms.
"""

from __future__ import annotations

import functools

from httpx._transports import default

default.create_ssl_context = functools.cache(default.create_ssl_context)
